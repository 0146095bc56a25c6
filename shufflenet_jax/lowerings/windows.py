"""The 3x3 windows of images as shifted views, in any axis order (., H, W, .): what `cpu` and `direct` share.

XLA compiles an expression over such views as one loop over neighbouring numbers.
"""

import jax
import jax.numpy as jnp
from jax import lax


def taps(x, stride, fill=0.0):
    """(row, column, view) for each tap of a 3x3 kernel, padded by 1: the inputs that it meets at each output pixel."""
    height, width = (stride * ((length - 1) // stride) + 1 for length in x.shape[1:3])
    # The function of `lax`: that of `jnp` is a program of its own, which XLA may be told not to open.
    padded = lax.pad(x, jnp.array(fill, x.dtype), ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    for row in range(3):
        for column in range(3):
            yield row, column, padded[:, row : row + height : stride, column : column + width : stride]


def weighted_sum(pairs, dtype):
    """The sum of view times weight over pairs of them, in one loop."""
    # bfloat16 sums would lose digits at every tap; the wider sum costs nothing inside XLA's fusion.
    wide = jnp.promote_types(dtype, jnp.float32)
    return sum(view.astype(wide) * weight.astype(wide) for view, weight in pairs).astype(dtype)


def largest(x):
    """The largest value of each window, with stride 2 and padded with minus infinity."""
    return jax.tree.reduce(lax.max, [view for _, _, view in taps(x, 2, -jnp.inf)])
