"""Normalization on the device: converts uint8 crops to the network's input."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, UInt8

from ..config import Preprocess


def network_inputs(
    batch: Mapping[str, Array | np.ndarray], preprocess: Preprocess, dtype: DTypeLike = jnp.float32
) -> Float[Array, "batch height width channels"]:
    """Convert the images of a batch to the network's input.

    Args:
      batch: {"images": uint8 (B, H, W, C) in RGB or grey}. Training batches may add "flip", bool (B,), the images to
        mirror, and "erase", int32 (B, 4), the rectangle to blank in each image, as (top, left, height, width).
      preprocess: how to normalize.
      dtype: of the result.
    """
    images = batch["images"]
    if "flip" in batch:
        images = jnp.where(batch["flip"][:, None, None, None], images[:, :, ::-1], images)
    inputs = normalize(images, preprocess, dtype)
    if "erase" in batch:
        inputs = jnp.where(inside(batch["erase"], *inputs.shape[1:3])[..., None], 0, inputs)
    return inputs


def inside(boxes: Int[Array | np.ndarray, "batch 4"], height: int, width: int) -> Bool[Array, "batch {height} {width}"]:
    """Return which pixels lie in the rectangle of each image.

    Args:
      boxes: the rectangles, as (top, left, height, width) in pixels.
      height: of the images, in pixels.
      width: of the images, in pixels.
    """
    top, left, tall, wide = (column[:, None] for column in boxes.T)
    rows, columns = (jnp.arange(side)[None] for side in (height, width))
    return ((rows >= top) & (rows < top + tall))[:, :, None] & ((columns >= left) & (columns < left + wide))[:, None]


def normalize(
    images: UInt8[Array | np.ndarray, "batch height width channels"],
    preprocess: Preprocess,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "batch height width channels"]:
    """Convert uint8 crops to the network's input.

    Args:
      images: crops in RGB or grey.
      preprocess: how to normalize.
      dtype: of the result.
    """
    if preprocess.channel_order == "BGR":
        images = images[..., ::-1]
    wide = jnp.promote_types(dtype, jnp.float32)
    mean, std = (jnp.asarray(v, wide)[None, None, None] for v in (preprocess.mean, preprocess.std))
    return ((images.astype(wide) * preprocess.scale - mean) / std).astype(dtype)
