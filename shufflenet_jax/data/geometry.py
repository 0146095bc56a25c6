"""The evaluation transform on the host, up to a uint8 crop: equals those of MMPretrain, torchvision and Megvii."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ..config import Preprocess
from ..errors import InputError
from .decoding import AnyImage, pixels_of


def prepare(
    image: AnyImage, preprocess: Preprocess, name: str = "image"
) -> UInt8[np.ndarray, "crop_height crop_width channels"]:
    """Decode, resize and crop an image for evaluation. Normalization follows on the device.

    Args:
      image: the image; arrays are in RGB or grey.
      preprocess: how to prepare it.
      name: name of the image, for errors.

    Returns:
      The crop, of the size that `preprocess` has, in RGB or grey.

    Raises:
      InputError: the image is damaged, or the network takes other channels than images have.
    """
    if preprocess.channel_order == "any":
        raise InputError(
            f"the network takes {preprocess.channels} channels, but image {name} has 3 or 1; give the model arrays "
            "(B, H, W, C) in Python"
        )
    return center_crop(resize_to_cover(pixels_of(image, preprocess, name), preprocess), preprocess.size)


def resize_to_cover(
    pixels: UInt8[np.ndarray, "height width channels"], preprocess: Preprocess
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """Resize an image bilinearly: for a square crop its short side to `preprocess.resize`.

    For a rectangle, the image just covers one of the crop's shape whose short side is `preprocess.resize`.

    Args:
      pixels: the image.
      preprocess: its backend decides about antialiasing, and how the other side is rounded.
    """
    size = pixels.shape[1], pixels.shape[0]
    deciding, target = _deciding_side(size, preprocess)
    if deciding == target:
        return pixels
    if preprocess.backend == "cv2":
        # Megvii's code divides first and rounds to the nearest integer.
        width, height = (target if side == deciding else int(target / deciding * side + 0.5) for side in size)
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, -1)
    return resize_pillow(pixels, [target if side == deciding else int(target * side / deciding) for side in size])


def _deciding_side(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Return the side of an image of (width, height) that decides its scale, and its new length, in pixels."""
    short, (tall, wide) = min(preprocess.size), preprocess.size
    if tall == wide:
        return min(size), preprocess.resize
    # Of the rectangle of the crop's shape whose short side is `resize`.
    covered = [-(-side * preprocess.resize // short) for side in (wide, tall)]
    return max(zip(size, covered, strict=True), key=lambda sides: sides[1] / sides[0])


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
    pixels: UInt8[np.ndarray, "height width channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "{size[0]} {size[1]} channels"]:
    """Return the middle of an image.

    Args:
      pixels: the image, at least as large as the result.
      size: (height, width) of the result, in pixels.
    """
    # Python's round takes halves to the even neighbor, as the original implementations do.
    top, left = (max(0, round((length - side) / 2)) for length, side in zip(pixels.shape[:2], size, strict=True))
    return pixels[top : top + size[0], left : left + size[1]]
