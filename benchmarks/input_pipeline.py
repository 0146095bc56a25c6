"""Images per second that reach a training step: our pipeline beside Pillow as torchvision uses it, and tf.data.

    python benchmarks/input_pipeline.py --data FOLDER --tf-python tfenv/bin/python

FOLDER holds images, <split>/<class>/<image>. tf.data needs a separate Python, in a throw-away environment:
`python3 -m venv tfenv && tfenv/bin/pip install tensorflow-cpu`; without --tf-python it is skipped. Every contender runs
in a separate process; they alternate, several times. A table of medians and ratios goes to stdout.
"""

import argparse
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import machine

Contender = tuple[str, str]  # Name and data set.
SETS = ("original", "short edge 256")
OURS = [
    # Name, transform, worker processes, cores.
    ("ours, exact, threads", "exact", 0, 1),
    ("ours, fast, threads", "fast", 0, 1),
    ("ours, fast, 1 worker", "fast", 1, 2),
    ("ours, fast, 2 workers", "fast", 2, 2),
]
BATCH = 64
COPIES = 40  # Of each image: shuffling a few hundred examples takes longer than shuffling many.


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of images, <split>/<class>/<image>")
    parser.add_argument("--split", default="val", help="its split (default: %(default)s)")
    parser.add_argument("--tf-python", help="a Python with tensorflow-cpu; without it tf.data is skipped")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="measured time of a run (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, spec, home = options.child
        return child(kind, spec, home, options.seconds)

    with tempfile.TemporaryDirectory() as folder:
        sets = prepare_sets(options.data, options.split, Path(folder))
        contenders: dict[Contender, tuple[int, list[str]]] = {}
        for where in SETS:
            for name, transform, workers, cores in OURS:
                spec = json.dumps({"transform": transform, "workers": workers})
                contenders[name, where] = (cores, [sys.executable, __file__, "--child", "ours", spec, str(sets[where])])
            contenders["Pillow, as torchvision", where] = (
                1,
                [sys.executable, __file__, "--child", "pillow", "", str(sets[where])],
            )
            if options.tf_python:
                peer = Path(__file__).with_name("tfdata_peer.py")
                contenders["tf.data", where] = (1, [options.tf_python, str(peer), str(sets[where])])
        for key, (cores, words) in contenders.items():
            tail = [str(options.seconds)] if key[0] == "tf.data" else ["--seconds", str(options.seconds), "--data", "x"]
            contenders[key] = cores, words + tail
        rates = measure(contenders, options.rounds)
        sizes = {where: mean_size(home / "files") for where, home in sets.items()}
        memory = [sys.executable, __file__, "--child", "memory", "", str(sets["short edge 256"]), "--data", "x"]
        resident = json.loads(subprocess.run(memory, capture_output=True, text=True, check=True).stdout)
    show(rates, with_tf=bool(options.tf_python))
    sizes_in_words = ", ".join(f"{size:.0f} after {examples:,}" for examples, size in resident)
    print(f"\nresident memory in MiB, fast, threads: {sizes_in_words} examples")
    if options.json:
        rows = [{"contender": name, "set": where, "images_per_second": runs} for (name, where), runs in rates.items()]
        record = {"machine": machine(), "bytes_per_image": sizes, "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def prepare_sets(data: Path, split: str, folder: Path) -> dict[str, Path]:
    """Write the data sets.

    Args:
      data: a folder of images.
      split: its split.
      folder: for the data sets.

    Returns:
      {set: folder}, each with files/, the images, and sets/, the same as ArrayRecords.
    """
    from shufflenet_jax.preparation import dataset
    from shufflenet_jax.preparation.contents import read_contents
    from shufflenet_jax.preparation.records import StoreOptions, shrink

    contents = read_contents(data)
    sets = {}
    for where in SETS:
        home = folder / where.replace(" ", "_")
        for entry in contents.splits[split]:
            stored = entry.location.read()
            if where != "original":
                stored = shrink(stored, 256, 90, entry.name)
            for copy in range(COPIES):
                path = home / "files" / "train" / entry.name
                path = path.with_name(f"{copy}_{path.name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stored)
        plan = dataset.plan_images(read_contents(home / "files"), "bench", home / "sets", StoreOptions())
        dataset.write(plan, processes=1)
        sets[where] = home
    return sets


def mean_size(folder: Path) -> float:
    """Return the mean size of a folder's files, in bytes.

    Args:
      folder: its path.
    """
    return statistics.mean(path.stat().st_size for path in folder.rglob("*.*") if path.is_file())


def measure(contenders: Mapping[Contender, tuple[int, list[str]]], rounds: int) -> dict[Contender, list[float]]:
    """Run all contenders alternately.

    Args:
      contenders: {name: (cores, command)}.
      rounds: runs of each.

    Returns:
      {name: images per second of each run}.
    """
    rates: dict[Contender, list[float]] = {key: [] for key in contenders}
    for number in range(rounds):
        for key, (cores, words) in contenders.items():
            print(f"round {number + 1} of {rounds}: {', '.join(key)}", file=sys.stderr)
            done = subprocess.run(
                ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores])), *words],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"error: {key} failed: {done.stderr.strip().splitlines()[-1]}")
            rates[key].append(json.loads(done.stdout.splitlines()[-1])["images_per_second"])
    return rates


def show(rates: Mapping[Contender, list[float]], *, with_tf: bool) -> None:
    """Print the table.

    Args:
      rates: from `measure`.
      with_tf: whether tf.data is among them.
    """
    medians = {key: statistics.median(runs) for key, runs in rates.items()}
    print(f"{machine()}; images per second, median of {len(next(iter(rates.values())))} alternating runs\n")
    ratio = " | of tf.data on the same | of tf.data on originals" if with_tf else ""
    print(f"| contender | records | cores | images/s{ratio} |")
    print(f"| --- | --- | --- | ---{' | --- | ---' if with_tf else ''} |")
    cores = {name: count for name, _, _, count in OURS}
    for (name, where), rate in medians.items():
        row = f"| {name} | {where} | {cores.get(name, 1)} | {rate:.0f}"
        if with_tf:
            row += f" | {rate / medians['tf.data', where]:.2f} | {rate / medians['tf.data', 'original']:.2f}"
        print(row + " |")
    for where in SETS:
        two, one = (medians[f"ours, fast, {count}", where] for count in ("2 workers", "1 worker"))
        print(f"\n{where}: two workers give {two / one:.2f} times one", end="")
    print()


def child(kind: str, spec: str, home: str, seconds: float) -> int:
    """Run one contender once, and print its rate, or its memory over time.

    Args:
      kind: "ours", "pillow" or "memory".
      spec: settings of ours, as JSON.
      home: folder of a data set.
      seconds: measured time.

    Returns:
      The exit status.
    """
    if kind == "memory":
        print(json.dumps(run_memory(Path(home))))
        return 0
    rate = {"ours": run_ours, "pillow": run_pillow}[kind](spec, Path(home), seconds)
    print(json.dumps({"images_per_second": rate}))
    return 0


def run_ours(spec: str, home: Path, seconds: float) -> float:
    """Return the images per second of our pipeline.

    Args:
      spec: its settings, as JSON.
      home: folder of a data set.
      seconds: measured time.
    """
    from shufflenet_jax import environment

    settings = json.loads(spec)
    environment.keep_freed_memory()  # As all commands do.
    return rate_of((BATCH for _ in our_batches(settings, home)), seconds, warm=4 + 4 * settings["workers"])


def our_batches(settings: Mapping[str, Any], home: Path) -> Iterable[Mapping[str, Any]]:
    """Return the batches of our pipeline.

    Args:
      settings: fields of TrainConfig.
      home: folder of a data set.
    """
    from shufflenet_jax.config import TrainConfig
    from shufflenet_jax.data.pipeline import train_batches
    from shufflenet_jax.data.sources import open_source

    source = open_source("tfds:bench", "train", data_dir=home / "sets")
    config = dataclasses.replace(TrainConfig(data="x"), batch_size=BATCH, **settings)
    # One thread: in this process, or in every worker.
    return train_batches(source, config, stop_step=100_000, workers=config.workers, threads=1)


def run_memory(home: Path, examples: int = 20_000) -> list[tuple[int, float]]:
    """Return (examples read, resident MiB) at each quarter of a long read.

    Args:
      home: folder of a data set.
      examples: to read.
    """
    sizes: list[tuple[int, float]] = []
    for step, _ in enumerate(our_batches({"transform": "fast"}, home), start=1):
        if step * BATCH >= (len(sizes) + 1) * examples / 4:
            status = Path("/proc/self/status").read_text()
            kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
            sizes.append((step * BATCH, int(kilobytes) / 1024))
        if len(sizes) == 4:
            break
    return sizes


def run_pillow(_: str, home: Path, seconds: float) -> float:
    """Return the images per second of decoding, RandomResizedCrop and flip, as torchvision's transforms call Pillow.

    Args:
      home: folder of a data set.
      seconds: measured time.
    """
    import numpy as np
    from PIL import Image

    from shufflenet_jax.data.augmentation import random_crop_box

    files = [path.read_bytes() for path in sorted((home / "files").rglob("*.*")) if path.is_file()]
    rng = np.random.default_rng(0)

    def images() -> Iterator[int]:
        while True:
            for data in files:
                image: Image.Image = Image.open(io.BytesIO(data)).convert("RGB")
                top, left, height, width = random_crop_box(image.size[1], image.size[0], rng)
                image = image.crop((left, top, left + width, top + height)).resize(
                    (224, 224), Image.Resampling.BILINEAR
                )
                if rng.random() < 0.5:
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                np.asarray(image)
                yield 1

    return rate_of(images(), seconds, warm=50)


def rate_of(counts: Iterable[int], seconds: float, *, warm: int) -> float:
    """Return the images per second of an iterable.

    Args:
      counts: number of images of each item.
      seconds: measured time.
      warm: number of items before.
    """
    items = iter(counts)
    for _ in range(warm):
        next(items)
    start, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        images += next(items)
    return images / elapsed


if __name__ == "__main__":
    sys.exit(main())
