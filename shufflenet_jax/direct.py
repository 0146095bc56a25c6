"""The operations of a trained network on CPUs: NHWC, as sums of shifted views and as matrix products.

Each is a loop over rows of neighbouring numbers or a matrix product, both of which XLA compiles well. The numbers are
those of `plain`; gradients, for which `planar` has a layout and rules of its own, would be slow.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .plain import per_channel


def conv(x, kernel, *, stride=1, groups=1):
    """A convolution without bias, padded by (size - 1) / 2 on every side; `plain.conv` in all but speed."""
    size, inputs, outputs = kernel.shape[0], x.shape[-1], kernel.shape[-1]
    if size == 1 and groups == 1:
        return _product(x[:, ::stride, ::stride], kernel[0, 0])
    if size == 3 and groups == inputs == outputs:
        return _sum_of_products(x, kernel, stride, [slice(None)])
    if size == 3 and groups == 1:
        # For images, that is for few channels: gathering their 27 views for a matrix product would take longer.
        return _sum_of_products(x, kernel, stride, [slice(channel, channel + 1) for channel in range(inputs)])
    raise ValueError(f"no direct convolution for a kernel {kernel.shape} with {groups} groups")


def max_pool(x):
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""
    return jax.tree.reduce(lax.max, [tap for _, _, tap in taps(pad(x, -jnp.inf), 2, x.shape)])


def _product(x, weights):
    """(B, H, W, I) by (I, O)."""
    # As rows: the product of an array with four axes would be a slower one.
    return (x.reshape(-1, x.shape[-1]) @ weights).reshape(*x.shape[:-1], weights.shape[-1])


def _sum_of_products(x, kernel, stride, inputs):
    """The sum of each tap's view of each of the slices of input channels, times what the kernel (3, 3, I, O) has there.

    In one loop, and wide: bfloat16 sums would lose digits at every tap.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights = kernel.astype(wide)
    found = taps(pad(x), stride, x.shape)
    products = (
        tap[..., channels].astype(wide) * per_channel(weights[row, column, channels].reshape(-1))
        for row, column, tap in found
        for channels in inputs
    )
    return sum(products).astype(x.dtype)


def pad(x, value=0.0):
    """(., H, W, .) with a pixel more on every side."""
    # The function of `lax`: that of `jnp` is a program of its own, which XLA may be told not to open.
    return lax.pad(x, jnp.array(value, x.dtype), ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))


def taps(padded, stride, shape):
    """(row, column, view) for each tap of a 3x3 kernel: what it meets at each output pixel of an input's shape."""
    height, width = (stride * ((length - 1) // stride) + 1 for length in shape[1:3])
    for row in range(3):
        for column in range(3):
            yield row, column, padded[:, row : row + height : stride, column : column + width : stride]
