"""The operations of a trained network on CPUs: NHWC, as sums of shifted views and as matrix products.

Each is a loop over rows of neighbouring numbers or a matrix product, both of which XLA compiles well. The numbers are
those of `reference`; gradients, for which `cpu` has an axis order and rules of its own, would be slow.
"""

from .reference import per_channel
from .windows import largest, taps, weighted_sum


def conv(x, kernel, *, stride=1, groups=1):
    """A convolution without bias, padded by (size - 1) / 2 on every side; `reference.conv` in all but speed."""
    size, inputs, outputs = kernel.shape[0], x.shape[-1], kernel.shape[-1]
    if size == 1 and groups == 1:
        return _product(x[:, ::stride, ::stride], kernel[0, 0])
    if size == 3 and groups == inputs == outputs:
        pairs = ((view, per_channel(kernel[row, column, 0])) for row, column, view in taps(x, stride))
        return weighted_sum(pairs, x.dtype)
    if size == 3 and groups == 1:
        # For images, that is for few channels: gathering their 27 views for a matrix product would take longer.
        pairs = (
            (view[..., channel : channel + 1], per_channel(kernel[row, column, channel]))
            for row, column, view in taps(x, stride)
            for channel in range(inputs)
        )
        return weighted_sum(pairs, x.dtype)
    raise ValueError(f"no direct convolution for a kernel {kernel.shape} with {groups} groups")


def max_pool(x):
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""
    return largest(x)


def _product(x, weights):
    """(B, H, W, I) by (I, O)."""
    # As rows: the product of an array with four axes would be a slower one.
    return (x.reshape(-1, x.shape[-1]) @ weights).reshape(*x.shape[:-1], weights.shape[-1])
