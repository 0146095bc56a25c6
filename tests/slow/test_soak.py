"""Hours of training cost no more memory, files or threads than minutes: 45 minutes with some 200 evaluations."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
from PIL import Image
from share import SHARE

ROOT = Path(__file__).parents[2]
MINUTES = 45 * SHARE
IMAGES = {"train": 4096, "test": 1024}
EVERY = 5  # Seconds between two looks at the process.


@pytest.fixture
def data(tmp_path):
    """Class folders of noise, as large as CIFAR-10's images."""
    rng = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for i in range(count):
            path = tmp_path / f"data/{split}/{i % 10}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def look(process, metrics):
    """{"step": the last logged, "seconds": of its cores' time, "mib": resident, "files": open, "threads", "pool"} of a
    run: the threads are those of all libraries but TensorStore, which writes checkpoints, and the pool are its."""
    pool = sum("ts_pool" in name for name in thread_names(process.pid))
    with process.oneshot():
        spent = process.cpu_times()
        return {
            "step": json.loads(metrics.read_text().splitlines()[-1])["step"],
            "seconds": spent.user + spent.system,
            "mib": process.memory_info().rss / 2**20,
            "files": process.num_fds(),
            "threads": process.num_threads() - pool,
            "pool": pool,
        }


def thread_names(pid):
    for place in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # The thread has ended.
            yield place.read_text()


@pytest.mark.skipif(MINUTES < 9, reason="a soak of a few minutes tells nothing; set SHARE to 0.2 or more")
def test_training_for_long_takes_no_more_than_at_its_beginning(data, tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", "--config", "cifar10", "--width", "0.5", "--data", data]
    command += ["--epochs", "100000", "--eval-every", "1", "--log-every", "16", "--workdir", workdir]
    with open(tmp_path / "told", "w") as told:
        running = subprocess.Popen(list(map(str, command)), stdout=told, stderr=told)
    process, looks, metrics = psutil.Process(running.pid), [], workdir / "metrics.jsonl"
    try:
        while not metrics.exists() or metrics.read_text().count("eval") < 2:  # What is only done once is done then.
            assert running.poll() is None, (tmp_path / "told").read_text()
            time.sleep(1)
        first, began = metrics.read_text().count("\n"), time.monotonic()
        while time.monotonic() - began < 60 * MINUTES:
            assert running.poll() is None, (tmp_path / "told").read_text()
            looks.append(look(process, metrics))
            time.sleep(EVERY)
    finally:
        running.send_signal(signal.SIGTERM)
        status = running.wait(120)
    assert status == 0, (tmp_path / "told").read_text()

    rows = [json.loads(line) for line in metrics.read_text().splitlines()[first:]]
    trained = [row for row in rows if row["split"] == "train"]
    evaluations = len(rows) - len(trained)
    quarters = [
        {
            **{name: median(found[name] for found in part) for name in ("mib", "files", "threads", "pool")},
            "images_per_second": median(row["images_per_second"] for row in steps),
            # What other work on the machine takes has less part in this.
            "images_per_core_second": 256
            * (part[-1]["step"] - part[0]["step"])
            / (part[-1]["seconds"] - part[0]["seconds"]),
        }
        for part, steps in zip(in_four(looks), in_four(trained), strict=True)
    ]
    print(f"\n{MINUTES:g} minutes, {trained[-1]['step']} steps, {evaluations} evaluations and checkpoints")
    for number, quarter in enumerate(quarters, start=1):
        print(f"quarter {number}:", ", ".join(f"{name} {value:.1f}" for name, value in quarter.items()))
    before, after = quarters[0], quarters[-1]
    assert after["files"] == before["files"] and after["threads"] == before["threads"]
    # It starts a thread whenever more of its work coincides than before, up to its own limit: 12 after 600 checkpoints.
    assert after["pool"] <= 16
    # A leak of a batch an epoch would be 40 MiB, one of a checkpoint's arrays more.
    assert after["mib"] <= before["mib"] + 32


def in_four(values):
    """Its four quarters, in order."""
    size = len(values) // 4
    return [values[i * size : (i + 1) * size] for i in range(4)]
