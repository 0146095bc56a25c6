"""Mixup and CutMix on the device: mixes each image with the next one of its batch-norm group, the last with the first.

As in torchvision's RandomMixUp and RandomCutMix, one draw serves a whole batch, which here is a batch-norm group: what
one GPU held. The draws are a pure function of a key and the group's number, so they do not depend on the devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from ..batch_groups import BatchGroups
from .normalization import inside


def draw(
    key: PRNGKeyArray, groups: Int[Array | np.ndarray, " batch"], mixup: float, cutmix: float, height: int, width: int
) -> tuple[Float32[Array, " batch"], Float32[Array, "batch {height} {width}"]]:
    """Draw how to mix each image.

    Args:
      key: random key of the step.
      groups: the number of each image's group.
      mixup: parameter of mixup's Beta distribution; 0 turns mixup off.
      cutmix: parameter of CutMix's Beta distribution; 0 turns CutMix off. If both are on, each group draws one of them.
      height: of the images, in pixels.
      width: of the images, in pixels.

    Returns:
      The share of each image's own label in its target, and the weight of each of its own pixels.
    """

    def of_group(
        group: Int[Array, ""],
    ) -> tuple[bool | Bool[Array, ""], Float32[Array, ""], Int[Array, "4"]]:
        keys = jax.random.split(jax.random.fold_in(key, group), 5)
        blend = jax.random.beta(keys[0], mixup or 1, mixup or 1, dtype=jnp.float32)
        paste = jax.random.beta(keys[1], cutmix or 1, cutmix or 1, dtype=jnp.float32)
        pasting = jax.random.bernoulli(keys[2]) if mixup and cutmix else bool(cutmix)
        # The center lies anywhere in the image. The border may cut the rectangle off, so its final area counts.
        half = 0.5 * jnp.sqrt(1 - paste)
        top, bottom = _span(keys[3], half, height)
        left, right = _span(keys[4], half, width)
        paste = 1 - (bottom - top) * (right - left) / (height * width)
        box = jnp.array([top, left, bottom - top, right - left])
        return pasting, jnp.where(pasting, paste, blend).astype(jnp.float32), box

    pasting, share, boxes = jax.vmap(of_group)(groups)
    pasted = 1 - inside(boxes, height, width).astype(jnp.float32)
    return share, jnp.where(pasting[:, None, None], pasted, share[:, None, None])


def _span(key: PRNGKeyArray, half: Float[Array, ""], length: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Draw a range of pixels [start, stop) around a random center.

    Args:
      key: random key.
      half: how far the range reaches to both sides, as a share of `length`. The border of the image cuts it off.
      length: of the axis, in pixels.
    """
    center, reach = jax.random.randint(key, (), 0, length), (half * length).astype(jnp.int32)
    return jnp.maximum(center - reach, 0), jnp.minimum(center + reach, length)


def mix(
    images: Float[Array, "batch height width channels"],
    weights: Float[Array, "batch height width"],
    groups: BatchGroups,
) -> Float[Array, "batch height width channels"]:
    """Mix each image with the next one of its group.

    Args:
      images: normalized images.
      weights: the weight of each image's own pixels, from `draw`.
      groups: the batch-norm groups of the images.
    """
    weights = weights[..., None].astype(images.dtype)
    return weights * images + (1 - weights) * groups.following(images)
