"""What training ImageNet with `in1k` asks of a machine with 8, 32 or 256 devices: computed, from two measured rates.

    python benchmarks/input_pipeline.py --data FOLDER --json input.json
    python benchmarks/scaling.py --input input.json --device-rate 2000

The first rate is how many images a second one core prepares; the second how many one device trains on, which the
`images_per_second` of a short run on yours tells. The table goes to stdout.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="the --json of benchmarks/input_pipeline.py")
    parser.add_argument("--device-rate", type=float, required=True, help="images a second that one device trains on")
    options = parser.parse_args()
    record = json.loads(options.input.read_text())
    columns = [needs(count, options.device_rate, record) for count in DEVICES]
    print(f"input rates: {record['machine']}; {options.device_rate:,.0f} images a second on each device\n")
    print("| | " + " | ".join(f"{count} devices" for count in DEVICES) + " |")
    print("| --- " * (len(DEVICES) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


def needs(devices, device_rate, record):
    """{what: how much} for a number of devices."""
    config = PRESETS["in1k"]
    plan = plan_batch(config.batch_size, config.bn_group_size, devices, most=ACCELERATOR_ROWS)
    epoch = Epoch(KNOWN_SIZES[config.data], plan)
    steps = count_steps(config, epoch)
    rate = devices * device_rate
    each = plan.device_batch * plan.parts
    sharing = plan.group // plan.device_batch if plan.device_batch < plan.group else 1
    shared = f"a group on {sharing} devices" if sharing > 1 else f"{each // plan.group} group(s) each"
    reduced = bytes_reduced(devices)
    found = {
        "images of a step on each, batch norm's groups of 64": f"{each}, {shared}",
        "images a second": f"{rate:,.0f}",
        "steps a second": f"{rate / config.batch_size:.1f}",
        "steps, whole run": f"{steps:,}",
        "hours, whole run": f"{steps * config.batch_size / rate / 3600:.1f}",
        "each device sends to average 1.0x in float32, MB a step": f"{reduced / 1e6:.1f}",
        "and MB/s": f"{reduced / 1e6 * rate / config.batch_size:,.0f}",
    }
    for where, size in record["bytes_per_image"].items():
        found[f"bytes read, MB/s, {where}"] = f"{rate * size / 1e6:,.0f}"
        for kind, contender in CONTENDERS.items():
            (row,) = (r for r in record["rows"] if (r["contender"], r["set"]) == (contender, where))
            found[f"cores for input, all hosts, {where}, {kind}"] = (
                f"{math.ceil(rate / statistics.median(row['images_per_second'])):,}"
            )
    return found


def bytes_reduced(devices):
    """What a device sends in a ring all-reduce of the gradients and the running statistics, in float32."""
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(ShuffleNetV2())))
    return 2 * (devices - 1) / devices * size


if __name__ == "__main__":
    main()
