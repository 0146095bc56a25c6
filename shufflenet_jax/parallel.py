"""Steps over all devices: the only file that says pmap.

The state has no device axis: `None` in pmap's axes broadcasts it in and hands one copy back. Nothing checks that the
copies agree (a forgotten mean raises nothing), which is why the tests compare them.
"""

from collections import deque

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .rows import AXIS, plan_layout

# Images of 224 x 224 that a device trains on at a time: activations take some 30 MB each.
CPU_ROWS, ACCELERATOR_ROWS = 64, 256


def replicate(tree, devices=None):
    """A tree of arrays with one copy on each device, ready for the steps below."""
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def map_train_step(step, devices=None):
    """`step(state, batch, fixed) -> (state, metrics)` of one device, as one call on a batch from `feed`.

    The step itself averages over AXIS. The state given is used up: only the one returned is valid afterwards; what is
    fixed can be given again.
    """
    return jax.pmap(step, AXIS, in_axes=(None, 0, None), out_axes=None, devices=devices, donate_argnums=0)


def plan_batch(config, devices=None):
    """The Layout of a TrainConfig's batches on the devices. Raises InputError if they cannot share them."""
    count = len(devices or jax.devices())
    most = rows_that_fit(config.image_size)
    return plan_layout(config.batch_size, config.bn_group_size, count, parts=config.accumulate, most=most)


def rows_that_fit(image_size):
    """How many images of a size, in pixels, a device should train on at a time."""
    rows = CPU_ROWS if jax.default_backend() == "cpu" else ACCELERATOR_ROWS
    return max(1, int(rows * (224 / image_size) ** 2))


def feed(batches, layout, devices=None, *, ahead=2):
    """Host batches, {name: (B, ...)}, as {name: (devices, parts, rows, ...)} on the devices, copied ahead of use."""
    devices = devices or jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def dealt(column):
        return column.reshape(layout.parts, len(devices), layout.rows, *column.shape[1:]).swapaxes(0, 1)

    waiting = deque()
    for batch in batches:
        waiting.append(jax.device_put({key: dealt(column) for key, column in batch.items()}, sharding))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def map_eval_step(step, devices=None):
    """`step(variables, batch) -> (sums, rows)` of one device, as one call on a whole batch of any size.

    Sums are added over the devices; rows come back as (devices, ceil(B / devices), ...), those of the padding last.
    """
    count = len(devices or jax.local_devices())

    def summed(variables, batch):
        sums, rows = step(variables, batch)
        return jax.lax.psum(sums, AXIS), rows

    mapped = jax.pmap(summed, AXIS, in_axes=(None, 0), out_axes=(None, 0), devices=devices)

    def on_all_devices(variables, batch):
        missing = -len(batch["labels"]) % count
        padded = {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}
        return mapped(variables, _split(padded, count))

    return on_all_devices


def _split(batch, count):
    """(B, ...) arrays as (devices, B / devices, ...)."""
    return {key: value.reshape(count, -1, *value.shape[1:]) for key, value in batch.items()}
