"""Seconds from the start of a command to its first result, with an empty compilation cache and with a filled one.

    python benchmarks/startup.py --checkpoint FILE.pth

A training (1.0x, 224 x 224, batch 32) counts until its first step is logged; `eval.py` and `predict`, on one image,
until they end. Every run is a separate process; medians over the rounds. A table goes to stdout.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = ["train.py", "--config", "in1k", "--batch-size", "32", "--bn-group-size", "0", "--log-every", "1"]


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="weights for the evaluation, in any form")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    options = parser.parse_args()

    from model import machine

    path = Path(options.checkpoint)
    checkpoint = path.resolve() if path.exists() else options.checkpoint  # Commands run elsewhere; or it is a name.
    found: dict[str, dict[str, list[float]]]
    found = {"train.py, first step": {}, "eval.py, 1 image": {}, "predict, 1 image": {}}
    with tempfile.TemporaryDirectory() as home:
        folder, image = save_images(Path(home)), ROOT / "demo/bird.JPEG"
        commands: dict[str, list[object]] = {
            "eval.py, 1 image": ["eval.py", "--data", folder, "--limit", "1"],
            "predict, 1 image": ["-m", "shufflenet_jax", "predict", image],
        }
        for number in range(options.rounds):
            cache = {"JAX_COMPILATION_CACHE_DIR": f"{home}/cache{number}"}
            for kind in ("empty", "filled"):
                seconds = first_step([*TRAIN, "--data", folder, "--workdir", f"{home}/{kind}{number}"], cache)
                found["train.py, first step"].setdefault(kind, []).append(seconds)
                for name, words in commands.items():
                    seconds = whole([*words, "--checkpoint", checkpoint], cache)
                    found[name].setdefault(kind, []).append(seconds)

    print(f"{machine()}; seconds, median of {options.rounds} runs\n")
    print("| command | empty compilation cache | filled |\n| --- | --- | --- |")
    for name, kinds in found.items():
        print(f"| {name} | {statistics.median(kinds['empty']):.1f} | {statistics.median(kinds['filled']):.1f} |")
    return 0


def save_images(home: Path, images: int = 32) -> Path:
    """Write class folders with as many images as one step takes.

    Args:
      home: folder for the data.
      images: for training.

    Returns:
      The folder of the data.
    """
    for split, number in [*(("train", i) for i in range(images)), ("val", 0)]:
        place = home / f"data/{split}/n01440764/{number}.JPEG"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "demo/bird.JPEG", place)
    return home / "data"


def start(words: Sequence[object], variables: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Start a Python process.

    Args:
      words: its arguments.
      variables: of its environment.
    """
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def whole(words: Sequence[object], variables: Mapping[str, str]) -> float:
    """Return the seconds until a command has ended.

    Args:
      words: its arguments.
      variables: of its environment.
    """
    began = time.perf_counter()
    process = start(words, variables)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"error: {' '.join(map(str, words))} failed: {output[-2000:]}")
    return time.perf_counter() - began


def first_step(words: Sequence[object], variables: Mapping[str, str]) -> float:
    """Return the seconds until a training's first step is in its log, and end the training.

    Args:
      words: its arguments, the last one the workdir.
      variables: of its environment.
    """
    metrics = Path(str(words[-1])) / "metrics.jsonl"
    began = time.perf_counter()
    process = start(words, variables)
    try:
        while process.poll() is None:
            if metrics.is_file() and metrics.stat().st_size:
                return time.perf_counter() - began
            time.sleep(0.01)
        raise SystemExit(f"error: the training ended: {process.stdout.read()[-2000:] if process.stdout else ''}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


if __name__ == "__main__":
    sys.exit(main())
