"""Trainings killed at random moments, and started again, end with the numbers of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from share import SHARE

ROOT = Path(__file__).parents[2]
TRAINING = (
    *("--config", "digits", "--image-size", "16", "--epochs", "4", "--eval-every", "1", "--log-every", "10"),
    *("--mixup", "0.2", "--ema-decay", "0.9", "--dropout", "0.1"),
)
SEED = int(os.environ.get("SEED", "0"))  # Of the moments of the kills.
RUNS = max(1, round(20 * SHARE))


def start(workdir):
    command = [sys.executable, ROOT / "tests/small_training.py", *TRAINING, "--workdir", workdir]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(workdir):
    process = start(workdir)
    _, told = process.communicate()
    assert process.returncode == 0, told
    return told


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(The workdir of an uninterrupted run, the seconds that one takes once it need not compile)."""
    root = tmp_path_factory.mktemp("alone")
    finish(root / "first")
    began = time.monotonic()
    finish(root / "second")
    return root / "second", time.monotonic() - began


def saving(workdir):
    return any((workdir / "checkpoints").glob("*tmp*")) if (workdir / "checkpoints").is_dir() else False


def kill(workdir, rng, duration, during_save):
    """Kills a run at a random moment, or in the middle of a save; returns whether it was still running."""
    process, began = start(workdir), time.monotonic()
    moment = rng.uniform(0, 0.8) * duration
    while process.poll() is None:
        if time.monotonic() - began >= moment and (not during_save or saving(workdir)):
            break
        time.sleep(0.001)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


def end_of(workdir):
    """All that a run leaves but times: the rows of its log, and every array of its last checkpoint."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = max((path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))
    with ocp.PyTreeCheckpointer() as checkpointer:
        trees = {name: checkpointer.restore(last / name) for name in ("variables", "optimizer", "ema")}
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows], last.name, trees


@pytest.mark.parametrize("number", range(RUNS))
def test_a_killed_run_ends_as_if_it_had_not_been(alone, number, tmp_path):
    whole, duration = alone
    rng, kills = random.Random(f"{SEED}/{number}"), 0
    for attempt in range(2):
        kills += kill(tmp_path / "run", rng, duration, during_save=(number + attempt) % 2 == 1)
    assert kills, "it must have been running"
    finish(tmp_path / "run")
    (rows, step, trees), (expected_rows, expected_step, expected) = end_of(tmp_path / "run"), end_of(whole)
    assert (rows, step) == (expected_rows, expected_step)
    jax.tree.map(np.testing.assert_array_equal, trees, expected)
