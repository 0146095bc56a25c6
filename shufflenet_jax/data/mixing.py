"""Mixup and CutMix on the device: each image meets the next one of its batch-norm group, the last one the first.

The draws follow torchvision's RandomMixUp and RandomCutMix: one for all images of a group, as each GPU drew one for its
batch. They are a pure function of a key and the group's number, whatever the devices.
"""

import jax
import jax.numpy as jnp

from .normalization import inside


def draw(key, groups, mixup, cutmix, height, width):
    """How each image is to be mixed.

    Args:
      key: a JAX key, that of the step.
      groups: (B,), the number of each image's group in the batch.
      mixup, cutmix: parameters of Beta distributions, 0 for one that is not wanted; with both, a group has either.
      height, width: of the images, in pixels.
    Returns:
      (share (B,) of each image in its own label, weights (B, H, W) of its own pixels), both float32.
    """

    def of_group(group):
        keys = jax.random.split(jax.random.fold_in(key, group), 5)
        blend = jax.random.beta(keys[0], mixup or 1, mixup or 1, dtype=jnp.float32)
        paste = jax.random.beta(keys[1], cutmix or 1, cutmix or 1, dtype=jnp.float32)
        pasting = jax.random.bernoulli(keys[2]) if mixup and cutmix else bool(cutmix)
        # The centre lies anywhere in the image, which cuts rectangles off: their area as it comes out counts.
        half = 0.5 * jnp.sqrt(1 - paste)
        top, bottom = _span(keys[3], half, height)
        left, right = _span(keys[4], half, width)
        paste = 1 - (bottom - top) * (right - left) / (height * width)
        box = jnp.array([top, left, bottom - top, right - left])
        return pasting, jnp.where(pasting, paste, blend).astype(jnp.float32), box

    pasting, share, boxes = jax.vmap(of_group)(groups)
    pasted = 1 - inside(boxes, height, width).astype(jnp.float32)
    return share, jnp.where(pasting[:, None, None], pasted, share[:, None, None])


def _span(key, half, length):
    """The first and the last but one pixel, within the image, of what reaches `half` the length to both sides."""
    centre, reach = jax.random.randint(key, (), 0, length), (half * length).astype(jnp.int32)
    return jnp.maximum(centre - reach, 0), jnp.minimum(centre + reach, length)


def mix(images, weights, groups):
    """Images (B, H, W, C) and the next ones of their groups, in the shares of `draw`'s weights."""
    weights = weights[..., None].astype(images.dtype)
    return weights * images + (1 - weights) * groups.following(images)
