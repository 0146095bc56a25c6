"""Decoding on the host: encoded images to uint8 pixels, the same for every command and the Python API.

`read` alone decides which files are images. JPEG files go to the decoder that the authors of the weights used, all
other files to Pillow; OpenCV decodes the other formats to the same pixels. Animations and files with several pages give
their first image. Transparency is ignored, and 16 bits are cut to their upper eight.
"""

import contextlib
import io
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from ..config import Preprocess
from ..errors import InputError
from . import jpeg

AnyImage = bytes | Image.Image | UInt8[np.ndarray, "height width *channels"]  # Encoded, opened or decoded.
Choice = tuple[bool, jpeg.Box]  # Whether half of the resolution suffices, and the part of the image to decode.

LONGEST = 100  # Largest ratio of the sides: the central square of a longer image shows next to nothing.
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # {mode with colors multiplied by alpha: the mode with plain colors}
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # {EXIF's orientation: OpenCV's code of the flip}
WHITE_IS_ZERO = 0  # TIFF's value for negatives. Pillow inverts only negatives with up to 8 bits.
# The exceptions that decoders raise for damaged files.
DAMAGE = (
    *(ValueError, OSError, SyntaxError, LookupError, RuntimeError, EOFError, struct.error),
    *(cv2.error, Image.DecompressionBombError),
)


class Stored(NamedTuple):
    """An image as its file stores it.

    Attributes:
      pixels: the pixels in RGB, before EXIF's rotation.
      orientation: EXIF's orientation, 1 to 8; 1 for TIFFs, which Pillow turns by itself.
      mode: Pillow's name of the colors in the file.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    orientation: int
    mode: str


def pixels_of(
    image: AnyImage, preprocess: Preprocess, name: str = "image"
) -> UInt8[np.ndarray, "turned_height turned_width channels"]:
    """Decode an image and convert it to the channels that the network takes.

    Args:
      image: the image; arrays are in RGB or grey.
      preprocess: says how to decode, and whether the network takes RGB or grey.
      name: name of the image, for errors.

    Raises:
      InputError: the image is damaged, too narrow, or has no fixed black and white.
    """
    if isinstance(image, np.ndarray):
        _require_breadth(image.shape[0], image.shape[1], name)
        return to_channels(image, preprocess.channels)
    return to_channels(decode(image, preprocess.decoder, name), preprocess.channels)


def decode(
    image: bytes | Image.Image, decoder: str, name: str = "image", *, oriented: bool | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an image to RGB.

    Args:
      image: encoded bytes, or a Pillow image, which gives the pixels that a file with its content would give.
      decoder: "cv2" or "pillow".
      name: name of the image, for errors.
      oriented: whether to apply EXIF's rotation; None does what the decoder does: OpenCV applies it, Pillow does not.

    Raises:
      InputError: the image is damaged, too narrow, or has no fixed black and white.
    """
    stored = read(image, decoder, name)
    oriented = decoder == "cv2" if oriented is None else oriented
    return turned(stored.pixels, stored.orientation) if oriented else stored.pixels


def read(image: bytes | Image.Image, decoder: str, name: str = "image") -> Stored:
    """Decode an image as it is stored, without EXIF's rotation.

    Args:
      image: encoded bytes, or a Pillow image, which gives the pixels that a file with its content would give.
      decoder: "cv2" or "pillow".
      name: name of the image, for errors.

    Raises:
      InputError: the image is damaged, too narrow, or has no fixed black and white.
    """
    _keep_to_one_thread()
    with _damage_named(name):
        if isinstance(image, bytes) and image.startswith(jpeg.START):
            header = _jpeg_header(image, name)
            return Stored(_jpeg_pixels(image, decoder), header.orientation, header.mode)
        opened = _open(image, name) if isinstance(image, bytes) else image
        _require_breadth(opened.height, opened.width, name)
        opened.load()  # Loading reads the orientation of PNGs and turns TIFFs.
        return Stored(_rgb(opened, name), _orientation(opened), opened.mode)


def decode_part(
    data: bytes, decoder: str, choose: Callable[[int, int], Choice], name: str = "image"
) -> UInt8[np.ndarray, "height width 3"] | None:
    """Decode a part of a JPEG with libjpeg-turbo's fastest methods, and as little as possible of the rest.

    Args:
      data: encoded bytes.
      decoder: as in `decode`; here it only decides whether EXIF's rotation applies.
      choose: returns the Choice for the height and width of the image, in pixels.
      name: name of the image, for errors.

    Returns:
      The part in RGB, at full or half resolution. None, without a call of `choose`, for a file that is not a JPEG in
      color or grey.

    Raises:
      InputError: the image is damaged or too narrow.
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
        top, left = box[0] - held[0], box[1] - held[1]
        least = {"min_height": -(-held[2] // 2), "min_width": -(-held[3] // 2), "min_factor": 2} if half else {}
        try:
            pixels = simplejpeg.decode_jpeg(file, "RGB", fastdct=True, fastupsample=True, strict=False, **least)
        except ValueError:  # The other decoders may read the file.
            pixels, (top, left), half = _jpeg_pixels(data, decoder), box[:2], False
        top, left, height, width = (length // 2 if half else length for length in (top, left, *box[2:]))
        return turned(pixels[top : top + height, left : left + width], orientation)


def _keep_to_one_thread() -> None:
    """Turn OpenCV's threads off: several images are decoded at a time, and threads inside an image would compete."""
    cv2.setNumThreads(0)  # Not at import, which must not change settings of the process; it takes 0.2 microseconds.


def turned(
    pixels: UInt8[np.ndarray, "height width 3"], orientation: int
) -> UInt8[np.ndarray, "turned_height turned_width 3"]:
    """Rotate and flip stored pixels.

    Args:
      pixels: the image as stored.
      orientation: EXIF's orientation, 1 to 8.
    """
    if orientation >= 5:
        pixels = cv2.transpose(pixels)
    return cv2.flip(pixels, FLIPS[orientation]) if orientation in FLIPS else pixels


def _stored_box(box: jpeg.Box, orientation: int, height: int, width: int) -> jpeg.Box:
    """Convert a box of the turned image to one of the stored image, whose height and width are given."""
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
    """Replace the exceptions of the decoders by an InputError that names the image."""
    try:
        yield
    except InputError:
        raise  # This ValueError names the image already.
    except DAMAGE as error:
        reason = str(error).splitlines()[0].split(" <_io")[0] if str(error) else type(error).__name__
        raise InputError(f"image {name} is damaged or not an image ({reason}); repair or remove it") from error


def _require_breadth(height: int, width: int, name: str) -> None:
    """Raise InputError if one side of an image is far longer than the other."""
    if max(height, width) > LONGEST * min(height, width):
        raise InputError(
            f"image {name} has {width} x {height} pixels, which is too narrow to show anything; crop a part of it"
        )


def _jpeg_header(data: bytes, name: str) -> jpeg.Header:
    """Read the header of a JPEG file. Raise an exception if the file is truncated or cannot be decoded.

    Pillow also refuses truncated files. OpenCV would silently fill the missing part with grey.
    """
    header = jpeg.read_header(data)
    if header.bits != 8:
        raise InputError(f"image {name} is a JPEG with {header.bits} bits a channel; convert it to 8 bits")
    _require_breadth(header.height, header.width, name)
    return header


def _jpeg_pixels(data: bytes, decoder: str) -> UInt8[np.ndarray, "height width 3"]:
    """Decode a JPEG file as it is stored. If the decoder refuses the file, use the other one."""

    def by_opencv() -> UInt8[np.ndarray, "height width 3"] | None:
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


def _open(data: bytes, name: str) -> Image.Image:
    """Open an image with Pillow. Raise an InputError of its own for 32-bit colors, which Pillow does not support."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        numbers = None
        with contextlib.suppress(*DAMAGE, TypeError):
            numbers = _unbounded_numbers(_tags_of_tiff(data))
        if numbers:
            raise _too_deep(numbers, name) from None
        raise


def _tags_of_tiff(data: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Read the tags of a TIFF's first page. Raise any exception of DAMAGE for other files."""
    big = b"+" in data[2:4]
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big else 8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _unbounded_numbers(tags: Mapping[int, Any]) -> str | None:  # Each tag has a type of its own.
    """Describe the numbers in a TIFF, or return None if they are unsigned and have at most 16 bits."""
    bits, kind = (max(tags.get(tag, (1,))) for tag in (TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.SAMPLEFORMAT))
    if bits > 16:
        return f"{bits} bits"
    return {2: f"signed {bits} bits", 3: f"floats of {bits} bits"}.get(kind)


def _rgb(image: Image.Image, name: str) -> UInt8[np.ndarray, "height width 3"]:
    """Convert a Pillow image to RGB."""
    if image.mode.startswith(("I", "F")):
        grey = _grey_of_16_bits(image, name)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if "transparency" in image.info:  # Pillow would warn that RGB has none.
        image = image.copy()
        del image.info["transparency"]
    return np.asarray(image.convert("RGB"))


def _grey_of_16_bits(image: Image.Image, name: str) -> UInt8[np.ndarray, "height width"]:
    """Return the upper eight bits of a Pillow image; its `convert` would clip the values instead."""
    tags = getattr(image, "tag_v2", {})  # Only TIFFs have tags.
    if not image.mode.startswith("I;16") and (image.mode, image.format) != ("I", "PPM"):
        raise _too_deep(_unbounded_numbers(tags) or "32 bits", name)
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,)))  # 16 or 12.
    grey = (np.asarray(image) >> bits - 8).astype(np.uint8)
    return ~grey if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO else grey


def _too_deep(numbers: str, name: str) -> InputError:
    """Return the InputError about an image whose numbers have no fixed black and white."""
    return InputError(
        f"image {name} has {numbers} a channel, which do not define black and white; convert it to 8 or 16 bits"
    )


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation of a Pillow image, 1 to 8."""
    # Pillow itself joins the EXIF blocks of a JPEG before it reads them.
    segments = [data for place, data in getattr(image, "applist", []) if place == "APP1" and data.startswith(jpeg.EXIF)]
    return jpeg.orientation_in(segments or [image.info.get("exif", b"")])


def to_channels(
    pixels: UInt8[np.ndarray, "height width *grey_or_rgb"], channels: int
) -> UInt8[np.ndarray, "height width {channels}"]:
    """Convert an image to grey or RGB.

    Args:
      pixels: the image: grey (H, W) or (H, W, 1), or RGB (H, W, 3).
      channels: 1 for grey, 3 for RGB.
    """
    if pixels.shape[2:] == (1,):
        pixels = pixels[..., 0]
    if channels == 1 and pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], channels, axis=-1)
    return pixels
