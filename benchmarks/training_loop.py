"""The cost of the host in a training: train.py's loop beside the same steps on a batch that waits on the device.

    python benchmarks/training_loop.py [--data tfds:NAME --data-dir DIR]

Preset cifar10. The loop reads, decodes, shifts and copies images, moves the progress bar and adds up the metrics; the
bare steps do none of it. Both continue the same training, and alternate after some steps: the bare steps run once the
decoding threads have filled their buffers and rest, the loop once it has emptied these, so that it pays for each batch;
each after as many steps that do not count. It is the second pass over the data, or with `--first-pass` the first one,
which decodes small images for all later ones. A turn of the loop ends with a line of the log, which train.py writes
every 100 steps. On a CPU the decoding threads compete with the step for the cores, which counts as cost here; on an
accelerator they do not. The table also has the computing time of the loop's own thread, and the time of decoding a
batch while nothing else runs.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shufflenet_jax.config import TrainConfig
    from shufflenet_jax.data.sources import Source

sys.path.insert(0, str(Path(__file__).parent.parent))

BUFFERED = 8  # Steps after which all earlier decoded batches are used up: Grain and `feed` hold fewer.
REST = 3  # Seconds for the decoding threads to fill their buffers.


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as train.py takes it (default: random images, written as PNG)")
    parser.add_argument("--data-dir", help="folder of tfds: data sets")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="of a turn (default: %(default)s)")
    parser.add_argument("--first-pass", action="store_true", help="measure that one, not the second")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: %(default)s)")
    options = parser.parse_args()

    from model import machine

    from shufflenet_jax import environment

    environment.enable_compilation_cache()
    environment.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        config, source = small_images(options, Path(folder))
        skipped = 0 if options.first_pass else len(source) // config.batch_size + 1
        decoding = 1000 * seconds_to_decode(source, config, skipped)
        turns = list(measure(source, config, options, skipped))
    whole, bare, own = (1000 * statistics.median(column) for column in zip(*turns, strict=True))
    cost = statistics.median(100 * (loop / alone - 1) for loop, alone, _ in turns)
    print(
        f"{machine()}; {options.width}x, 32 x 32 pixels, batches of {options.batch_size}; medians of {options.rounds}\n"
    )
    print(
        "| the loop, ms per step | bare step, ms | cost of the loop | its own thread, ms | decoding on one core, ms |"
    )
    print(f"|{' --- |' * 5}")
    print(f"| {whole:.0f} | {bare:.0f} | {cost:.1f} % | {own:.1f} ({100 * own / bare:.1f} %) | {decoding:.1f} |")
    return 0


def small_images(options: argparse.Namespace, folder: Path) -> "tuple[TrainConfig, Source]":
    """Return the settings and the data of the training.

    Args:
      options: of the command line.
      folder: for random images.
    """
    from shufflenet_jax.data.sources import open_source
    from shufflenet_jax.recipes import PRESETS

    names = ("data_dir", "width", "batch_size")
    changes = {"data": str(options.data or random_images(folder)), **{name: getattr(options, name) for name in names}}
    config = dataclasses.replace(PRESETS["cifar10"], **changes)
    return config, open_source(config.data, "train", data_dir=config.data_dir)


def seconds_to_decode(source: "Source", config: "TrainConfig", skipped: int, batches: int = 100) -> float:
    """Return the seconds of one core to read, decode and shift a batch while nothing else runs.

    Args:
      source: the data.
      config: the settings.
      skipped: batches that do not count.
      batches: to measure.
    """
    from shufflenet_jax.data.pipeline import train_batches

    found = iter(train_batches(source, config, stop_step=skipped + batches, threads=1))
    for _ in range(skipped):
        next(found)
    start = time.process_time()
    for _ in found:
        pass
    return (time.process_time() - start) / batches


def measure(
    source: "Source", config: "TrainConfig", options: argparse.Namespace, skipped: int
) -> Iterator[tuple[float, ...]]:
    """Yield the seconds per step of each turn: in the loop, on a waiting batch, and of the loop's own thread.

    Args:
      source: the data.
      config: the settings.
      options: of the command line.
      skipped: batches that do not count.
    """
    import jax

    from shufflenet_jax import checkpoint, parallel
    from shufflenet_jax.batch_groups import Epoch
    from shufflenet_jax.model import init_variables
    from shufflenet_jax.training import loop
    from shufflenet_jax.training.logs import Meter
    from shufflenet_jax.training.state import create_state
    from shufflenet_jax.training.step import Constants, train_step

    epoch = Epoch(len(source), parallel.plan_for_devices(config))
    module = checkpoint.module_of(loop.describe_model(config, source))
    step_fn = parallel.map_train_step(partial(train_step, module, config, epoch))
    state = parallel.replicate(create_state(module, config, epoch, init_variables(module)))
    steps = 1 + options.rounds * (BUFFERED + options.steps)
    if steps >= epoch.steps:
        raise SystemExit("error: more steps than a pass has, whose last batch is another program")
    batches, meter = loop.fed_batches(source, config, epoch, 0, skipped + steps), Meter()
    for _ in range(skipped):
        next(batches)
    ready = next(batches)
    start = own = 0.0
    state, _ = jax.block_until_ready(step_fn(state, ready, Constants()))
    for _ in range(options.rounds):
        time.sleep(REST)
        for number in range(BUFFERED + options.steps):
            if number == BUFFERED:
                jax.block_until_ready(state)
                start = time.perf_counter()
            state, _ = step_fn(state, ready, Constants())
        jax.block_until_ready(state)
        alone = time.perf_counter() - start

        for number in range(BUFFERED + options.steps):
            if number == BUFFERED:
                jax.block_until_ready(state)
                meter.restart()
                own, start = time.thread_time(), time.perf_counter()
            state, metrics = step_fn(state, next(batches), Constants())
            meter.add(number, metrics, config.batch_size)
        meter.take()
        own = time.thread_time() - own
        jax.block_until_ready(state)
        turn = time.perf_counter() - start, alone, own
        yield tuple(seconds / options.steps for seconds in turn)


def random_images(folder: Path) -> Path:
    """Fill a folder with 25,600 small images in ten classes, and return it.

    Args:
      folder: its path.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(25_600):
        place = folder / f"train/{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return folder


if __name__ == "__main__":
    sys.exit(main())
