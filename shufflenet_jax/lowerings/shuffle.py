"""Rearrangements of channels, the same in every lowering."""

import jax.numpy as jnp

from ..shapes import Array


def channel_shuffle(x: Array, groups: int = 2, *, axis: int = -1) -> Array:
    """Interleave the channel groups: channel `g * C/groups + c` moves to `c * groups + g`.

    Args:
      x: array with the channels along `axis`.
      groups: number of groups, which divides the number of channels C.
      axis: where the channels lie.
    """
    axis %= x.ndim
    before, channels, behind = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = x.reshape(*before, groups, channels // groups, *behind)
    return jnp.swapaxes(x, axis, axis + 1).reshape(*before, channels, *behind)


def split_even_odd(x: Array, *, axis: int = -1) -> tuple[Array, Array]:
    """Return the even and the odd channels: Megvii's shuffle, which comes before the branches.

    Args:
      x: array with the channels along `axis`.
      axis: where the channels lie.
    """
    axis %= x.ndim
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    return jnp.take(pairs, 0, axis + 1), jnp.take(pairs, 1, axis + 1)


def split(x: Array, *, even_odd: bool, axis: int = -1) -> tuple[Array, Array]:
    """Return the inputs of a unit's left and right branch.

    Args:
      x: the unit's input, with the channels along `axis`.
      even_odd: whether the branches take the even and the odd channels, or else the first and the second half.
      axis: where the channels lie.
    """
    return split_even_odd(x, axis=axis) if even_odd else tuple(jnp.split(x, 2, axis=axis))


def join(left: Array, right: Array, *, shuffled: bool, axis: int = -1) -> Array:
    """Join the outputs of a unit's branches.

    Args:
      left: output of the left branch, with the channels along `axis`.
      right: output of the right branch.
      shuffled: whether to interleave their channels.
      axis: where the channels lie.
    """
    x = jnp.concatenate([left, right], axis=axis)
    return channel_shuffle(x, axis=axis) if shuffled else x
