#!/usr/bin/env bash
# Starts a training on all hosts of a TPU pod slice, from a machine where gcloud is set up:
#
#   cluster/tpu-pod.sh NAME ZONE OPTIONS-OF-TRAIN
#   cluster/tpu-pod.sh my-v5e-32 us-central1-a --config in1k --data-dir /mnt/data --workdir /mnt/runs/in1k
#
# Before, on all hosts (gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all --command ...): this checkout in
# ~/shufflenet_jax; Python 3.11 or later with venv (PYTHON=python3.12 cluster/tpu-pod.sh ... names another); and at /mnt,
# or wherever you like, a file system that all of them share (Filestore or another NFS).
#
# The hosts find each other. The run goes on when you log out, and each host writes ~/shufflenet_jax/train.log. To stop
# it, which saves: ... --worker=all --command 'pkill -TERM -f [t]rain.py'. The same command again goes on.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 NAME ZONE OPTIONS-OF-TRAIN" >&2; exit 2; }
name=$1 zone=$2
shift 2
options=$(printf ' %q' "$@")

gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "
  set -e
  cd ~/shufflenet_jax
  test -e .venv/tpu.stamp || {
    rm -rf .venv
    ${PYTHON:-python3.11} -m venv .venv
    .venv/bin/pip install --quiet -r requirements.txt 'jax[tpu]'
    touch .venv/tpu.stamp
  }
  nohup .venv/bin/python train.py$options >> train.log 2>&1 < /dev/null &"
