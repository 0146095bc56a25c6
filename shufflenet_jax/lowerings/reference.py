"""The reference lowering: NHWC, one XLA operation each, gradients by automatic differentiation."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from ..batch_groups import BatchGroups
from ..shapes import Array, Images, Kernel, Vector
from .shuffle import join, split

__all__ = ["join", "split"]

CHANNEL_AXIS = -1
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def from_nhwc(images: Images) -> Images:
    """Return images (B, H, W, C) as they are: this is the lowering's axis order."""
    return images


def to_nhwc(x: Images) -> Images:
    """Return an array (B, H, W, C) as it is."""
    return x


def per_channel(vector: Vector) -> Float[Array, "1 1 1 channels"]:
    """Return one value per channel in a shape that broadcasts to (B, H, W, C)."""
    return vector[None, None, None]


def conv(x: Images, kernel: Kernel, *, stride: int = 1, groups: int = 1) -> Float[Array, "batch rows columns outputs"]:
    """Convolve without bias, padded by (size - 1) / 2 on every side.

    Args:
      x: (B, H, W, I).
      kernel: (size, size, I / groups, O).
      stride: in both directions.
      groups: 1 or I.

    Returns:
      (B, ceil(H / stride), ceil(W / stride), O).
    """
    # Explicit padding: "SAME" pads stride-2 convolutions on one side only, PyTorch on both.
    pad = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def batch_norm(
    x: Images, scale: Vector, bias: Vector, batch_groups: BatchGroups, *, epsilon: float, relu: bool
) -> tuple[Images, Vector, Vector]:
    """Normalize by the statistics of each image's group.

    Args:
      x: (B, H, W, C).
      scale: (C,).
      bias: (C,).
      batch_groups: which images share statistics.
      epsilon: added to the variance.
      relu: whether a ReLU follows.

    Returns:
      (normalized images, mean, unbiased variance). Mean and variance, (C,) each, are means over the groups, at least in
      float32, and have no gradients. They take two passes, which makes them as exact as PyTorch's.
    """
    mean, var, count = batch_groups.moments(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0)
    vectors = mean[:, None, None], var[:, None, None], per_channel(scale), per_channel(bias)
    y = normalize_by(*vectors, x, epsilon=epsilon, relu=relu)
    return y, *lax.stop_gradient((mean.mean(0), unbiased(var, count).mean(0)))


def unbiased(var: Array, count: Array | float) -> Array:
    """Convert a biased variance of `count` values to the unbiased one, which PyTorch keeps."""
    return var * (count / (count - 1))


def normalize(
    x: Images, mean: Vector, var: Vector, scale: Vector, bias: Vector, *, epsilon: float, relu: bool
) -> Images:
    """Normalize by given statistics: `(x - mean) / sqrt(var + epsilon) * scale + bias`, at least in float32.

    Args:
      x: (B, H, W, C).
      mean: (C,).
      var: (C,).
      scale: (C,).
      bias: (C,).
      epsilon: added to the variance.
      relu: whether a ReLU follows.
    """
    vectors = per_channel(mean), per_channel(var), per_channel(scale), per_channel(bias)
    return normalize_by(*vectors, x, epsilon=epsilon, relu=relu)


def normalize_by(mean: Array, var: Array, scale: Array, bias: Array, x: Array, *, epsilon: float, relu: bool) -> Array:
    """Do the same in any axis order, with vectors in shapes that broadcast to that of x."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mean, var, scale, bias = (vector.astype(wide) for vector in (mean, var, scale, bias))
    y = ((x.astype(wide) - mean) * (lax.rsqrt(var + epsilon) * scale) + bias).astype(x.dtype)
    return jax.nn.relu(y) if relu else y


def max_pool(x: Images) -> Float[Array, "batch rows columns channels"]:
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def global_mean(x: Images) -> Float[Array, "batch channels"]:
    """Return the mean over all pixels. (B, H, W, C) -> (B, C)."""
    return x.mean((1, 2))
