"""A survey of a data set: unreadable and unusual images, and the number of images per class."""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import InputError
from .decoding import DAMAGE, read
from .sources import Source
from .workers import usable_cores

AHEAD = 64  # Images that each thread has in its queue.


class Facts(NamedTuple):
    """The facts about one image.

    Attributes:
      name: its name.
      label: its label.
      fault: why it cannot be read; None if it can.
      mode: Pillow's name of its colors, as stored.
      size: (width, height) in pixels, as stored.
      orientation: EXIF's orientation, 1 to 8.
      digest: hash of its bytes.
    """

    name: str
    label: int
    fault: str | None = None
    mode: str = "L"
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    digest: bytes = b""


@dataclass
class Survey:
    """The facts about all images.

    Attributes:
      images: number of images.
      unreadable: what is wrong with each image that cannot be read, with its name.
      grey: names of the grey images.
      cmyk: names of the images in CMYK.
      rotated: names of the images that EXIF rotates; torchvision's preprocessing ignores the rotation.
      duplicates: groups of names with the same bytes.
      sizes: {(width, height): number of images}, in pixels.
      per_label: {label: number of images}.
    """

    images: int = 0
    unreadable: list[str] = field(default_factory=list)
    grey: list[str] = field(default_factory=list)
    cmyk: list[str] = field(default_factory=list)
    rotated: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    per_label: Counter[int] = field(default_factory=Counter)


def survey(source: Source, *, threads: int | None = None, on_done: Callable[[], object] = lambda: None) -> Survey:
    """Read and decode every image of a source once.

    Args:
      source: the images.
      threads: number of decoding threads; None: one per core.
      on_done: called after each image.
    """
    result = Survey()
    same: defaultdict[bytes, list[str]] = defaultdict(list)
    threads = threads or usable_cores()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), AHEAD * threads):
            part = range(start, min(start + AHEAD * threads, len(source)))
            for facts in pool.map(lambda index: examine(source, index), part):
                _add(result, same, facts)
                on_done()
    result.duplicates = [names for names in same.values() if len(names) > 1]
    return result


def examine(source: Source, index: int) -> Facts:
    """Read and decode one image of a source.

    Args:
      source: the images.
      index: position of the image.
    """
    try:
        example = source[index]
        if isinstance(example.image, np.ndarray):
            height, width = example.image.shape[:2]
            digest = hashlib.sha256(example.image.tobytes()).digest()
            return Facts(
                example.name,
                int(example.label),
                mode="L" if example.image.ndim == 2 else "RGB",
                size=(width, height),
                digest=digest,
            )
        stored = read(example.image, "cv2", example.name)
        height, width = stored.pixels.shape[:2]
        digest = hashlib.sha256(example.image).digest()
        return Facts(example.name, int(example.label), None, stored.mode, (width, height), stored.orientation, digest)
    except InputError as error:
        return Facts("", -1, fault=str(error))


def usual_side(source: Source, most: int = 200) -> int:
    """Return the median of the short sides of a source's images, in pixels, from their headers.

    Args:
      source: the examples.
      most: largest number of images to read, evenly spread over the source.

    Raises:
      InputError: none of these images can be read.
    """
    places = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).round().astype(int))
    with ThreadPoolExecutor(usable_cores()) as pool:
        sides = [side for side in pool.map(lambda index: _short_side(source, int(index)), places) if side]
    if not sides:
        raise InputError(f"none of {len(places)} training images can be read; `verify` says what is wrong with each")
    return int(np.median(sides))


def _short_side(source: Source, index: int) -> int:
    """Return the short side of an image, in pixels; 0 if the image cannot be read."""
    try:
        image = source[index].image
        if isinstance(image, np.ndarray):
            return min(image.shape[:2])
        with Image.open(io.BytesIO(image)) as opened:
            return min(opened.size)
    except (InputError, *DAMAGE):
        return 0


def _add(result: Survey, same: defaultdict[bytes, list[str]], facts: Facts) -> None:
    """Add an image to a survey.

    Args:
      result: the survey.
      same: {hash of an image: names of the images with this hash}.
      facts: the facts about the image.
    """
    result.images += 1
    if facts.fault:
        result.unreadable.append(facts.fault)
        return
    result.sizes[facts.size] += 1
    result.per_label[facts.label] += 1
    same[facts.digest].append(facts.name)
    if facts.mode in ("L", "LA", "1", "I") or facts.mode.startswith("I;16"):
        result.grey.append(facts.name)
    elif facts.mode == "CMYK":
        result.cmyk.append(facts.name)
    if facts.orientation != 1:
        result.rotated.append(facts.name)
