"""Batch-norm groups: which examples of a batch share statistics, and how devices divide them.

A batch of B examples has B / n groups of n examples each, however many devices there are. Batch norm takes its
statistics over a group, as each GPU of the published runs did. A device holds several whole groups, or several devices
hold one group together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Shaped

from .errors import InputError
from .shapes import Array, Images

AXIS = "devices"  # The axis over which the steps of all devices are averaged.


@struct.dataclass
class BatchGroups:
    """The examples on one device, as batch norm sees them; by default they are one group, all of them real.

    Attributes:
      size: examples of a group on this device; None means all of them.
      spans: for each group the places along AXIS of the devices that share it; None means that no device shares one.
      mask: (N,), 1 for real examples and 0 for padding; None means that all are real.
      places: (N,), the places of the examples in the whole batch, which seed random numbers; None means from 0 on.
    """

    size: int | None = struct.field(pytree_node=False, default=None)
    spans: tuple[tuple[int, ...], ...] | None = struct.field(pytree_node=False, default=None)
    # Arrays, for which JAX puts other leaves when it transforms a tree.
    mask: Any = None
    places: Any = None

    def totals(self, arrays: Sequence[Array], axis: int) -> list[Array]:
        """Sum values over the real examples of each group; devices that share a group exchange numbers once.

        Args:
          arrays: arrays of one shape with an entry for each example along `axis`, which is one of the last two axes.
          axis: that axis.

        Returns:
          For each array one of the same shape: at each example the sum over its group.
        """
        shape = arrays[0].shape
        count, size = shape[axis], self.size or shape[axis]
        axis %= len(shape)
        split = (*shape[:axis], count // size, size, *shape[axis + 1 :])
        real = (self._without_padding(values, axis) for values in arrays)
        sums = [values.reshape(split).sum(axis + 1, keepdims=True) for values in real]
        if self.spans:
            sums = lax.psum(jnp.stack(sums), AXIS, axis_index_groups=self.spans)
        return [jnp.broadcast_to(values, split).reshape(shape) for values in sums]

    def moments(self, x: Images, axis: int) -> tuple[Array, Array, Array | int]:
        """Return mean, biased variance and number of values, for each channel in the group of each example.

        Args:
          x: (B, H, W, C) with axis 0, or (C, H, W, B) with axis 1.
          axis: where the examples lie once H and W are summed away.

        Returns:
          Mean and variance of shape (B, C) or (C, B). The number is one for all groups, or an array of that shape if
          there is padding.
        """
        if self.spans:
            return self._joint_moments(x, axis)
        pixels, sums = x.shape[1] * x.shape[2], x.sum((1, 2))
        if self.mask is None:
            count = pixels * (self.size or sums.shape[axis])
        else:
            (count,) = self.totals([jnp.full_like(sums, pixels)], axis)
        (total,) = self.totals([sums], axis)
        mean = total / count
        (squares,) = self.totals([jnp.square(x - mean[:, None, None]).sum((1, 2))], axis)
        return mean, squares / count, count

    def _joint_moments(self, x: Images, axis: int) -> tuple[Array, Array, Array | int]:
        """Return the `moments` of a group that several devices share, which exchange numbers once.

        Each device sends its own mean and the sum of squares about it (Chan, Golub and LeVeque, 1979). Squares about
        the mean of all would need that mean first, by a second exchange. Squares about a distant value, like the
        running mean of a fresh network, lose their digits if the mean is large.
        """
        pixels, sums = x.shape[1] * x.shape[2], x.sum((1, 2))
        values = pixels * (sums.shape[axis] if self.mask is None else self.mask.sum())
        mean = self._without_padding(sums, axis).sum(axis, keepdims=True) / jnp.maximum(values, 1)
        squares = self._without_padding(jnp.square(x - mean[:, None, None]).sum((1, 2)), axis)
        sent = [mean, squares.sum(axis, keepdims=True)]
        if self.mask is not None:
            sent.append(jnp.full_like(mean, values))
        received = lax.all_gather(jnp.stack(sent), AXIS, axis_index_groups=self.spans)
        means, squares, *counts = jnp.moveaxis(received, 1, 0)
        values, count = (counts[0], counts[0].sum(0)) if counts else (values, values * len(means))
        mean = (values * means).sum(0) / count
        var = (squares + values * jnp.square(means - mean[None])).sum(0) / count
        mean, var, count = (jnp.broadcast_to(vector, sums.shape) for vector in (mean, var, count))
        return mean, var, count

    def _without_padding(self, values: Array, axis: int) -> Array:
        """Return values with one entry for each example along an axis, with 0 for padding."""
        if self.mask is None:
            return values
        return values * jnp.expand_dims(self.mask.astype(values.dtype), 1 - axis % 2)

    def following(self, values: Shaped[Array, "batch ..."]) -> Shaped[Array, "batch ..."]:
        """Return for each example the value of the next one in its group; the last one takes the first.

        Args:
          values: (N, ...), a value for each example.
        """
        groups = values.reshape(-1, self.size or len(values), *values.shape[1:])
        first = groups[:, :1]
        if self.spans:
            first = lax.ppermute(first, AXIS, [(span[i], span[i - 1]) for span in self.spans for i in range(len(span))])
        return jnp.concatenate([groups[:, 1:], first], axis=1).reshape(values.shape)

    @property
    def single_group(self) -> bool:
        """Whether all examples form one group on this device alone, which needs no bookkeeping."""
        return self.size is None and self.spans is None and self.mask is None


@dataclass(frozen=True)
class BatchPlan:
    """How the examples of each batch are divided over parts and devices.

    A batch is taken in `parts`, one after another. Each part is dealt out over the devices in order.

    Attributes:
      batch_size: examples of a batch.
      group: examples that share batch statistics.
      devices: over all hosts.
      parts: in which the devices take a batch.
    """

    batch_size: int
    group: int
    devices: int
    parts: int

    @property
    def device_batch(self) -> int:
        """Examples of a part on one device."""
        return self.batch_size // (self.parts * self.devices)

    @property
    def groups(self) -> int:
        """Groups of a batch."""
        return self.batch_size // self.group

    def groups_on(self, part: Array | int, device: Array | int, mask: Array | None = None) -> BatchGroups:
        """Return the BatchGroups of a part on a device.

        Args:
          part: number of the part, from 0.
          device: number of the device over all hosts, from 0.
          mask: (N,), 1 for real examples and 0 for padding; None if all are real.
        """
        held = self.device_batch
        places = (part * self.devices + device) * held + jnp.arange(held)
        if held >= self.group:
            return BatchGroups(size=None if held == self.group else self.group, mask=mask, places=places)
        together = self.group // held
        spans = tuple(tuple(range(first, first + together)) for first in range(0, self.devices, together))
        return BatchGroups(spans=spans, mask=mask, places=places)


@dataclass(frozen=True)
class Epoch:
    """The steps of a pass over the data. Its last batch holds what is left, in equal shares for all groups.

    As PyTorch's samplers do, a pass repeats a few examples so that all groups get the same number.

    Attributes:
      size: examples of the data.
      plan: how each batch is divided.
    """

    size: int
    plan: BatchPlan

    @property
    def padded(self) -> int:
        """Examples of a pass, repeats included."""
        return -(-self.size // self.plan.groups) * self.plan.groups

    @property
    def steps(self) -> int:
        """Steps of a pass."""
        return -(-self.padded // self.plan.batch_size)

    @property
    def left(self) -> int:
        """Examples of the last step."""
        return self.padded - (self.steps - 1) * self.plan.batch_size

    @property
    def share(self) -> int:
        """Examples of the last step in each group."""
        return self.left // self.plan.groups

    def images(self, step: int) -> int:
        """Return how many examples a step of the run has, without padding."""
        return self.left if (step + 1) % self.steps == 0 else self.plan.batch_size

    def images_before(self, step: int) -> int:
        """Return how many examples all steps before one of the run have, without padding."""
        return step // self.steps * self.padded + step % self.steps * self.plan.batch_size

    def find(self, step: int, row: int) -> tuple[int, int, bool | None]:
        """Locate a row of a step of the run.

        Groups alternate, as the GPUs of PyTorch's samplers do, so that repeats of an image go to different groups.

        Args:
          step: of the run, from 0.
          row: of the step's batch, from 0.

        Returns:
          (epoch, place in it, whether the row is real, or None if all rows are).
        """
        epoch, number = divmod(step, self.steps)
        full = self.images(step) == self.plan.batch_size
        share = self.plan.group if full else self.share
        group, slot = divmod(row, self.plan.group)
        # Padding repeats images of its group: nothing depends on them, but mixing needs a next image.
        place = number * self.plan.batch_size + slot % share * self.plan.groups + group
        return epoch, place, None if full else slot < share


def plan_batch(batch_size: int, group: int, devices: int, *, parts: int = 0, most: int | None = None) -> BatchPlan:
    """Return the BatchPlan of a batch.

    Args:
      batch_size: examples of a step.
      group: examples that share batch statistics; 0, or more than there are, means all of them.
      devices: over all hosts.
      parts: number of parts of the batch; 0 means as few as keep a device's share at most `most`.
      most: largest number of examples that a device should hold at a time; None sets no limit.

    Raises:
      InputError: groups and devices do not divide the batch.
    """
    group = min(group or batch_size, batch_size)
    if batch_size % group:
        raise InputError(f"batch_size is {batch_size}, but must be a multiple of bn_group_size, {group}")

    def fits(parts: int) -> bool:
        held, rest = divmod(batch_size, parts * devices)
        if not held or rest:
            return False
        return held % group == 0 or (group % held == 0 and devices % (group // held) == 0)

    possible = [count for count in ([parts] if parts else range(1, batch_size + 1)) if fits(count)]
    if not possible:
        divisors = f"accumulate {parts} and the" if parts else "the"
        raise InputError(
            f"batch_size is {batch_size}, but must be a multiple of {divisors} {devices} devices, each of which takes "
            f"whole groups of {group} (bn_group_size) or an equal share of one"
        )
    small = [count for count in possible if most is None or batch_size <= count * devices * most]
    # If the groups allow no smaller share, a device takes more than `most`.
    return BatchPlan(batch_size, group, devices, small[0] if small else possible[-1])
