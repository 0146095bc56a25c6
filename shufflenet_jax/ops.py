"""The operations of ShuffleNetV2 on NHWC arrays, and how each is lowered to XLA.

Every operation pads like PyTorch. "plain" lowerings hand the whole operation to XLA and are the reference;
"shifted" ones are written in slices, multiplications and matrix products, which XLA compiles better on CPU.
"""

import jax
import jax.numpy as jnp
from jax import lax

LOWERINGS = ("auto", "shifted", "plain")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def resolve_lowering(lowering):
    """The lowering that "auto" stands for on the platform in use; any other is returned as it is."""
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering is {lowering!r}, not one of {', '.join(LOWERINGS)}")
    if lowering != "auto":
        return lowering
    # XLA's CPU backend runs grouped convolutions one group at a time: nine shifted multiply-adds take a third
    # to a fifth of the time. GPUs and TPUs have kernels of their own for both.
    return "shifted" if jax.default_backend() == "cpu" else "plain"


def channel_shuffle(x, groups=2):
    """Interleaves the channel groups: channel `g * C/groups + c` moves to `c * groups + g`. (B, H, W, C) both."""
    *outer, channels = x.shape
    x = x.reshape(*outer, groups, channels // groups)
    return jnp.swapaxes(x, -1, -2).reshape(*outer, channels)


def split_even_odd(x):
    """The even and the odd channels, (B, H, W, C/2) each: Megvii's shuffle, which comes before the branches."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return pairs[..., 0], pairs[..., 1]


def conv(x, kernel, *, stride=1, groups=1, lowering="auto"):
    """A convolution without bias, padded by (size - 1) / 2 on every side.

    Args:
      x: (B, H, W, I).
      kernel: (size, size, I / groups, O); groups is 1 or I.
    Returns:
      (B, ceil(H / stride), ceil(W / stride), O).
    """
    if resolve_lowering(lowering) == "shifted":
        if kernel.shape[:2] == (1, 1) and stride == 1:
            return _pointwise_product(x, kernel)
        if groups == x.shape[-1] == kernel.shape[-1]:
            return _depthwise_shifted(x, kernel, stride)
    # Explicit padding: "SAME" pads stride-2 convolutions on one side only, PyTorch on both.
    pad = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def _pointwise_product(x, kernel):
    """A 1x1 convolution as one matrix product over all pixels."""
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


def _depthwise_shifted(x, kernel, stride):
    """A depthwise convolution as one multiply-add a kernel tap, each on a shifted view of the padded input."""
    size = kernel.shape[0]
    pad = (size - 1) // 2
    height, width = ((n - 1) // stride + 1 for n in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    # bfloat16 sums would lose digits at every tap; the wider sum costs nothing inside XLA's fusion.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = 0
    for row in range(size):
        for column in range(size):
            view = padded[:, row : row + stride * (height - 1) + 1 : stride]
            view = view[:, :, column : column + stride * (width - 1) + 1 : stride]
            total += view.astype(wide) * kernel[None, None, row, column].astype(wide)
    return total.astype(x.dtype)


def max_pool(x):
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def batch_moments(x):
    """Mean and biased variance of each channel, (C,) both, at least in float32; two passes, as exact as PyTorch's."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean((0, 1, 2))
    return mean, jnp.square(wide - mean[None, None, None]).mean((0, 1, 2))


def normalize(x, mean, var, scale, bias, *, epsilon):
    """`(x - mean) / sqrt(var + epsilon) * scale + bias` channel by channel, computed at least in float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mean, var, scale, bias = (vector.astype(wide)[None, None, None] for vector in (mean, var, scale, bias))
    return ((x.astype(wide) - mean) * (lax.rsqrt(var + epsilon) * scale) + bias).astype(x.dtype)
