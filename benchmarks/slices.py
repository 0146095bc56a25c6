"""The costs of a training step of every preset on TPU slices and H100s that are not here: the table of docs/hosts.md.

    python benchmarks/slices.py --json slices.json

compiles each preset's step for each slice, as `train.py --config PRESET --compile-for SLICE` does, and prints the
table. It takes minutes for each row; rows in the JSON file are not compiled again. It needs `pip install 'jax[tpu]'
'jax[cuda13]'`, best in a separate environment.
"""

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["JAX_PLATFORMS"] = "cpu"  # JAX does not look for accelerators on a machine without them.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # Compile times must not be those of the cache.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

from shufflenet_jax.errors import InputError
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.slices import find_slice
from shufflenet_jax.training.ahead import TooLargeError, compile_ahead

SLICES = ("v5e:2x2", "v5e:4x8", "v5e:16x16", "v6e:4x4", "h100:1x8", "h100:4x8")
COLUMNS = {
    "preset": "preset",
    "slice": "slice",
    "devices": "devices",
    "images": "images on each",
    "fits": "fits",
    "memory": "GB on each",
    "collectives": "collectives",
    "exchanged": "MB exchanged",
    "touched": "MB touched per image",
    "seconds": "s to compile",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="store the rows in this file, and reuse the rows in it")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS, help="only these")
    parser.add_argument("--slices", nargs="+", default=SLICES, metavar="SLICE", help="only these")
    options = parser.parse_args()
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name in options.slices:
        for preset in options.presets:
            if f"{preset} {name}" not in rows:
                rows[f"{preset} {name}"] = row_of(preset, name)
                print(rows[f"{preset} {name}"], file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"jax {version('jax')}, libtpu {version('libtpu')}\n")
    print("| " + " | ".join(COLUMNS.values()) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for preset in options.presets:
        for name in options.slices:
            print("| " + " | ".join(rows[f"{preset} {name}"].get(column, "") for column in COLUMNS) + " |")


def row_of(preset: str, name: str) -> dict[str, str]:
    """Return {column: text} of a preset on a slice.

    Args:
      preset: a key of PRESETS.
      name: of the slice.
    """
    target = find_slice(name)
    row = {"preset": f"`{preset}`", "slice": f"`{name}`", "devices": str(len(target.devices))}
    try:
        step = compile_ahead(PRESETS[preset], target)
    except InputError as error:
        return row | {"images": f"refused: {error}"}
    except TooLargeError:
        return row | {"fits": "no"}
    plan, total = step.epoch.plan, step.counts.total
    kinds = ", ".join(f"{kind} {exchange.number}" for kind, exchange in step.counts.collectives.items())
    return row | {
        "images": f"{plan.parts} x {plan.device_batch}" if plan.parts > 1 else str(plan.device_batch),
        "fits": "yes" if sum(step.memory) <= target.memory else "no",
        "memory": f"{sum(step.memory) / 1e9:.2f} of {target.memory / 1e9:.1f}",
        "collectives": f"{total.number} ({kinds})",
        "exchanged": f"{total.size / 1e6:.1f}",
        "touched": f"{step.touched_per_image / 1e6:.1f}",
        "seconds": f"{step.seconds:.0f}",
    }


if __name__ == "__main__":
    main()
