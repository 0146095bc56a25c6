"""The needs of training ImageNet with `in1k` on 8, 32 or 256 devices, computed from two measured rates.

    python benchmarks/input_pipeline.py --data FOLDER --json input.json
    python benchmarks/scaling.py --input input.json --device-rate 2000

The first rate is the images per second that one core prepares, the second those that one device trains on: the
`images_per_second` of a short run on your device. The table goes to stdout.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

from shufflenet_jax.batch_groups import Epoch, plan_batch
from shufflenet_jax.data.sources import KNOWN_SIZES
from shufflenet_jax.model import ShuffleNetV2, variable_shapes
from shufflenet_jax.parallel import ACCELERATOR_ROWS
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.training.schedule import count_steps

DEVICES = (8, 32, 256)
CONTENDERS = {"exact": "ours, exact, threads", "fast": "ours, fast, threads"}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="the --json of benchmarks/input_pipeline.py")
    parser.add_argument("--device-rate", type=float, required=True, help="images per second that one device trains on")
    options = parser.parse_args()
    record = json.loads(options.input.read_text())
    columns = [needs(count, options.device_rate, record) for count in DEVICES]
    print(f"input rates: {record['machine']}; {options.device_rate:,.0f} images per second on each device\n")
    print("| | " + " | ".join(f"{count} devices" for count in DEVICES) + " |")
    print("| --- " * (len(DEVICES) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


def needs(devices: int, device_rate: float, record: Mapping[str, Any]) -> dict[str, str]:
    """Return {what: how much} for a number of devices.

    Args:
      devices: their number.
      device_rate: images per second that one device trains on.
      record: the JSON of benchmarks/input_pipeline.py.
    """
    config = PRESETS["in1k"]
    plan = plan_batch(config.batch_size, config.bn_group_size, devices, most=ACCELERATOR_ROWS)
    epoch = Epoch(KNOWN_SIZES[config.data], plan)
    steps = count_steps(config, epoch)
    rate = devices * device_rate
    each = plan.device_batch * plan.parts
    sharing = plan.group // plan.device_batch if plan.device_batch < plan.group else 1
    shared = f"a group on {sharing} devices" if sharing > 1 else f"{each // plan.group} group(s) each"
    reduced = bytes_reduced(devices)
    figures = {
        "images of a step on each, batch norm's groups of 64": f"{each}, {shared}",
        "images per second": f"{rate:,.0f}",
        "steps per second": f"{rate / config.batch_size:.1f}",
        "steps, whole run": f"{steps:,}",
        "hours, whole run": f"{steps * config.batch_size / rate / 3600:.1f}",
        "each device sends to average 1.0x in float32, MB per step": f"{reduced / 1e6:.1f}",
        "and MB/s": f"{reduced / 1e6 * rate / config.batch_size:,.0f}",
    }
    for where, size in record["bytes_per_image"].items():
        figures[f"bytes read, MB/s, {where}"] = f"{rate * size / 1e6:,.0f}"
        for kind, contender in CONTENDERS.items():
            (row,) = (r for r in record["rows"] if (r["contender"], r["set"]) == (contender, where))
            figures[f"cores for input, all hosts, {where}, {kind}"] = (
                f"{math.ceil(rate / statistics.median(row['images_per_second'])):,}"
            )
    return figures


def bytes_reduced(devices: int) -> float:
    """Return the bytes that a device sends in a ring all-reduce of gradients and running statistics, in float32.

    Args:
      devices: their number.
    """
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(ShuffleNetV2())))
    return 2 * (devices - 1) / devices * size


if __name__ == "__main__":
    main()
