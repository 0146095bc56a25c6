"""Images as people give them: paths, addresses, encoded bytes, Pillow images, uint8 arrays, and lists of these."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from jaxtyping import Array, UInt8
from PIL import Image

from .config import Preprocess
from .data import geometry
from .data.decoding import AnyImage
from .data.workers import usable_cores
from .errors import InputError, Unchecked
from .files import path_of, read_file
from .published import UNREACHED, fetch, reason_of

OneImage = str | Path | bytes | Image.Image | UInt8[np.ndarray | Array, "height width *grey_or_rgb"]
AnyImages = OneImage | Sequence[OneImage] | UInt8[np.ndarray | Array, "batch height width grey_or_rgb"]
SILENT_SECONDS = 30  # After which a server that sends nothing is given up.
ADDRESSES = ("http://", "https://")
WANTED = (
    "a path, an http(s) address, encoded bytes, a Pillow image, or a uint8 array (H, W, 3) in RGB or (H, W) in grey"
)


class Named(NamedTuple):
    """An image of a list, and what errors call it.

    Attributes:
      image: as it was given.
      name: its place in the list, like "images[3]"; None for an image that was given alone.
    """

    image: Any
    name: str | None


def are_several(images: Unchecked) -> TypeGuard[Iterable[Any]]:
    """Return whether images are a list, a tuple or a batch (B, H, W, C), also of one."""
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", None) == 4


def listed(images: Unchecked) -> list[Named]:
    """Return the images of a list, tuple or batch (B, H, W, C) one by one, and a single image as a list of one."""
    if are_several(images):
        return [Named(image, f"images[{place}]") for place, image in enumerate(images)]
    return [Named(images, None)]


def prepare_all(
    images: Sequence[Named], preprocess: Preprocess, name: str | None = None
) -> UInt8[np.ndarray, "batch crop_height crop_width channels"]:
    """Read, decode and prepare images for evaluation, several at a time.

    Args:
      images: from `listed`.
      preprocess: how to prepare them.
      name: what errors call them; by default each has a name of its own.

    Returns:
      The crops, in RGB or grey.

    Raises:
      InputError: one of them is not an image, or cannot be read; it is named, and the others are given up.
    """

    def prepare(given: Named) -> UInt8[np.ndarray, "crop_height crop_width channels"]:
        content, own_name = content_of(*given)
        return geometry.prepare(content, preprocess, name or own_name)

    if not images:
        return np.zeros((0, *preprocess.size, preprocess.channels), np.uint8)
    if len(images) == 1:
        return prepare(images[0])[None]
    readers = ThreadPoolExecutor(usable_cores())
    try:
        return np.stack(list(readers.map(prepare, images)))
    finally:
        readers.shutdown(cancel_futures=True)  # After an error, nothing waits for the other addresses.


def content_of(image: Unchecked, name: str | None = None) -> tuple[AnyImage, str]:
    """Read an image as far as it lies in a file or on a server.

    Args:
      image: a path, an http(s) address, encoded bytes, a Pillow image, or an array.
      name: what errors call it; by default its path or address.

    Returns:
      (encoded bytes, a Pillow image or a uint8 array, what errors call it).

    Raises:
      InputError: it is none of these, or cannot be read.
    """
    if isinstance(image, str) and image.lower().startswith(ADDRESSES):
        return _fetched(image), image
    if isinstance(image, (str, Path)):
        try:
            return read_file(path_of(image)), str(image)
        except OSError as error:
            raise InputError(f"image {image} cannot be read: {error.strerror}; check the path") from error
    if isinstance(image, bytes):
        return image, name or "image"
    if isinstance(image, Image.Image):
        return image, str(getattr(image, "filename", "")) or name or "image"
    return _pixels(image, name or "an image"), name or "array"


def _fetched(address: str) -> bytes:
    """Return the bytes at an http(s) address."""
    try:
        return fetch(address, seconds=SILENT_SECONDS)
    except UNREACHED as error:
        raise InputError(f"image {address} cannot be fetched: {reason_of(error)}; check the address") from error


def _pixels(image: Unchecked, name: str) -> UInt8[np.ndarray, "height width *grey_or_rgb"]:
    """Return an image that was given as numbers. Raise InputError unless it is uint8, in RGB or grey."""
    try:
        pixels = np.asarray(image)
    except ValueError as error:
        raise InputError(f"{name} is not an array of numbers; give {WANTED}") from error
    shaped = pixels.ndim in (2, 3) and pixels.shape[2:] in ((), (1,), (3,)) and 0 not in pixels.shape
    if pixels.dtype != np.uint8 or not shaped:
        ready = "; floats that are normalized already go to the model itself, as one array (B, H, W, C)"
        floats = np.issubdtype(pixels.dtype, np.floating)
        raise InputError(f"{name} is {pixels.dtype} of shape {pixels.shape}; give {WANTED}{ready if floats else ''}")
    return pixels
