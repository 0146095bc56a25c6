"""From encoded images to uint8 crops on the host, and from those to the network's input on the device.

The evaluation transforms follow MMPretrain, torchvision and Megvii to the pixel.
"""

import io

import cv2
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ..errors import InputError

cv2.setNumThreads(0)  # Images are decoded side by side: threads inside one image only get in the way.


def prepare(image, preprocess, name="image"):
    """The whole evaluation transform but normalisation.

    Args:
      image: encoded bytes, or a uint8 array (H, W, 3) in RGB or (H, W) in grey.
      preprocess: a Preprocess.
      name: what errors call the image.
    Returns:
      uint8 (crop, crop, C), RGB or grey.
    """
    pixels = decode(image, preprocess.decoder, name) if isinstance(image, bytes) else image
    return center_crop(resize_short_side(to_channels(pixels, preprocess.channels), preprocess), preprocess.crop)


def decode(data, decoder, name="image"):
    """Encoded bytes to a uint8 array (H, W, 3) in RGB. Raises InputError naming the image when they are damaged."""
    try:
        if decoder == "cv2":
            _require_whole_jpeg(data)
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            if pixels is None:
                raise ValueError("no decoder knows it")
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        with Image.open(io.BytesIO(data)) as opened:
            return np.asarray(opened.convert("RGB"))
    except (ValueError, OSError, SyntaxError, cv2.error, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0].split(" <_io")[0] if str(error) else type(error).__name__
        raise InputError(f"image {name} is damaged or not an image ({reason}); repair or remove it") from error


def _require_whole_jpeg(data):
    """OpenCV paints the missing part of a cut JPEG grey and says nothing; Pillow refuses it, and so do we."""
    if not data.startswith(b"\xff\xd8"):
        return
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    # Behind the start of the scan, 0xFF is followed by 0xD9 at the end of the image alone.
    if data.find(b"\xff\xd9", position) < 0:
        raise ValueError("the file is truncated")


def to_channels(pixels, channels):
    """A grey (H, W) or RGB (H, W, 3) array with 3 channels or 1: (H, W, C)."""
    if channels == 1 and pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], channels, axis=-1)
    return pixels


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
    size = tuple(target if side == short else int(target * side / short) for side in (width, height))
    # Image.fromarray knows grey images without a channel axis alone.
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    return np.asarray(Image.fromarray(squeezed).resize(size, Image.Resampling.BILINEAR)).reshape(size[1], size[0], -1)


def center_crop(pixels, side):
    """The central square of a uint8 (H, W, C) array."""
    # Python's round takes halves to the even neighbour, like the originals.
    top, left = (max(0, round((length - side) / 2)) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def random_shift(pixels, rng, reach):
    """Moves an image by up to `reach` pixels along each axis; uncovered pixels become 0."""
    top, left = rng.integers(0, 2 * reach + 1, size=2)
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)))[top : top + height, left : left + width]


def normalize(images, preprocess, dtype=jnp.float32):
    """uint8 crops (B, H, W, C) in RGB or grey to the network's input, on the device."""
    if preprocess.channel_order == "BGR":
        images = images[..., ::-1]
    mean, std = (jnp.asarray(v, dtype)[None, None, None] for v in (preprocess.mean, preprocess.std))
    return (images.astype(dtype) * preprocess.scale - mean) / std
