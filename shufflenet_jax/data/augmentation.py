"""What training does to an image on the host: random crops, colours and shapes, all drawn from one generator.

RandomResizedCrop follows MMPretrain, the others torchvision's transforms of the same names.
"""

import math

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from . import decoding, geometry

MAGNITUDES = 31  # Steps in which TrivialAugmentWide draws the strength of an operation.


def training_row(example, config, preprocess, rng):
    """One example as a row of a training batch, but for its label.

    Args:
      example: an Example.
      config: a TrainConfig.
      preprocess: its Preprocess.
      rng: a NumPy generator; every random decision comes from it.
    Returns:
      {"images": uint8 (side, side, C)}, and what is left to the device: "flip", whether to mirror it, and "erase",
      int32 (4,), the rectangle to blank, each where the configuration asks for it.
    Raises:
      InputError: the image is damaged.
    """
    if config.crop == "random":
        crop = fast_random_crop if config.transform == "fast" else exact_random_crop
        pixels = crop(example, preprocess, config.min_area, rng)
    else:
        pixels = geometry.prepare(example.image, preprocess, example.name)
    if config.shift:
        pixels = random_shift(pixels, rng, config.shift)
    row = {}
    if config.color_jitter:
        pixels = color_jitter(pixels, rng, config.color_jitter)
    if config.flip:
        row["flip"] = rng.random() < 0.5
    if config.trivial_augment:
        # These operations come after the flip, and some depend on the side they start from.
        pixels = trivial_augment(pixels[:, ::-1] if row.pop("flip", False) else pixels, rng)
    if config.random_erasing:
        erased = rng.random() < config.random_erasing
        row["erase"] = erased_rectangle(pixels.shape, rng) if erased else np.zeros(4, np.int32)
    return {"images": pixels, **row}


def random_crop_box(height, width, rng, min_area=0.08):
    """MMPretrain's RandomResizedCrop: (top, left, height, width) of an area U(min_area, 1) and ratio 3/4 .. 4/3."""
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        # All draws of a try at once: a call of the generator takes longer than a draw.
        area, ratio, top, left = rng.random(4).tolist()
        area = (min_area + (1 - min_area) * area) * height * width
        ratio = low * (high / low) ** ratio
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    # Too long an image for ten tries: the largest centred rectangle of an allowed ratio.
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (height - h) // 2, (width - w) // 2, h, w


def exact_random_crop(example, preprocess, min_area, rng):
    """A random part of an image at the network's resolution, to the pixel as MMPretrain makes it with Pillow."""
    pixels = decoding.pixels_of(example.image, preprocess, example.name)
    top, left, height, width = random_crop_box(*pixels.shape[:2], rng, min_area)
    return geometry.resize_pillow(pixels[top : top + height, left : left + width], (preprocess.crop,) * 2)


def fast_random_crop(example, preprocess, min_area, rng):
    """The same crop of a JPEG by faster means: libjpeg-turbo's fast methods, at half the size where that suffices, and
    OpenCV. Of all other images it is the exact one.

    Differs from the exact one in how pixels are interpolated, by 2.3 of 255 on average over 201 ImageNet images, and in
    that crops of half-size images start and end on even pixels.
    """
    side, part = preprocess.crop, None

    def choose(height, width):
        box = random_crop_box(height, width, rng, min_area)
        return min(box[2:]) >= 2 * side, box

    if isinstance(example.image, bytes):
        part = decoding.decode_part(example.image, preprocess.decoder, choose, example.name)
    if part is None:
        return exact_random_crop(example, preprocess, min_area, rng)
    part = decoding.to_channels(part, preprocess.channels)
    return cv2.resize(part, (side, side), interpolation=cv2.INTER_LINEAR).reshape(side, side, -1)


def random_shift(pixels, rng, reach):
    """Moves an image by up to `reach` pixels along each axis; uncovered pixels become 0."""
    top, left = rng.integers(0, 2 * reach + 1, size=2)
    height, width, channels = pixels.shape
    padded = np.zeros((height + 2 * reach, width + 2 * reach, channels), np.uint8)  # np.pad takes ten times as long.
    padded[reach:-reach, reach:-reach] = pixels
    return padded[top : top + height, left : left + width]


def color_jitter(pixels, rng, strength):
    """Brightness, contrast and saturation, each times U(1 - strength, 1 + strength), in random order."""
    image = _as_picture(pixels)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, size=3)
    for position in rng.permutation(3):
        image = enhancers[position](image).enhance(factors[position])
    return np.asarray(image).reshape(pixels.shape)


def _as_picture(pixels: np.ndarray) -> Image.Image:
    """Make a Pillow image of a uint8 array (H, W, 3) or (H, W, 1)."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _posterize(image, strength):
    return ImageOps.posterize(image, 8 - round(6 * strength))


# name: (has a sign, operation on an image and a strength in 0..1 or, with a sign, -1..1)
TRIVIAL = {
    "identity": (False, lambda image, _: image),
    "shear x": (True, lambda image, s: _affine(image, 1, 0.99 * s, 0, 0, 1, 0)),
    "shear y": (True, lambda image, s: _affine(image, 1, 0, 0, 0.99 * s, 1, 0)),
    "translate x": (True, lambda image, s: _affine(image, 1, 0, -int(32 * s), 0, 1, 0)),
    "translate y": (True, lambda image, s: _affine(image, 1, 0, 0, 0, 1, -int(32 * s))),
    "rotate": (True, lambda image, s: image.rotate(135 * s, Image.Resampling.BILINEAR)),
    "brightness": (True, lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.99 * s)),
    "color": (True, lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.99 * s)),
    "contrast": (True, lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.99 * s)),
    "sharpness": (True, lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.99 * s)),
    "posterize": (False, _posterize),
    "solarize": (False, lambda image, s: ImageOps.solarize(image, 255 * (1 - s))),
    "autocontrast": (False, lambda image, _: ImageOps.autocontrast(image)),
    "equalize": (False, lambda image, _: ImageOps.equalize(image)),
}


def trivial_augment(pixels, rng):
    """TrivialAugmentWide: one operation out of fourteen, at one of 31 strengths. uint8 (H, W, C) both."""
    signed, operation = list(TRIVIAL.values())[rng.integers(len(TRIVIAL))]
    strength = rng.integers(MAGNITUDES) / (MAGNITUDES - 1)
    if signed and rng.random() < 0.5:
        strength = -strength
    return np.asarray(operation(_as_picture(pixels), strength)).reshape(pixels.shape)


def erased_rectangle(shape, rng):
    """Random erasing: int32 (4,) with top, left, height, width of 2 % to 33 % of the area, ratio 0.3 .. 3.3."""
    height, width = shape[:2]
    for _ in range(10):
        area = rng.uniform(0.02, 0.33) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            corner = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return np.array([*corner, h, w], np.int32)
    return np.zeros(4, np.int32)
