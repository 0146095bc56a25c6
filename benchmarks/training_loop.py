"""What the host costs a training: train.py's loop beside the same steps on a batch that lies ready on the device.

    python benchmarks/training_loop.py [--data tfds:NAME --data-dir DIR]

Preset cifar10. The loop reads, decodes, shifts and copies images, moves the progress bar and keeps the metrics; the
steps alone do none of it. Both go on with the same training, some steps each in turn: the steps alone once the decoding
threads have filled their buffers and rest, the loop once it has emptied these, so that it pays for each batch that it
takes. A turn of the loop ends with a line of the log, which train.py has every 100 steps. On a CPU the decoding threads
compete with the step for the cores, which counts as cost here; on an accelerator they do not. The time that the loop's
own thread computes, decoding left out, is told beside it.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

BUFFERED = 8  # Steps after which no batch is left that was decoded before: Grain and `feed` keep fewer.
REST = 3  # Seconds in which the decoding threads fill their buffers.


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as train.py takes it (default: random images, written as PNG)")
    parser.add_argument("--data-dir", help="where tfds: data sets lie")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="of a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: %(default)s)")
    options = parser.parse_args()

    from model import machine

    from shufflenet_jax import cli

    cli.use_compilation_cache()
    cli.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        turns = list(measure(options, Path(folder)))
    whole, bare, own = (1000 * statistics.median(column) for column in zip(*turns, strict=True))
    cost = statistics.median(100 * (loop / alone - 1) for loop, alone, _ in turns)
    print(
        f"{machine()}; {options.width}x, 32 x 32 pixels, batches of {options.batch_size}; medians of {options.rounds}\n"
    )
    print(
        "| the loop, ms a step | the step alone, ms | the loop costs | its own thread, ms |\n| --- | --- | --- | --- |"
    )
    print(f"| {whole:.0f} | {bare:.0f} | {cost:.1f} % | {own:.1f} ({100 * own / bare:.1f} %) |")
    return 0


def measure(options, folder):
    """Seconds a step of each turn: in the loop, on a batch that lies ready, and computed by the loop's own thread."""
    import jax

    from shufflenet_jax import checkpoint, parallel
    from shufflenet_jax.commands import train
    from shufflenet_jax.config import PRESETS
    from shufflenet_jax.data.sources import open_source
    from shufflenet_jax.logs import Meter
    from shufflenet_jax.model import init_variables
    from shufflenet_jax.rows import Epoch
    from shufflenet_jax.training import create_state, train_step

    names = ("data_dir", "width", "batch_size")
    changes = {"data": str(options.data or random_images(folder)), **{name: getattr(options, name) for name in names}}
    config = dataclasses.replace(PRESETS["cifar10"], **changes)
    source = open_source(config.data, "train", data_dir=config.data_dir)
    epoch = Epoch(len(source), parallel.plan_batch(config))
    module = checkpoint.module_of(train.describe(config, source))
    step_fn = parallel.map_train_step(partial(train_step, module, config, epoch))
    state = parallel.replicate(create_state(module, config, epoch, init_variables(module)))
    steps = 1 + options.rounds * (BUFFERED + options.steps)
    if steps >= epoch.steps:
        raise SystemExit("error: more steps than a pass has, whose last batch is another program")
    batches, meter = train.fed_batches(source, config, epoch, 0, steps), Meter()
    ready = next(batches)
    state, _ = jax.block_until_ready(step_fn(state, ready, {}))
    for _ in range(options.rounds):
        time.sleep(REST)
        start = time.perf_counter()
        for _ in range(options.steps):
            state, _ = step_fn(state, ready, {})
        jax.block_until_ready(state)
        alone = time.perf_counter() - start

        for number in range(BUFFERED + options.steps):
            if number == BUFFERED:
                jax.block_until_ready(state)
                meter.restart()
                own, start = time.thread_time(), time.perf_counter()
            state, metrics = step_fn(state, next(batches), {})
            meter.add(number, metrics, config.batch_size)
        meter.take()
        own = time.thread_time() - own
        jax.block_until_ready(state)
        turn = time.perf_counter() - start, alone, own
        yield tuple(seconds / options.steps for seconds in turn)


def random_images(folder):
    """Fills a folder with 25,600 small images in ten classes."""
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
