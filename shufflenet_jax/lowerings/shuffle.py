"""Rearrangements of channels, the same in every lowering."""

import jax.numpy as jnp


def channel_shuffle(x, groups=2, *, axis=-1):
    """Interleave the channel groups: channel `g * C/groups + c` moves to `c * groups + g`."""
    axis %= x.ndim
    before, channels, behind = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = x.reshape(*before, groups, channels // groups, *behind)
    return jnp.swapaxes(x, axis, axis + 1).reshape(*before, channels, *behind)


def split_even_odd(x, *, axis=-1):
    """Return the even and the odd channels: Megvii's shuffle, which comes before the branches."""
    axis %= x.ndim
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    return jnp.take(pairs, 0, axis + 1), jnp.take(pairs, 1, axis + 1)


def split(x, *, even_odd, axis=-1):
    """Return what the left and the right branch of a unit take: halves, or the even and the odd channels."""
    return split_even_odd(x, axis=axis) if even_odd else jnp.split(x, 2, axis=axis)


def join(left, right, *, shuffled, axis=-1):
    """Join what the branches of a unit return; `shuffled` interleaves their channels."""
    x = jnp.concatenate([left, right], axis=axis)
    return channel_shuffle(x, axis=axis) if shuffled else x
