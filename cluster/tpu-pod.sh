#!/usr/bin/env bash
# Trains on all hosts of a TPU pod slice, from the machine where gcloud is set up:
#
#   cluster/tpu-pod.sh NAME ZONE OPTIONS-OF-TRAIN
#   cluster/tpu-pod.sh my-v5e-32 us-central1-a --config in1k --data-dir /mnt/data --workdir /mnt/runs/in1k
#
# /mnt is a file system that all hosts share (Filestore or another NFS). Each host has this checkout in ~/shufflenet_jax.
# The hosts find each other. The same command again goes on where the run was.
set -euo pipefail
name=$1 zone=$2
shift 2
options=$(printf ' %q' "$@")

gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "
  set -e
  cd ~/shufflenet_jax
  test -d .venv || { ${PYTHON:-python3.11} -m venv .venv; .venv/bin/pip install --quiet -r requirements.txt 'jax[tpu]'; }
  exec .venv/bin/python train.py$options"
