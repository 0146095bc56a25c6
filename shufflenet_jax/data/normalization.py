"""uint8 crops to the network's input, on the device."""

import jax.numpy as jnp


def network_inputs(batch, preprocess, dtype=jnp.float32):
    """The images of a batch as the network takes them, on the device.

    Args:
      batch: {"images": uint8 (B, H, W, C) in RGB or grey}, and where training asks for it "flip": bool (B,), the rows
        to mirror, and "erase": int (B, 4), top, left, height and width of a rectangle to blank in each row.
      preprocess: a Preprocess.
      dtype: of the result.
    Returns:
      (B, H, W, C).
    """
    images = batch["images"]
    if "flip" in batch:
        images = jnp.where(batch["flip"][:, None, None, None], images[:, :, ::-1], images)
    inputs = normalize(images, preprocess, dtype)
    if "erase" in batch:
        inputs = jnp.where(inside(batch["erase"], *inputs.shape[1:3])[..., None], 0, inputs)
    return inputs


def inside(boxes, height, width):
    """(B, height, width): which pixels lie in a rectangle each, (B, 4) with top, left, height and width."""
    top, left, tall, wide = (column[:, None] for column in boxes.T)
    rows, columns = (jnp.arange(side)[None] for side in (height, width))
    return ((rows >= top) & (rows < top + tall))[:, :, None] & ((columns >= left) & (columns < left + wide))[:, None]


def normalize(images, preprocess, dtype=jnp.float32):
    """uint8 crops (B, H, W, C) in RGB or grey to the network's input, on the device."""
    if preprocess.channel_order == "BGR":
        images = images[..., ::-1]
    wide = jnp.promote_types(dtype, jnp.float32)
    mean, std = (jnp.asarray(v, wide)[None, None, None] for v in (preprocess.mean, preprocess.std))
    return ((images.astype(wide) * preprocess.scale - mean) / std).astype(dtype)
