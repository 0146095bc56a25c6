"""The published weights by name: their figures, their sources, and the download of their files."""

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from . import progress
from .architecture import Layout
from .errors import InputError
from .files import cache_dir, hash_of, locked, written_aside

logger = logging.getLogger(__name__)

CARD = "shufflenet-v2-1x_16xb64_in1k"  # The model card that this project follows.
MIRROR = "SHUFFLENET_JAX_MIRROR"
OPENMMLAB = "https://download.openmmlab.com/mmclassification/v0/shufflenet_v2/"
UNREACHED = (OSError, ValueError, http.client.HTTPException)  # What urllib raises.
SILENT_SECONDS = 60  # After which a server that sends nothing is given up.
SLOWEST = 1000  # Bytes a second, on average; a slower server is given up.
LARGEST_DOWNLOAD = 100_000_000  # Bytes: three times the largest published file, and more than photographs have.
CHUNK = 2**16  # Bytes.
PYTORCH = "https://download.pytorch.org/models/"


class Published(NamedTuple):
    """A file of weights trained on ImageNet-1k.

    Attributes:
      width: of the network.
      layout: of the network.
      top1: percent on the validation images, as published.
      top5: percent on the validation images, as published.
      file: its name.
      sha256: first digits of the file's hash.
      place: URL of its folder; None means the authors' cloud drive, from which programs cannot download.
      source: the project that published it.
      licence: of the weights.
    """

    width: float
    layout: Layout
    top1: float
    top5: float
    file: str
    sha256: str
    place: str | None
    source: str
    licence: str


def _torchvision(width: float, top1: float, top5: float, file: str, sha256: str) -> Published:
    return Published(width, "torchvision", top1, top5, file, sha256, PYTORCH, "torchvision", "BSD-3-Clause")


def _megvii(width: float, top1: float, top5: float) -> Published:
    return Published(width, "megvii", top1, top5, f"ShuffleNetV2.{width}x.pth.tar", "", None, "Megvii", "MIT")


PUBLISHED = {
    CARD: Published(
        1.0,
        "torchvision",
        69.55,
        88.92,
        "shufflenet_v2_batch1024_imagenet_20200812-5bf4721e.pth",
        "5bf4721e",
        OPENMMLAB,
        "MMPretrain",
        "Apache-2.0",
    ),
    "shufflenet_v2_x0_5": _torchvision(0.5, 60.552, 81.746, "shufflenetv2_x0.5-f707e7126e.pth", "f707e7126e"),
    "shufflenet_v2_x1_0": _torchvision(1.0, 69.362, 88.316, "shufflenetv2_x1-5666bf0f80.pth", "5666bf0f80"),
    "shufflenet_v2_x1_5": _torchvision(1.5, 72.996, 91.086, "shufflenetv2_x1_5-3c479a10.pth", "3c479a10"),
    "shufflenet_v2_x2_0": _torchvision(2.0, 76.230, 93.006, "shufflenetv2_x2_0-8be3c8ee.pth", "8be3c8ee"),
    "megvii-0.5x": _megvii(0.5, 61.1, 82.6),
    "megvii-1.0x": _megvii(1.0, 69.4, 88.9),
    "megvii-1.5x": _megvii(1.5, 72.6, 90.6),
    "megvii-2.0x": _megvii(2.0, 75.0, 92.4),
}


def list_models() -> dict[str, Published]:
    """Return {name: Published}, with the figures that their authors publish."""
    return dict(PUBLISHED)


def find(name: str) -> Published:
    """Return the published weights of a name.

    Args:
      name: a key of PUBLISHED.

    Raises:
      InputError: there are none.
    """
    if name not in PUBLISHED:
        raise InputError(f"no published model is called {name!r}; there are {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def is_at_hand(name: str) -> bool:
    """Return whether a published file is in the cache.

    Args:
      name: a key of PUBLISHED.
    """
    return _place_of(name).exists()


def _place_of(name: str, folder: Path | None = None) -> Path:
    return (folder or cache_dir() / "downloads") / find(name).file


def file_of(name: str, folder: Path | None = None) -> Path:
    """Return the path of a published file, downloaded on first use.

    SHUFFLENET_JAX_MIRROR names a URL of a folder from which all files come instead.

    Args:
      name: a key of PUBLISHED.
      folder: where to keep the file; by default the cache, which SHUFFLENET_JAX_CACHE chooses.

    Raises:
      InputError: the download fails, or returns another file; then no file is left.
    """
    published = find(name)
    target = _place_of(name, folder)
    if published.place is None and not (os.environ.get(MIRROR) or target.exists()):
        raise InputError(
            f"{name} cannot be downloaded by a program: get {published.file} from its authors, and give its path, or "
            f"put it at {target}"
        )
    return downloaded(published.file, published.place, published.sha256, folder)


def downloaded(file: str, place: str | None, sha256: str, folder: Path | None = None) -> Path:
    """Return the path of a file, downloaded on first use.

    Args:
      file: its name.
      place: URL of its folder, unless SHUFFLENET_JAX_MIRROR names another.
      sha256: first digits of its hash.
      folder: where to keep it; by default the cache.

    Raises:
      InputError: the download fails, or returns another file; then no file is left.
    """
    target = (folder or cache_dir() / "downloads") / file
    if target.exists():  # Perhaps put there by hand.
        if not hash_of(target).startswith(sha256):
            raise InputError(f"{target} is another file: its sha256 does not begin with {sha256}; remove it")
        return target
    url = f"{(os.environ.get(MIRROR) or place or '').rstrip('/')}/{file}"
    with locked(target):
        if not target.exists():
            _download(url, target, sha256)
    return target


def _download(url: str, target: Path, sha256: str) -> None:
    elsewhere = f"download it elsewhere and put it at {target}, or name a mirror in {MIRROR}"
    logger.info("downloading %s", url)
    try:
        content = fetch(url, seconds=SILENT_SECONDS, description=target.name)
    except UNREACHED as error:
        raise InputError(f"{url} cannot be downloaded ({reason_of(error)}); {elsewhere}") from error
    if not hashlib.sha256(content).hexdigest().startswith(sha256):
        raise InputError(f"{url} is another file: its sha256 does not begin with {sha256}; {elsewhere}")
    with written_aside(target) as draft:
        draft.write_bytes(content)


def fetch(url: str, *, seconds: float, description: str | None = None) -> bytes:
    """Return the bytes at an address, at most LARGEST_DOWNLOAD of them.

    Args:
      url: the address.
      seconds: longest time without an answer, and twice that the longest before the average rate counts.
      description: for a progress bar; None shows none.

    Raises:
      OSError, ValueError, HTTPException: the download fails, is too large or too slow, or is cut off.
    """
    # Some servers refuse urllib's own name.
    request = urllib.request.Request(url, headers={"User-Agent": "shufflenet-jax"})
    content, began = bytearray(), time.monotonic()
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        size = int(answer.headers.get("Content-Length") or 0)
        bar: progress.Bar = progress.SilentBar()
        if description:
            bar = progress.bar(total=size or None, unit="B", scaled=True, description=description)
        with bar:
            while max(size, len(content)) <= LARGEST_DOWNLOAD and (part := answer.read1(CHUNK)):
                content += part
                if time.monotonic() - began > 2 * seconds + len(content) / SLOWEST:
                    raise OSError(f"it is too slow: {len(content):,} bytes in {time.monotonic() - began:.0f} seconds")
                bar.update(len(part))
    if max(size, len(content)) > LARGEST_DOWNLOAD:
        raise OSError(f"it has more than {LARGEST_DOWNLOAD:,} bytes")
    if len(content) < size:
        raise OSError(f"it was cut off after {len(content):,} of {size:,} bytes")
    return bytes(content)


def reason_of(error: Exception) -> str:
    """Describe why urllib could not fetch something, and close the connection to a server that refused.

    Args:
      error: one of UNREACHED.
    """
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return str(error)
    return str(getattr(error, "reason", None) or error)
