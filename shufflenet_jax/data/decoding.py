"""Encoded images to uint8 pixels, on the host: what every command and the Python API see of a file."""

import contextlib
import io
import struct

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from ..errors import InputError
from . import jpeg

LONGEST = 100  # Times the short side: what is cut from the middle of a longer image shows next to nothing.
# What the decoders raise.
DAMAGE = (
    *(ValueError, OSError, SyntaxError, LookupError, RuntimeError, EOFError, struct.error),
    *(cv2.error, Image.DecompressionBombError),
)
cv2.setNumThreads(0)  # Images are decoded side by side: threads inside one image only get in the way.


def pixels_of(image, preprocess, name="image"):
    """An image as a uint8 array (H, W, C), in RGB or, for networks that take it, in grey."""
    pixels = decode(image, preprocess.decoder, name) if isinstance(image, bytes) else image
    height, width = pixels.shape[:2]
    if max(height, width) > LONGEST * min(height, width):
        raise InputError(
            f"image {name} has {width} x {height} pixels, which is too narrow to tell anything; cut a part out"
        )
    return to_channels(pixels, preprocess.channels)


def decode(data, decoder, name="image", *, oriented=None):
    """Encoded bytes to a uint8 array (H, W, 3) in RGB. Raises InputError naming the image when they are damaged.

    `oriented` says whether EXIF's rotation is applied; by default OpenCV applies it and Pillow does not.
    """
    with damage_named(name):
        if decoder == "cv2":
            _require_whole(data)
            return _decode_opencv(data, oriented=oriented is not False)
        pixels = _decode_pillow(data)
        return _turned(pixels, _require_whole(data).orientation) if oriented else pixels


def decode_part(data, decoder, choose, name="image"):
    """A part of an image by libjpeg-turbo's fastest methods, decoding as little as possible of the rest.

    Args:
      data: encoded bytes.
      decoder: as in `decode`; here it only says whether EXIF counts.
      choose: a function of height and width that returns (whether half of the resolution would do, the part: top,
        left, height and width).
      name: what errors call the image.
    Returns:
      uint8 (height, width, 3) in RGB, or half of both.
    """
    oriented = decoder == "cv2"
    with damage_named(name):
        header = _require_whole(data)
        upright = header.orientation < 5 or not oriented
        half, box = choose(*(header[:2] if upright else header[1::-1]))
        if data.startswith(jpeg.START) and (header.orientation == 1 or not oriented):
            file, held = jpeg.cut(data, header, *box)
            least = {"min_height": -(-held[2] // 2), "min_width": -(-held[3] // 2), "min_factor": 2} if half else {}
            # What it cannot do, like CMYK, is left to OpenCV.
            with contextlib.suppress(ValueError):
                pixels = simplejpeg.decode_jpeg(file, "RGB", fastdct=True, fastupsample=True, strict=False, **least)
                return _part(pixels, (box[0] - held[0], box[1] - held[1], *box[2:]), half)
        return _part(_decode_opencv(data, oriented=oriented, half=half), box, half)


def _part(pixels, box, half):
    top, left, height, width = (length // 2 if half else length for length in box)
    return pixels[top : top + height, left : left + width]


@contextlib.contextmanager
def damage_named(name):
    """Turns what the decoders raise into one error that names the image."""
    try:
        yield
    except InputError:
        raise  # A ValueError too, which names the image already.
    except DAMAGE as error:
        reason = str(error).splitlines()[0].split(" <_io")[0] if str(error) else type(error).__name__
        raise InputError(f"image {name} is damaged or not an image ({reason}); repair or remove it") from error


def _decode_pillow(data):
    """uint8 (H, W, 3) in RGB, as stored."""
    with Image.open(io.BytesIO(data)) as opened:
        # Grey of 16 bits, which `convert` would clip to 8, not scale.
        if opened.mode.startswith("I;16") or (opened.mode, opened.format) == ("I", "PPM"):
            grey = (np.asarray(opened) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        return np.asarray(opened.convert("RGB"))


def _turned(pixels, orientation):
    picture = Image.fromarray(pixels)
    picture.getexif()[jpeg.ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(picture))


def _decode_opencv(data, *, oriented, half=False):
    """uint8 (H, W, 3) in RGB of bytes that are whole."""
    flags = cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR_RGB
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags | (0 if oriented else cv2.IMREAD_IGNORE_ORIENTATION))
    if pixels is None:
        raise ValueError("no decoder knows it")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if half else pixels


def _require_whole(data):
    """A jpeg.Header, after making sure that no part of the image was cut off; of other formats its first fields alone.

    OpenCV paints the missing part of a cut JPEG grey and says nothing; Pillow refuses cut files, and so do we.
    """
    if data.startswith(jpeg.START):
        return jpeg.read_header(data)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        return jpeg.Header(opened.height, opened.width, jpeg.orientation_in(opened.getexif()))


def to_channels(pixels, channels):
    """A grey (H, W) or (H, W, 1) or RGB (H, W, 3) array with 3 channels or 1: (H, W, C)."""
    if pixels.shape[2:] == (1,):
        pixels = pixels[..., 0]
    if channels == 1 and pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], channels, axis=-1)
    return pixels
