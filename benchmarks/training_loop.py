"""What the host costs a training: train.py's loop beside the same steps on a batch that lies ready on the device.

    python benchmarks/training_loop.py [--data tfds:NAME --data-dir DIR]

Preset cifar10. The loop reads, decodes, shifts and copies images, moves the progress bar, keeps the metrics and writes
a line of the log every 100 steps; the steps alone do none of it. Both take turns in one process. On a CPU the decoding
threads compete with the step for the cores, which counts as cost of the host here; on an accelerator they do not.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as train.py takes it (default: random images, written as PNG)")
    parser.add_argument("--data-dir", help="where tfds: data sets lie")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: %(default)s)")
    options = parser.parse_args()

    from model import machine

    from shufflenet_jax import cli

    cli.use_compilation_cache()
    cli.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        loop, alone = contenders(options, Path(folder))
        loop(), alone()  # Compiles.
        found = {loop: [], alone: []}
        for _ in range(options.rounds):
            for contender, seconds in found.items():
                start = time.perf_counter()
                contender()
                seconds.append((time.perf_counter() - start) / options.steps)
    costs = [100 * (a / b - 1) for a, b in zip(*found.values(), strict=True)]
    whole, bare = (1000 * statistics.median(seconds) for seconds in found.values())
    print(
        f"{machine()}; {options.width}x, 32 x 32 pixels, batches of {options.batch_size}; medians of {options.rounds}\n"
    )
    print("| the loop, ms a step | the step alone, ms | the host costs | images/s |\n| --- | --- | --- | --- |")
    rate = options.batch_size / whole * 1000
    print(f"| {whole:.1f} | {bare:.1f} | {statistics.median(costs):.1f} % | {rate:.0f} |")
    return 0


def contenders(options, folder):
    """Two functions that train for `steps` steps: with all that train.py does, and on one batch."""
    import jax

    from shufflenet_jax import checkpoint, parallel
    from shufflenet_jax.commands import train
    from shufflenet_jax.config import PRESETS
    from shufflenet_jax.data.pipeline import train_batches
    from shufflenet_jax.data.sources import open_source
    from shufflenet_jax.logs import Meter, MetricsLog
    from shufflenet_jax.model import init_variables
    from shufflenet_jax.rows import Epoch
    from shufflenet_jax.training import create_state, train_step

    data = options.data or random_images(folder / "images")
    config = dataclasses.replace(
        PRESETS["cifar10"],
        data=str(data),
        data_dir=options.data_dir,
        width=options.width,
        batch_size=options.batch_size,
    )
    source = open_source(config.data, "train", data_dir=config.data_dir)
    epoch = Epoch(len(source), parallel.plan_batch(config))
    module = checkpoint.module_of(train.describe(config, source))
    step_fn = parallel.map_train_step(partial(train_step, module, config, epoch))
    state = parallel.replicate(create_state(module, config, epoch, init_variables(module)))
    steps = min(options.steps, epoch.steps - 1)
    assert steps == options.steps, "more steps than an epoch has would compile another program for its last batch"

    def loop():
        nonlocal state
        batches = train_batches(source, config, epoch.layout, stop_step=steps)
        batches = parallel.feed(train.without_damage(batches, config, len(source)), epoch.layout)
        meter = Meter()
        with MetricsLog(folder, last_step=0) as log:
            report = train.make_report(config, log, epoch)
            for step, batch in enumerate(train.shown(batches, epoch, 0, steps), start=1):
                state, metrics = step_fn(state, batch, {})
                meter.add(step, metrics, epoch.images(step - 1))
                if step % config.log_every == 0:
                    report(step, "train", meter.take())
        jax.block_until_ready(state.params)

    first = next(iter(train_batches(source, config, epoch.layout, stop_step=1)))
    first.pop("damaged")
    (fed,) = parallel.feed([first], epoch.layout)

    def alone():
        nonlocal state
        for _ in range(steps):
            state, _ = step_fn(state, fed, {})
        jax.block_until_ready(state.params)

    return loop, alone


def random_images(folder):
    """A folder of 12,800 small images in ten classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(12_800):
        place = folder / f"train/{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return folder


if __name__ == "__main__":
    sys.exit(main())
