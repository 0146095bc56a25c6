"""The 3x3 windows of images as shifted views, in any axis order (., H, W, .): what `cpu` and `direct` share.

XLA compiles an expression over these views as one loop over neighboring numbers.
"""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Float

from ..shapes import Array, Windows


def taps(x: Windows, stride: int, fill: float = 0.0) -> Iterator[tuple[int, int, Array]]:
    """Yield (row, column, view) for each tap of a 3x3 kernel: the inputs that the tap meets at each output pixel.

    Args:
      x: images (., H, W, .).
      stride: of the kernel.
      fill: value of the padding, one pixel on each side.
    """
    height, width = (stride * ((length - 1) // stride) + 1 for length in x.shape[1:3])
    # Not jnp.pad: it is a program of its own, which XLA may not inline.
    padded = lax.pad(x, jnp.array(fill, x.dtype), ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    for row in range(3):
        for column in range(3):
            yield row, column, padded[:, row : row + height : stride, column : column + width : stride]


def weighted_sum(pairs: Iterable[tuple[Array, Array]], dtype: DTypeLike) -> Array:
    """Return the sum of view times weight over (view, weight) pairs, computed in one loop.

    Args:
      pairs: views of one shape, and weights that broadcast to it.
      dtype: type of the result. The sum is computed at least in float32.
    """
    # bfloat16 sums would lose digits at every tap; the wider sum costs nothing inside XLA's fusion.
    wide = jnp.promote_types(dtype, jnp.float32)
    return sum(view.astype(wide) * weight.astype(wide) for view, weight in pairs).astype(dtype)


def largest(x: Windows) -> Float[Array, "first rows columns last"]:
    """Return the largest value of each window, with stride 2 and padded with minus infinity."""
    return jax.tree.reduce(lax.max, [view for _, _, view in taps(x, 2, -jnp.inf)])
