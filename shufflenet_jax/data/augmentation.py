"""Augmentation on the host: random crops, colors and shapes. One generator draws all random numbers of an image.

RandomResizedCrop follows MMPretrain, the other transforms follow torchvision's of the same names.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageEnhance, ImageOps

from ..config import Preprocess, TrainConfig
from . import decoding, geometry
from .jpeg import Box
from .sources import Example

Pixels = UInt8[np.ndarray, "height width channels"]

MAGNITUDES = 31  # Number of strengths from which TrivialAugmentWide draws.


class Operation(NamedTuple):
    """An operation of TrivialAugmentWide or RandAugment.

    Attributes:
      signed: whether it has two directions.
      change: function of an image and a strength from 0, or with two directions from -1, to 1.
    """

    signed: bool
    change: Callable[[Image.Image, float], Image.Image]


def training_row(
    example: Example, config: TrainConfig, preprocess: Preprocess, rng: np.random.Generator
) -> dict[str, Any]:  # The values have several types.
    """Return an example as a row of a training batch, without its label.

    Args:
      example: the example.
      config: says which augmentations to apply.
      preprocess: how to prepare the image.
      rng: draws all random numbers.

    Returns:
      {"images": uint8 (H, W, C)} and, if the configuration asks for them, two augmentations that the device will apply:
      "flip", whether to mirror the image, and "erase", int32 (4,), the rectangle to blank.

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
    row: dict[str, Any] = {}
    if config.color_jitter:
        pixels = color_jitter(pixels, rng, config.color_jitter)
    if config.flip:
        row["flip"] = rng.random() < 0.5
    if config.trivial_augment or config.rand_augment:
        # These operations follow the flip, since some of them treat left and right differently.
        pixels = pixels[:, ::-1] if row.pop("flip", False) else pixels
    if config.trivial_augment:
        pixels = trivial_augment(pixels, rng)
    if config.rand_augment:
        pixels = rand_augment(pixels, rng, config.rand_augment, config.rand_magnitude)
    if config.random_erasing:
        erased = rng.random() < config.random_erasing
        row["erase"] = erased_rectangle(pixels.shape, rng) if erased else np.zeros(4, np.int32)
    return {"images": pixels, **row}


def random_crop_box(height: int, width: int, rng: np.random.Generator, min_area: float = 0.08) -> Box:
    """Draw the part of an image to crop, as MMPretrain's RandomResizedCrop does.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      rng: draws the random numbers.
      min_area: smallest area, as a share of the image's. The area is uniform from there to 1, the aspect ratio lies
        between 3/4 and 4/3.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        # One call draws all numbers of a try, since a call takes longer than a draw.
        area, ratio, top, left = rng.random(4).tolist()
        area = (min_area + (1 - min_area) * area) * height * width
        ratio = low * (high / low) ** ratio
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    # A long image may fail ten times. Take its largest central rectangle with an allowed ratio.
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (height - h) // 2, (width - w) // 2, h, w


def exact_random_crop(example: Example, preprocess: Preprocess, min_area: float, rng: np.random.Generator) -> Pixels:
    """Crop and resize a random part of an image. The pixels equal those of MMPretrain with Pillow.

    Args:
      example: the image.
      preprocess: how to decode it, and the size of the result.
      min_area: smallest area, as a share of the image's.
      rng: draws the random numbers.

    Raises:
      InputError: the image is damaged.
    """
    pixels = decoding.pixels_of(example.image, preprocess, example.name)
    top, left, height, width = random_crop_box(pixels.shape[0], pixels.shape[1], rng, min_area)
    return geometry.resize_pillow(pixels[top : top + height, left : left + width], preprocess.size[::-1])


def fast_random_crop(example: Example, preprocess: Preprocess, min_area: float, rng: np.random.Generator) -> Pixels:
    """Crop and resize the same part as `exact_random_crop`, of a JPEG by faster methods.

    These are libjpeg-turbo's fast methods, at half the resolution if that suffices, and OpenCV's scaling. The pixels
    differ from the exact ones by 2.3 of 255, the mean over 201 ImageNet images, because the interpolation differs and
    crops at half the resolution start and end on even pixels.

    Args:
      example: the image.
      preprocess: how to decode it, and the size of the result.
      min_area: smallest area, as a share of the image's.
      rng: draws the random numbers.

    Raises:
      InputError: the image is damaged.
    """
    (tall, wide), part = preprocess.size, None

    def choose(height: int, width: int) -> decoding.Choice:
        box = random_crop_box(height, width, rng, min_area)
        return box[2] >= 2 * tall and box[3] >= 2 * wide, box

    if isinstance(example.image, bytes):
        part = decoding.decode_part(example.image, preprocess.decoder, choose, example.name)
    if part is None:
        return exact_random_crop(example, preprocess, min_area, rng)
    part = decoding.to_channels(part, preprocess.channels)
    return cv2.resize(part, (wide, tall), interpolation=cv2.INTER_LINEAR).reshape(tall, wide, -1)


def random_shift(pixels: Pixels, rng: np.random.Generator, reach: int) -> Pixels:
    """Shift an image by a random number of pixels along each axis. Uncovered pixels become 0.

    Args:
      pixels: the image.
      rng: draws the random numbers.
      reach: largest shift, in pixels.
    """
    top, left = rng.integers(0, 2 * reach + 1, size=2)
    height, width, channels = pixels.shape
    padded = np.zeros((height + 2 * reach, width + 2 * reach, channels), np.uint8)  # np.pad takes ten times as long.
    padded[reach:-reach, reach:-reach] = pixels
    return padded[top : top + height, left : left + width]


def color_jitter(pixels: Pixels, rng: np.random.Generator, strength: float) -> Pixels:
    """Change brightness, contrast and saturation in random order, as torchvision's ColorJitter does.

    Args:
      pixels: the image.
      rng: draws the random numbers.
      strength: the factors are uniform from 1 - strength to 1 + strength.
    """
    image = _as_picture(pixels)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, size=3)
    for position in rng.permutation(3):
        image = enhancers[position](image).enhance(factors[position])
    return np.asarray(image).reshape(pixels.shape)


def _as_picture(pixels: Pixels) -> Image.Image:
    """Convert RGB or grey pixels to a Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _operations(
    *, shear: float, translate: Callable[[int], float], rotate: float, enhance: float, bits: int
) -> dict[str, Operation]:
    """Return the fourteen operations by their names.

    Args:
      shear: tangent of the angle at full strength.
      translate: function from the length of a side to the shift along it at full strength, both in pixels.
      rotate: angle at full strength, in degrees.
      enhance: largest change of brightness, color, contrast and sharpness, whose factors are 1 without a change.
      bits: bits that posterizing removes at full strength.
    """

    def enhanced(kind: Callable[[Image.Image], Any]) -> Operation:  # Pillow's enhancers share no public type.
        return Operation(True, lambda image, s: kind(image).enhance(1 + enhance * s))

    def shifted(image: Image.Image, right: float, down: float) -> Image.Image:
        return _affine(image, 1, 0, -int(translate(image.width) * right), 0, 1, -int(translate(image.height) * down))

    return {
        "identity": Operation(False, lambda image, _: image),
        "shear x": Operation(True, lambda image, s: _affine(image, 1, shear * s, 0, 0, 1, 0)),
        "shear y": Operation(True, lambda image, s: _affine(image, 1, 0, 0, shear * s, 1, 0)),
        "translate x": Operation(True, lambda image, s: shifted(image, s, 0)),
        "translate y": Operation(True, lambda image, s: shifted(image, 0, s)),
        "rotate": Operation(True, lambda image, s: image.rotate(rotate * s, Image.Resampling.BILINEAR)),
        "brightness": enhanced(ImageEnhance.Brightness),
        "color": enhanced(ImageEnhance.Color),
        "contrast": enhanced(ImageEnhance.Contrast),
        "sharpness": enhanced(ImageEnhance.Sharpness),
        "posterize": Operation(False, lambda image, s: ImageOps.posterize(image, 8 - round(bits * s))),
        # Pillow compares the threshold with the pixels, so it may be a float.
        "solarize": Operation(False, lambda image, s: ImageOps.solarize(image, 255 * (1 - s))),  # type: ignore[arg-type]
        "autocontrast": Operation(False, lambda image, _: ImageOps.autocontrast(image)),
        "equalize": Operation(False, lambda image, _: ImageOps.equalize(image)),
    }


TRIVIAL = _operations(shear=0.99, translate=lambda _: 32, rotate=135, enhance=0.99, bits=6)
RAND = _operations(shear=0.3, translate=lambda side: 150 / 331 * side, rotate=30, enhance=0.9, bits=4)


def trivial_augment(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Apply one of fourteen operations at one of 31 strengths, as torchvision's TrivialAugmentWide does.

    Args:
      pixels: the image.
      rng: draws the random numbers.
    """
    operation = list(TRIVIAL.values())[rng.integers(len(TRIVIAL))]
    return _apply(operation, pixels, int(rng.integers(MAGNITUDES)), rng)


def rand_augment(pixels: Pixels, rng: np.random.Generator, count: int, magnitude: int) -> Pixels:
    """Apply some of fourteen operations at one strength, one after another, as torchvision's RandAugment does.

    Args:
      pixels: the image.
      rng: draws the operations and their directions.
      count: number of operations.
      magnitude: their strength, from 0 to MAGNITUDES - 1.
    """
    for number in rng.integers(len(RAND), size=count):
        pixels = _apply(list(RAND.values())[number], pixels, magnitude, rng)
    return pixels


def _apply(operation: Operation, pixels: Pixels, magnitude: int, rng: np.random.Generator) -> Pixels:
    """Apply an operation at a magnitude from 0 to MAGNITUDES - 1, in a random direction if it has two."""
    strength = magnitude / (MAGNITUDES - 1)
    if operation.signed and rng.random() < 0.5:
        strength = -strength
    return np.asarray(operation.change(_as_picture(pixels), strength)).reshape(pixels.shape)


def erased_rectangle(shape: tuple[int, ...], rng: np.random.Generator) -> Int32[np.ndarray, "4"]:
    """Draw the rectangle that random erasing blanks, as torchvision's RandomErasing does.

    Args:
      shape: shape of the image, which begins with height and width in pixels.
      rng: draws the random numbers.

    Returns:
      (top, left, height, width) in pixels: 2 % to 33 % of the area, with an aspect ratio of 0.3 to 3.3. All are 0 if no
      rectangle fits in ten tries.
    """
    height, width = shape[:2]
    for _ in range(10):
        area = rng.uniform(0.02, 0.33) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            corner = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return np.array([*corner, h, w], np.int32)
    return np.zeros(4, np.int32)
