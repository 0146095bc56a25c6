"""Which lowering of the network's operations runs, and the operations that all lowerings share.

A lowering is a module with `enter`, `leave`, `per_channel`, `conv`, `batch_norm`, `normalize`, `max_pool` and
`global_mean` on arrays in its own layout, whose channels lie along `CHANNELS`. Every one of them pads like PyTorch and
gives the same numbers.
"""

import jax
import jax.numpy as jnp

from . import direct, plain, planar

LOWERINGS = ("auto", "planar", "plain")
MODULES = {"planar": planar, "plain": plain}


def resolve(lowering):
    """The module of a lowering; "auto" stands for the fastest on the platform in use."""
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering is {lowering!r}, not one of {', '.join(LOWERINGS)}")
    if lowering == "auto":
        # On CPUs XLA runs grouped convolutions one group at a time: see docs/faster.md for what "planar" gains there.
        # GPUs and TPUs have kernels for convolutions; nothing was measured on them that would speak against those.
        lowering = "planar" if jax.default_backend() == "cpu" else "plain"
    return MODULES[lowering]


def for_inference(lowering):
    """The module with the `conv` and `max_pool` of a trained network (see deploy.py), both on NHWC."""
    return direct if resolve(lowering) is planar else plain


def channel_shuffle(x, groups=2, *, axis=-1):
    """Interleaves the channel groups: channel `g * C/groups + c` moves to `c * groups + g`."""
    axis %= x.ndim
    before, channels, behind = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = x.reshape(*before, groups, channels // groups, *behind)
    return jnp.swapaxes(x, axis, axis + 1).reshape(*before, channels, *behind)


def split_even_odd(x, *, axis=-1):
    """The even and the odd channels: Megvii's shuffle, which comes before the branches."""
    axis %= x.ndim
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    return jnp.take(pairs, 0, axis + 1), jnp.take(pairs, 1, axis + 1)
