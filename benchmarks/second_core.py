"""The effect of a second core on one image: microseconds of the right branch of a unit, and of the whole network.

    python benchmarks/second_core.py

The network runs in the deployed form, and in ONNX Runtime with one thread and with two. The branch is two matrix
products with a depthwise convolution between them, here as XLA runs it in that form, which shares the larger loops
between threads; with no loop shared; and in two ways to share the products: their rows in ten pieces, because XLA hands
operations to another thread only when more than eight of them are ready; and half of the image's rows on each of two
devices, which exchange one where the depthwise convolution needs it.
Medians over the rounds; tables go to stdout.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from model import jax_inference, machine, median_seconds, onnx_inference  # It puts the package on the path.

from shufflenet_jax.deploy import VECTOR
from shufflenet_jax.lowerings import direct

Call = Callable[[], object]
Layer = Callable[[jax.Array, jax.Array], jax.Array]

UNITS = 10  # One after the other, in one call.
PIECES = 10
UNSHARED = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}  # The pass that splits loops between threads.
STAGES = {"stage 2": (28, 58), "stage 3": (14, 116), "stage 4": (8, 232)}  # Pixels a side (an even number), channels.


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1, help="measured time of a run (default: %(default)s)")
    options = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", 2)
    calls = {stage: contenders(*size) for stage, size in STAGES.items()} | {"network": whole_networks()}
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for stage, kinds in calls.items():
            for kind, call in kinds.items():
                found.setdefault((stage, kind), []).append(1e6 * median_seconds(call, options.seconds))

    print(f"{machine()}; microseconds, median of {options.rounds} alternating runs\n")
    print("| whole network, one image | microseconds |\n| --- | --- |")
    for kind in calls["network"]:
        print(f"| {kind} | {statistics.median(found['network', kind]):.0f} |")
    print()
    names = list(calls["stage 2"])
    print(f"| right branch of a unit | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    for stage, (side, channels) in STAGES.items():
        times = " | ".join(f"{statistics.median(found[stage, kind]) / UNITS:.0f}" for kind in names)
        print(f"| {stage}, {side} x {side} pixels, {channels} channels | {times} |")
    return 0


def whole_networks() -> dict[str, Call]:
    """Return {kind: a function that computes the logits of an image}."""
    size = 1, "float32", 224, 1.0
    with tempfile.TemporaryDirectory() as folder:
        onnx = partial(onnx_inference, "ONNX Runtime", *size, Path(folder))
        return {
            "ours": jax_inference("ours", *size, None),
            "ONNX Runtime, one thread": onnx(threads=1),
            "ONNX Runtime, two threads": onnx(threads=2),
        }


def contenders(side: int, channels: int) -> dict[str, Call]:
    """Return {kind: a function that computes all units}.

    Args:
      side: of the image, in pixels.
      channels: of the branch.
    """
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, side, side, channels)).astype("f4")
    products = rng.normal(scale=channels**-0.5, size=(UNITS, 2, 1, 1, channels, channels + -channels % VECTOR))
    weights = list(zip(products.astype("f4"), rng.normal(size=(UNITS, 3, 3, 1, channels)).astype("f4"), strict=True))

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.nn.relu(direct.conv(x, kernel)[..., :channels])

    def in_pieces(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = x.reshape(-1, 1, 1, channels)
        cuts = [len(rows) * piece // PIECES for piece in range(1, PIECES)]
        return jnp.concatenate([product(piece, kernel) for piece in jnp.split(rows, cuts)]).reshape(x.shape)

    def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return direct.conv(x, kernel, groups=channels)

    def with_the_neighbours_row(x: jax.Array, kernel: jax.Array) -> jax.Array:
        upper = jax.lax.axis_index("halves") == 0
        row = jax.lax.ppermute(jnp.where(upper, x[:, -1:], x[:, :1]), "halves", [(0, 1), (1, 0)])
        nothing = jnp.zeros_like(row)
        x = jnp.concatenate([jnp.where(upper, nothing, row), x, jnp.where(upper, row, nothing)], 1)
        return depthwise(x, kernel)[:, 1:-1]

    def units(product: Layer, depthwise: Layer, x: jax.Array, weights: list[Any]) -> jax.Array:
        for products, kernel in weights:
            x = product(depthwise(product(x, products[0]), kernel), products[1])
        return x

    mesh = jax.make_mesh((2,), ("halves",), axis_types=(jax.sharding.AxisType.Auto,))
    halves, everywhere = PartitionSpec(None, "halves"), PartitionSpec()
    shardings = NamedSharding(mesh, halves), NamedSharding(mesh, everywhere)
    on_one, on_two = jax.device_put((image, weights), jax.devices()[0]), jax.device_put((image, weights), shardings)

    shared = partial(units, product, with_the_neighbours_row)
    whole = partial(units, product, depthwise)
    halved = jax.shard_map(shared, mesh=mesh, in_specs=(halves, everywhere), out_specs=halves)
    compiled = {
        "whole": (jax.jit(whole), on_one),
        "no loop shared": (jax.jit(whole, compiler_options=UNSHARED), on_one),
        "products in ten pieces": (jax.jit(partial(units, in_pieces, depthwise)), on_one),
        "half on each of two devices": (jax.jit(halved), on_two),
    }
    expected, *others = (np.asarray(function(*arrays)) for function, arrays in compiled.values())
    for other in others:
        np.testing.assert_allclose(other, expected, atol=1e-5 * expected.max())  # The same sums, in another order.
    return {kind: partial(run, *both) for kind, both in compiled.items()}


def run(function: Callable[..., jax.Array], arrays: tuple[Any, ...]) -> None:
    """Call a function, and wait for its result.

    Args:
      function: to call.
      arrays: its arguments.
    """
    jax.block_until_ready(function(*arrays))


if __name__ == "__main__":
    sys.exit(main())
