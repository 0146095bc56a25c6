"""The operations of a trained network on CPUs: NHWC, as sums of shifted views and as matrix products.

Each is a loop over rows of neighboring numbers or a matrix product, both of which XLA compiles well. The results equal
those of `reference`. Gradients would be slow; `cpu` has its own axis order and rules for them.
"""

from jaxtyping import Float

from ..shapes import Array, Images, Kernel
from .reference import per_channel
from .windows import largest, taps, weighted_sum


def conv(x: Images, kernel: Kernel, *, stride: int = 1, groups: int = 1) -> Float[Array, "batch rows columns outputs"]:
    """Convolve without bias, padded by (size - 1) / 2 on every side, as `reference.conv` does.

    Args:
      x: (B, H, W, I).
      kernel: (size, size, I / groups, O); size is 1 or 3.
      stride: in both directions.
      groups: 1, or I for a depthwise convolution with O = I.

    Raises:
      ValueError: the network has no convolution of this kind.
    """
    size, inputs, outputs = kernel.shape[0], x.shape[-1], kernel.shape[-1]
    if size == 1 and groups == 1:
        return _product(x[:, ::stride, ::stride], kernel[0, 0])
    if size == 3 and groups == inputs == outputs:
        pairs = ((view, per_channel(kernel[row, column, 0])) for row, column, view in taps(x, stride))
        return weighted_sum(pairs, x.dtype)
    if size == 3 and groups == 1:
        # Images have few channels: gathering 27 views for a matrix product would take longer.
        pairs = (
            (view[..., channel : channel + 1], per_channel(kernel[row, column, channel]))
            for row, column, view in taps(x, stride)
            for channel in range(inputs)
        )
        return weighted_sum(pairs, x.dtype)
    raise ValueError(f"no direct convolution for a kernel {kernel.shape} with {groups} groups")


def max_pool(x: Images) -> Float[Array, "batch rows columns channels"]:
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""
    return largest(x)


def _product(
    x: Float[Array, "batch height width inputs"], weights: Float[Array, "inputs outputs"]
) -> Float[Array, "batch height width outputs"]:
    """Multiply (B, H, W, I) by (I, O)."""
    # As rows: with four axes the product is slower.
    return (x.reshape(-1, x.shape[-1]) @ weights).reshape(*x.shape[:-1], weights.shape[-1])
