"""What is in a data set: which images cannot be read, which are unusual, and how they spread over the classes."""

import hashlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .decoding import read
from .workers import usable_cores

AHEAD = 64  # Images under way at a time, for each thread.


class Facts(NamedTuple):
    """One image."""

    name: str
    label: int
    fault: str | None = None  # Why it cannot be read.
    mode: str = "L"  # Pillow's name of its colours, as stored.
    size: tuple[int, int] = (0, 0)  # Width and height, as stored.
    orientation: int = 1  # EXIF's.
    digest: bytes = b""


@dataclass
class Survey:
    """All images: names of the unusual ones, and counts."""

    images: int = 0
    unreadable: list = field(default_factory=list)  # What is wrong with which image.
    grey: list = field(default_factory=list)
    cmyk: list = field(default_factory=list)
    rotated: list = field(default_factory=list)  # By EXIF; torchvision's preprocessing does not turn them.
    duplicates: list = field(default_factory=list)  # Groups of names with the same bytes.
    sizes: Counter = field(default_factory=Counter)  # {(width, height): images}
    per_label: Counter = field(default_factory=Counter)  # {label: images}


def survey(source, *, threads=None, on_done=lambda: None):
    """Reads and decodes every image of a Source once; `on_done` is called after each. Returns a Survey."""
    found, same = Survey(), defaultdict(list)
    threads = threads or usable_cores()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), AHEAD * threads):
            part = range(start, min(start + AHEAD * threads, len(source)))
            for facts in pool.map(lambda index: examine(source, index), part):
                _add(found, same, facts)
                on_done()
    found.duplicates = [names for names in same.values() if len(names) > 1]
    return found


def examine(source, index):
    """The Facts of one image."""
    try:
        example = source[index]
        if isinstance(example.image, np.ndarray):
            height, width = example.image.shape[:2]
            digest = hashlib.sha256(example.image.tobytes()).digest()
            return Facts(
                example.name,
                example.label,
                mode="L" if example.image.ndim == 2 else "RGB",
                size=(width, height),
                digest=digest,
            )
        stored = read(example.image, "cv2", example.name)
        height, width = stored.pixels.shape[:2]
        digest = hashlib.sha256(example.image).digest()
        return Facts(example.name, example.label, None, stored.mode, (width, height), stored.orientation, digest)
    except InputError as error:
        return Facts("", -1, fault=str(error))


def _add(found, same, facts):
    found.images += 1
    if facts.fault:
        found.unreadable.append(facts.fault)
        return
    found.sizes[facts.size] += 1
    found.per_label[facts.label] += 1
    same[facts.digest].append(facts.name)
    if facts.mode in ("L", "LA", "1", "I") or facts.mode.startswith("I;16"):
        found.grey.append(facts.name)
    elif facts.mode == "CMYK":
        found.cmyk.append(facts.name)
    if facts.orientation != 1:
        found.rotated.append(facts.name)
