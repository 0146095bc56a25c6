"""The evaluation transform, on the host: uint8 pixels to uint8 crops.

It follows MMPretrain, torchvision and Megvii to the pixel.
"""

import cv2
import numpy as np
from PIL import Image

from ..errors import InputError
from .decoding import pixels_of


def prepare(image, preprocess, name="image"):
    """The whole evaluation transform but normalisation.

    Args:
      image: encoded bytes, a Pillow image, or a uint8 array (H, W, 3) in RGB or (H, W) in grey.
      preprocess: a Preprocess.
      name: what errors call the image.
    Returns:
      uint8 (crop, crop, C), RGB or grey.
    Raises:
      InputError: the image is damaged, or the network takes other channels than images have.
    """
    if preprocess.channel_order == "any":
        raise InputError(
            f"the network takes {preprocess.channels} channels, but image {name} has 3 or 1; give the model arrays "
            "(B, H, W, C) in Python"
        )
    return center_crop(resize_short_side(pixels_of(image, preprocess, name), preprocess), preprocess.crop)


def resize_short_side(pixels, preprocess):
    """Bilinear, short side to `preprocess.resize`; how the long side is rounded goes with the backend."""
    height, width = pixels.shape[:2]
    short, target = min(height, width), preprocess.resize
    if short == target:
        return pixels
    if preprocess.backend == "cv2":
        # As in Megvii's code: divide first, then round to nearest.
        size = tuple(target if side == short else int(target / short * side + 0.5) for side in (width, height))
        return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR).reshape(size[1], size[0], -1)
    return resize_pillow(pixels, [target if side == short else int(target * side / short) for side in (width, height)])


def resize_pillow(pixels, size):
    """A uint8 (H, W, C) array at another (width, height), bilinear with antialiasing."""
    # Image.fromarray knows grey images without a channel axis alone.
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    resized = Image.fromarray(squeezed).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(size[1], size[0], -1)


def center_crop(pixels, side):
    """The central square of a uint8 (H, W, C) array."""
    # Python's round takes halves to the even neighbour, like the originals.
    top, left = (max(0, round((length - side) / 2)) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]
