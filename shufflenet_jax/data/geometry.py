"""The evaluation transform on the host, up to a uint8 crop: equals those of MMPretrain, torchvision and Megvii."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ..config import Preprocess
from ..errors import InputError
from .decoding import AnyImage, pixels_of


def prepare(image: AnyImage, preprocess: Preprocess, name: str = "image") -> UInt8[np.ndarray, "crop crop channels"]:
    """Decode, resize and crop an image for evaluation. Normalization follows on the device.

    Args:
      image: the image; arrays are in RGB or grey.
      preprocess: how to prepare it.
      name: name of the image, for errors.

    Returns:
      The crop, in RGB or grey.

    Raises:
      InputError: the image is damaged, or the network takes other channels than images have.
    """
    if preprocess.channel_order == "any":
        raise InputError(
            f"the network takes {preprocess.channels} channels, but image {name} has 3 or 1; give the model arrays "
            "(B, H, W, C) in Python"
        )
    return center_crop(resize_short_side(pixels_of(image, preprocess, name), preprocess), preprocess.crop)


def resize_short_side(
    pixels: UInt8[np.ndarray, "height width channels"], preprocess: Preprocess
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """Resize an image bilinearly, its short side to `preprocess.resize`.

    Args:
      pixels: the image.
      preprocess: its backend decides about antialiasing, and how the long side is rounded.
    """
    height, width = pixels.shape[:2]
    short, target = min(height, width), preprocess.resize
    if short == target:
        return pixels
    if preprocess.backend == "cv2":
        # Megvii's code divides first and rounds to the nearest integer.
        size = tuple(target if side == short else int(target / short * side + 0.5) for side in (width, height))
        return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR).reshape(size[1], size[0], -1)
    return resize_pillow(pixels, [target if side == short else int(target * side / short) for side in (width, height)])


def resize_pillow(
    pixels: UInt8[np.ndarray, "height width channels"], size: Sequence[int]
) -> UInt8[np.ndarray, "{size[1]} {size[0]} channels"]:
    """Resize an image bilinearly with antialiasing.

    Args:
      pixels: the image.
      size: (width, height) of the result, in pixels.
    """
    # Image.fromarray takes grey images only without a channel axis.
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    resized = Image.fromarray(squeezed).resize((size[0], size[1]), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(size[1], size[0], -1)


def center_crop(
    pixels: UInt8[np.ndarray, "height width channels"], side: int
) -> UInt8[np.ndarray, "{side} {side} channels"]:
    """Return the central square of an image.

    Args:
      pixels: the image, at least as large as the square.
      side: of the square, in pixels.
    """
    # Python's round takes halves to the even neighbor, as the original implementations do.
    top, left = (max(0, round((length - side) / 2)) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]
