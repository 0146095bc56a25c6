"""The reference lowering: NHWC, whole operations handed to XLA, gradients by automatic differentiation."""

import jax
import jax.numpy as jnp
from jax import lax

from .shuffle import join, split

__all__ = ["join", "split"]

CHANNEL_AXIS = -1
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def from_nhwc(images):
    """Images (B, H, W, C) in this lowering's axis order, which is theirs."""
    return images


def to_nhwc(x):
    """Back to (B, H, W, C)."""
    return x


def per_channel(vector):
    """A value a channel, ready to meet (B, H, W, C)."""
    return vector[None, None, None]


def conv(x, kernel, *, stride=1, groups=1):
    """A convolution without bias, padded by (size - 1) / 2 on every side.

    Args:
      x: (B, H, W, I).
      kernel: (size, size, I / groups, O); groups is 1 or I.
    Returns:
      (B, ceil(H / stride), ceil(W / stride), O).
    """
    # Explicit padding: "SAME" pads stride-2 convolutions on one side only, PyTorch on both.
    pad = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def batch_norm(x, scale, bias, batch_groups, *, epsilon, relu):
    """Batch norm by the statistics of each image's group, and ReLU where asked for.

    Args:
      x: (B, H, W, C).
      scale, bias: (C,).
      batch_groups: which images share statistics.
    Returns:
      (like x, mean, unbiased variance), the last two (C,), the means over the groups, at least in float32 and without
      gradients of their own; two passes, as exact as PyTorch's.
    """
    mean, var, count = batch_groups.moments(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0)
    vectors = mean[:, None, None], var[:, None, None], per_channel(scale), per_channel(bias)
    y = normalize_by(*vectors, x, epsilon=epsilon, relu=relu)
    return y, *lax.stop_gradient((mean.mean(0), unbiased(var, count).mean(0)))


def unbiased(var, count):
    """A variance as it would be over one value fewer, which is what PyTorch keeps."""
    return var * (count / (count - 1))


def normalize(x, mean, var, scale, bias, *, epsilon, relu):
    """`(x - mean) / sqrt(var + epsilon) * scale + bias` channel by channel, at least in float32, and ReLU."""
    return normalize_by(*map(per_channel, (mean, var, scale, bias)), x, epsilon=epsilon, relu=relu)


def normalize_by(mean, var, scale, bias, x, *, epsilon, relu):
    """The same in any axis order: the vectors already have shapes that meet x."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mean, var, scale, bias = (vector.astype(wide) for vector in (mean, var, scale, bias))
    y = ((x.astype(wide) - mean) * (lax.rsqrt(var + epsilon) * scale) + bias).astype(x.dtype)
    return jax.nn.relu(y) if relu else y


def max_pool(x):
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def global_mean(x):
    """The mean over all pixels. (B, H, W, C) -> (B, C)."""
    return x.mean((1, 2))
