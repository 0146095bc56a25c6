"""The rows of a training batch: which share batch statistics, and how devices divide them.

A batch of B images has B / n groups of n rows each, however many devices there are; batch norm takes its statistics
over a group, as each GPU of the published runs did. A device takes several whole groups, or several take one together.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import lax

from .errors import InputError

AXIS = "devices"  # Over which the steps of all devices are averaged.


@struct.dataclass
class Rows:
    """What batch norm must know of the rows that a device holds; by default they are one group, all of them real."""

    # Rows of a group on this device; None: all that it holds.
    size: int | None = struct.field(pytree_node=False, default=None)
    # Devices that hold a group together, a tuple of their places along AXIS for each group; None: one alone.
    spans: Any = struct.field(pytree_node=False, default=None)
    # (N,), 1 for real rows and 0 for padding; None: all are real.
    mask: Any = None
    # (N,), their places in the whole batch, which random numbers go by; None: from 0 on.
    places: Any = None

    def totals(self, values, axis):
        """Values of each image, along an axis, as the sums over the real images of its group, again for each image."""
        if self.mask is not None:
            values = values * jnp.expand_dims(self.mask.astype(values.dtype), 1 - axis % 2)
        count = values.shape[axis]
        size = self.size or count
        axis %= values.ndim
        split = (*values.shape[:axis], count // size, size, *values.shape[axis + 1 :])
        sums = values.reshape(split).sum(axis + 1, keepdims=True)
        if self.spans:
            sums = lax.psum(sums, AXIS, axis_index_groups=self.spans)
        return jnp.broadcast_to(sums, split).reshape(values.shape)

    def moments(self, x, axis):
        """Mean, biased variance and number of values, channel by channel, in the group of each image.

        Args:
          x: (B, H, W, C), with axis 0, or (C, H, W, B), with axis 1: where the images lie in what is left.
          axis: that one.
        Returns:
          (B, C) or (C, B) for both; the number is one for all groups or, with padding, has that shape too.
        """
        pixels, sums = x.shape[1] * x.shape[2], x.sum((1, 2))
        if self.mask is None:
            count = pixels * (self.size or sums.shape[axis]) * (len(self.spans[0]) if self.spans else 1)
        else:
            count = self.totals(jnp.full_like(sums, pixels), axis)
        mean = self.totals(sums, axis) / count
        var = self.totals(jnp.square(x - mean[:, None, None]).sum((1, 2)), axis) / count
        return mean, var, count

    def following(self, values):
        """(N, ...): of each row the next one of its group; of the last one, and the last before padding, the first."""
        groups = values.reshape(-1, self.size or len(values), *values.shape[1:])
        first = groups[:, :1]
        if self.spans:
            first = lax.ppermute(first, AXIS, [(span[i], span[i - 1]) for span in self.spans for i in range(len(span))])
        return jnp.concatenate([groups[:, 1:], first], axis=1).reshape(values.shape)

    @property
    def plain(self):
        """Whether all rows are one group of this device alone, which needs no bookkeeping."""
        return self.size is None and self.spans is None and self.mask is None


@dataclass(frozen=True)
class Layout:
    """How the rows of each batch lie on the devices.

    A batch is taken in `parts`, one after another; each part is dealt out over the devices in order, `rows` to each.
    """

    batch_size: int
    group: int  # Rows that share batch statistics.
    devices: int  # Over all hosts.
    parts: int

    @property
    def rows(self):
        """Rows of a part on one device."""
        return self.batch_size // (self.parts * self.devices)

    @property
    def groups(self):
        return self.batch_size // self.group

    def rows_of(self, part, device, mask=None):
        """The Rows of a part on a device."""
        places = (part * self.devices + device) * self.rows + jnp.arange(self.rows)
        if self.rows >= self.group:
            return Rows(size=None if self.rows == self.group else self.group, mask=mask, places=places)
        together = self.group // self.rows
        spans = tuple(tuple(range(first, first + together)) for first in range(0, self.devices, together))
        return Rows(spans=spans, mask=mask, places=places)


@dataclass(frozen=True)
class Epoch:
    """The steps of a pass over the data. Its last batch is what is left, in equal shares for all groups.

    As PyTorch's samplers do it, the data is filled up by a few repeats until the groups can share it.
    """

    size: int  # Examples in the data.
    layout: Layout

    @property
    def padded(self):
        return -(-self.size // self.layout.groups) * self.layout.groups

    @property
    def steps(self):
        return -(-self.padded // self.layout.batch_size)

    @property
    def left(self):
        """Rows of the last step, all groups together."""
        return self.padded - (self.steps - 1) * self.layout.batch_size

    @property
    def share(self):
        """Rows of the last step in each group."""
        return self.left // self.layout.groups

    def images(self, step):
        """Rows of a step of the run, padding left out."""
        return self.left if (step + 1) % self.steps == 0 else self.layout.batch_size

    def images_before(self, step):
        """Rows of all steps before one of the run, padding left out."""
        return step // self.steps * self.padded + step % self.steps * self.layout.batch_size

    def find(self, step, row):
        """(epoch, place in it, whether the row is real or None where all are) of a row of a step of the run.

        Groups take turns, as the GPUs of PyTorch's samplers do, so that repeats of an image go to different ones.
        """
        epoch, number = divmod(step, self.steps)
        full = self.images(step) == self.layout.batch_size
        share = self.layout.group if full else self.share
        group, slot = divmod(row, self.layout.group)
        # Padding goes through its group's images again: nothing depends on it, but the last one has a next one.
        place = number * self.layout.batch_size + slot % share * self.layout.groups + group
        return epoch, place, None if full else slot < share


def plan_layout(batch_size, group, devices, *, parts=0, most=None):
    """The Layout of a batch.

    Args:
      batch_size: images of a step.
      group: rows that share batch statistics; 0, or more than there are: all of them.
      devices: over all hosts.
      parts: in which to take the batch; 0: as few as keep a device's rows at most `most`.
    Raises:
      InputError: groups and devices do not divide the batch.
    """
    group = min(group or batch_size, batch_size)
    if batch_size % group:
        raise InputError(f"batch_size is {batch_size}, but must be a multiple of bn_group_size, {group}")

    def fits(parts):
        rows, rest = divmod(batch_size, parts * devices)
        return rows and not rest and (rows % group == 0 or (group % rows == 0 and devices % (group // rows) == 0))

    possible = [count for count in ([parts] if parts else range(1, batch_size + 1)) if fits(count)]
    if not possible:
        told = f"accumulate {parts} and the" if parts else "the"
        raise InputError(
            f"batch_size is {batch_size}, but must be a multiple of {told} {devices} devices, each of which takes "
            f"whole groups of {group} (bn_group_size) or an equal share of one"
        )
    small = [count for count in possible if most is None or batch_size <= count * devices * most]
    # Where groups set a limit, a device takes more than wanted rather than none.
    return Layout(batch_size, group, devices, small[0] if small else possible[-1])
