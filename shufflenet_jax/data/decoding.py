"""Encoded images to uint8 pixels, on the host: what every command and the Python API see of a file.

`read` alone decides what an image is. Pillow opens all files but JPEG, which the decoder of the weights' authors reads:
where OpenCV reads other formats too, its pixels are Pillow's. Of animations and of files with several pages the first
image counts, transparency is ignored, and 16 bits become their upper eight.
"""

import contextlib
import io
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from ..config import Preprocess
from ..errors import InputError
from . import jpeg

LONGEST = 100  # Times the short side: what is cut from the middle of a longer image shows next to nothing.
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # Modes whose colors are multiplied with alpha, and the same without that.
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # OpenCV's code of the flip that an orientation asks for.
WHITE_IS_ZERO = 0  # TIFF's word for negatives, which Pillow minds only in images of up to 8 bits.
# What the decoders raise.
DAMAGE = (
    *(ValueError, OSError, SyntaxError, LookupError, RuntimeError, EOFError, struct.error),
    *(cv2.error, Image.DecompressionBombError),
)


class Stored(NamedTuple):
    """An image as its file stores it.

    Attributes:
      pixels: uint8 (H, W, 3) in RGB, before EXIF's rotation.
      orientation: EXIF's, 1 to 8. Pillow turns TIFFs by itself, and theirs is 1.
      mode: Pillow's name of the colors that the file holds.
    """

    pixels: np.ndarray
    orientation: int
    mode: str


def pixels_of(image: bytes | Image.Image | np.ndarray, preprocess: Preprocess, name: str = "image") -> np.ndarray:
    """Return an image as a uint8 array (H, W, C), in RGB or, for networks that take it, in grey."""
    if isinstance(image, np.ndarray):
        _require_breadth(image.shape[0], image.shape[1], name)
        return to_channels(image, preprocess.channels)
    return to_channels(decode(image, preprocess.decoder, name), preprocess.channels)


def decode(
    image: bytes | Image.Image, decoder: str, name: str = "image", *, oriented: bool | None = None
) -> np.ndarray:
    """Decode an image to a uint8 array (H, W, 3) in RGB.

    Args:
      image: encoded bytes, or a Pillow image, which gives what a file with its content would.
      decoder: "cv2" or "pillow".
      name: what errors call the image.
      oriented: whether to apply EXIF's rotation; by default as OpenCV, which does, and Pillow, which does not.
    Raises:
      InputError: the image is damaged, or nobody can know what its pixels mean.
    """
    stored = read(image, decoder, name)
    oriented = decoder == "cv2" if oriented is None else oriented
    return turned(stored.pixels, stored.orientation) if oriented else stored.pixels


def read(image: bytes | Image.Image, decoder: str, name: str = "image") -> Stored:
    """Read an image as it is stored; arguments and errors as in `decode`."""
    _keep_to_one_thread()
    with _damage_named(name):
        if isinstance(image, bytes) and image.startswith(jpeg.START):
            header = _jpeg_header(image, name)
            return Stored(_jpeg_pixels(image, decoder), header.orientation, header.mode)
        opened = _open(image, name) if isinstance(image, bytes) else image
        _require_breadth(opened.height, opened.width, name)
        opened.load()  # Only then PNGs know their orientation, and TIFFs are turned.
        return Stored(_rgb(opened, name), _orientation(opened), opened.mode)


def decode_part(
    data: bytes, decoder: str, choose: Callable[[int, int], tuple[bool, tuple]], name: str = "image"
) -> np.ndarray | None:
    """Decode a part of a JPEG by libjpeg-turbo's fastest methods, and as little as possible of the rest.

    Args:
      data: encoded bytes.
      decoder: as in `decode`; here it only says whether EXIF counts.
      choose: a function of height and width that returns (whether half of the resolution would do, the part: top,
        left, height and width).
      name: what errors call the image.
    Returns:
      uint8 (height, width, 3) in RGB, or half of both; None for what is no JPEG in color or grey, before `choose` is
      called.
    """
    if not data.startswith(jpeg.START):
        return None
    _keep_to_one_thread()
    with _damage_named(name):
        header = _jpeg_header(data, name)
        if header.mode == "CMYK":
            return None
        orientation = header.orientation if decoder == "cv2" else 1
        half, box = choose(*(header[:2] if orientation < 5 else header[1::-1]))
        box = _stored_box(box, orientation, header.height, header.width)
        file, held = jpeg.cut(data, header, *box)
        least = {"min_height": -(-held[2] // 2), "min_width": -(-held[3] // 2), "min_factor": 2} if half else {}
        try:
            pixels = simplejpeg.decode_jpeg(file, "RGB", fastdct=True, fastupsample=True, strict=False, **least)
        except ValueError:  # The others may know what to do.
            pixels, held, half = _jpeg_pixels(data, decoder), (0, 0), False
        box = (box[0] - held[0], box[1] - held[1], *box[2:])
        top, left, height, width = (length // 2 if half else length for length in box)
        return turned(pixels[top : top + height, left : left + width], orientation)


def _keep_to_one_thread():
    """Turn OpenCV's threads off: images are decoded side by side, and threads inside one image get in the way."""
    cv2.setNumThreads(0)  # Not at import, which must change no setting of the process; it takes 0.2 microseconds.


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels (H, W, 3) as EXIF's orientation asks."""
    if orientation >= 5:
        pixels = cv2.transpose(pixels)
    return cv2.flip(pixels, FLIPS[orientation]) if orientation in FLIPS else pixels


def _stored_box(box, orientation, height, width):
    """Where a box (top, left, height, width) of the turned image lies in the stored one, of that height and width."""
    top, left, tall, wide = box
    if orientation >= 5:
        height, width = width, height
    flip = FLIPS.get(orientation)
    if flip in (0, -1):
        top = height - top - tall
    if flip in (1, -1):
        left = width - left - wide
    return (top, left, tall, wide) if orientation < 5 else (left, top, wide, tall)


@contextlib.contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Turn what the decoders raise into one error that names the image."""
    try:
        yield
    except InputError:
        raise  # A ValueError too, which names the image already.
    except DAMAGE as error:
        reason = str(error).splitlines()[0].split(" <_io")[0] if str(error) else type(error).__name__
        raise InputError(f"image {name} is damaged or not an image ({reason}); repair or remove it") from error


def _require_breadth(height, width, name):
    if max(height, width) > LONGEST * min(height, width):
        raise InputError(
            f"image {name} has {width} x {height} pixels, which is too narrow to tell anything; cut a part out"
        )


def _jpeg_header(data, name):
    """The jpeg.Header of a file that can be decoded.

    OpenCV paints the missing part of a cut JPEG grey and says nothing; Pillow refuses cut files, and so do we.
    """
    header = jpeg.read_header(data)
    if header.bits != 8:
        raise InputError(f"image {name} is a JPEG with {header.bits} bits a channel; convert it to 8 bits")
    _require_breadth(header.height, header.width, name)
    return header


def _jpeg_pixels(data, decoder):
    """uint8 (H, W, 3) in RGB, as stored. Where the decoder refuses the file, the other one decides for both."""

    def by_opencv():
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)

    pixels = by_opencv() if decoder == "cv2" else None
    if pixels is not None:
        return pixels
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except UnidentifiedImageError:
        pixels = by_opencv()
        if pixels is None:
            raise
        return pixels


def _open(data, name):
    """A Pillow image. Colors of 32 bits, which Pillow does not know, are no damage."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        numbers = None
        with contextlib.suppress(*DAMAGE, TypeError):
            numbers = _unbounded_numbers(_tags_of_tiff(data))
        if numbers:
            raise _too_deep(numbers, name) from None
        raise


def _tags_of_tiff(data):
    """The tags of the first page. Raises any of DAMAGE for other files."""
    big = b"+" in data[2:4]
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big else 8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _unbounded_numbers(tags):
    """What numbers a TIFF holds, if not unsigned ones of at most 16 bits; else None."""
    bits, kind = (max(tags.get(tag, (1,))) for tag in (TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.SAMPLEFORMAT))
    if bits > 16:
        return f"{bits} bits"
    return {2: f"signed {bits} bits", 3: f"floats of {bits} bits"}.get(kind)


def _rgb(image, name):
    """uint8 (H, W, 3) of a Pillow image."""
    if image.mode.startswith(("I", "F")):
        grey = _grey_of_16_bits(image, name)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if "transparency" in image.info:  # Pillow would warn that RGB has none.
        image = image.copy()
        del image.info["transparency"]
    return np.asarray(image.convert("RGB"))


def _grey_of_16_bits(image, name):
    """uint8 (H, W): the upper eight bits, which Pillow's `convert` would not take but clip."""
    tags = getattr(image, "tag_v2", {})  # Only TIFFs have them.
    if not image.mode.startswith("I;16") and (image.mode, image.format) != ("I", "PPM"):
        raise _too_deep(_unbounded_numbers(tags) or "32 bits", name)
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,)))  # Or 12.
    grey = (np.asarray(image) >> bits - 8).astype(np.uint8)
    return ~grey if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO else grey


def _too_deep(numbers, name):
    """The InputError about numbers that have no fixed black and white."""
    return InputError(
        f"image {name} has {numbers} a channel, which do not say what is black and what is white; "
        "convert it to 8 or 16 bits"
    )


def _orientation(image):
    """EXIF's orientation of a Pillow image, 1 to 8. Pillow joins the blocks of a JPEG, and then reads the first one."""
    segments = [data for place, data in getattr(image, "applist", []) if place == "APP1" and data.startswith(jpeg.EXIF)]
    return jpeg.orientation_in(segments or [image.info.get("exif", b"")])


def to_channels(pixels, channels):
    """A grey (H, W) or (H, W, 1) or RGB (H, W, 3) array with 3 channels or 1: (H, W, C)."""
    if pixels.shape[2:] == (1,):
        pixels = pixels[..., 0]
    if channels == 1 and pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], channels, axis=-1)
    return pixels
