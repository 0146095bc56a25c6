import dataclasses
import io
import math
from functools import partial

import cv2
import numpy as np
import pytest
from conftest import ROOT
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageEnhance

from shufflenet_jax.config import MMPRETRAIN_EVAL, TORCHVISION_EVAL, TrainConfig
from shufflenet_jax.data import augmentation, normalization
from shufflenet_jax.data.jpeg import ORIENTATION
from shufflenet_jax.data.sources import Example

BASE = TrainConfig(data="digits", flip=False)


def picture(height, width, seed=0):
    """A smooth uint8 RGB picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def row(data, seed=0, **settings):
    config = dataclasses.replace(BASE, **settings)
    return augmentation.training_row(
        Example("x", data, 0), config, config.train_preprocess, np.random.default_rng(seed)
    )


class Scripted(np.random.Generator):
    """Stands for a generator whose draws are given: area, ratio, top and left, each as a share of its range."""

    def __init__(self, *draws):
        super().__init__(np.random.PCG64(0))
        self.draws = list(draws)

    def random(self, count):
        drawn, self.draws = self.draws[:count], self.draws[count:]
        return np.array(drawn)


def test_a_random_crop_has_the_drawn_area_ratio_and_place():
    # Area 0.54 of 300 x 400, ratio 1: sides of 254.56, rounded; in the middle of what is left.
    assert augmentation.random_crop_box(300, 400, Scripted(0.5, 0.5, 0.5, 0.5)) == (23, 73, 255, 255)
    # The first try is wider than the image, so a second one counts.
    assert augmentation.random_crop_box(300, 300, Scripted(1, 1, 0, 0, 0.5, 0.5, 0, 0)) == (0, 0, 220, 220)


def test_an_image_too_long_for_any_try_gives_its_centre_at_the_nearest_allowed_ratio():
    for height, width, box in [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))]:
        assert augmentation.random_crop_box(height, width, Scripted(*[1, 0.5, 0, 0] * 10)) == box
    assert augmentation.random_crop_box(100, 120, Scripted(*[1, 1, 0, 0] * 10)) == (0, 0, 100, 120)


def test_random_crops_have_mmpretrains_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([augmentation.random_crop_box(1000, 1000, rng) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (top + height <= 1000).all() and (left + width <= 1000).all()
    ratio = np.log(width / height)
    assert_allclose([ratio.min(), ratio.max()], [math.log(3 / 4), math.log(4 / 3)], atol=0.02)
    assert abs(ratio.mean()) < 0.01  # Log-uniform: no side is favoured.
    area = height * width / 1e6
    assert area.min() >= 0.079 and area.max() > 0.95
    # Areas are uniform, but those above 3/4 fit only for ratios between the area and its inverse.
    areas = np.linspace(0.08, 1, 10_000)
    fits = np.minimum(1, np.log(1 / areas) / math.log(4 / 3))
    assert_allclose(area.mean(), np.average(areas, weights=fits), atol=4 * area.std() / math.sqrt(4000))


def test_the_exact_crop_is_pillows_resizing_of_the_cut_out_part():
    data = jpeg(picture(300, 400))
    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), 1), cv2.COLOR_BGR2RGB)
    top, left, height, width = augmentation.random_crop_box(300, 400, np.random.default_rng(7))
    part = Image.fromarray(pixels[top : top + height, left : left + width])
    assert_array_equal(row(data, 7)["images"], part.resize((224, 224), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("size", [(300, 400), (900, 1200)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("preprocess", [MMPRETRAIN_EVAL, TORCHVISION_EVAL])
def test_the_fast_crop_shows_the_same_part(size, orientation, preprocess):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    example = Example("x", jpeg(picture(*size), exif=exif), 0)
    halved = 0
    for seed in range(8):
        exact = augmentation.exact_random_crop(example, preprocess, 0.08, np.random.default_rng(seed))
        fast = augmentation.fast_random_crop(example, preprocess, 0.08, np.random.default_rng(seed))
        assert fast.shape == exact.shape
        # Of 255; the picture is smooth, so that interpolation matters little and a wrong place a lot.
        assert np.abs(fast.astype(int) - exact).mean() < 2
        box = augmentation.random_crop_box(*size, np.random.default_rng(seed))
        halved += min(box[2:]) >= 448
    assert (halved > 0) == (size[0] == 900)


@pytest.mark.parametrize("stored", [0, 9, 300])
def test_an_orientation_that_does_not_exist_counts_as_upright(stored):
    exif = Image.Exif()
    exif[ORIENTATION] = stored
    data = picture(300, 400)
    expected, seen = (row(jpeg(data, **kind), 3, transform="fast")["images"] for kind in ({}, {"exif": exif}))
    assert_array_equal(seen, expected)


def test_flips_are_drawn_on_the_host_and_done_on_the_device():
    data = picture(224, 224)
    drawn = [row(data, seed, crop="center", flip=True)["flip"] for seed in range(400)]
    assert 160 < sum(drawn) < 240  # Half of 400, and four standard deviations to each side.
    batch = {"images": np.stack([data, data]), "flip": np.array([True, False])}
    inputs = normalization.network_inputs(batch, MMPRETRAIN_EVAL)
    assert_array_equal(inputs[0], inputs[1][:, ::-1])
    assert_array_equal(inputs[1:], normalization.normalize(data[None], MMPRETRAIN_EVAL))


def test_erased_rectangles_have_the_size_that_torchvision_draws_and_become_zero():
    rng = np.random.default_rng(0)
    boxes = np.array([augmentation.erased_rectangle((224, 224, 3), rng) for _ in range(1000)])
    top, left, height, width = boxes.T
    assert (top + height <= 224).all() and (left + width <= 224).all() and (height > 0).all()
    area = height * width / 224**2
    assert 0.019 < area.min() < 0.03 and 0.31 < area.max() < 0.34
    batch = {"images": np.full((2, 8, 9, 3), 200, np.uint8), "erase": np.array([[1, 2, 3, 4], [0, 0, 0, 0]])}
    blank = np.asarray(normalization.network_inputs(batch, MMPRETRAIN_EVAL)) == 0
    assert blank[0, 1:4, 2:6].all() and blank.sum() == 3 * 4 * 3
    erased = [row(picture(224, 224), seed, crop="center", random_erasing=0.25)["erase"].any() for seed in range(400)]
    assert 65 < sum(erased) < 135


def test_color_jitter_draws_three_factors_and_their_order():
    data = picture(32, 32)
    seen = {augmentation.color_jitter(data, np.random.default_rng(seed), 0.4).tobytes() for seed in range(20)}
    assert len(seen) == 20
    assert_array_equal(augmentation.color_jitter(data, np.random.default_rng(0), 0), data)
    rng = np.random.default_rng(5)
    factors, order = rng.uniform(0.6, 1.4, size=3), rng.permutation(3)
    image = Image.fromarray(data)
    for position in order:
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        image = kinds[position](image).enhance(factors[position])
    assert_array_equal(augmentation.color_jitter(data, np.random.default_rng(5), 0.4), image)


@pytest.mark.parametrize("seed", range(20))
def test_grey_images_are_augmented_as_colours_that_are_equal(seed):
    grey = np.random.default_rng(0).integers(0, 256, (16, 12, 1), np.uint8)
    for change in (augmentation.trivial_augment, partial(augmentation.color_jitter, strength=0.4)):
        ours = change(grey, np.random.default_rng(seed))
        theirs = change(grey.repeat(3, -1), np.random.default_rng(seed))
        # Pillow rounds when it makes grey of colours, as saturation and contrast do.
        assert_allclose(ours.repeat(3, -1).astype(int), theirs, atol=3)


def test_every_trivial_operation_but_identity_changes_a_picture_at_full_strength():
    data = picture(64, 64) // 2 + 40
    for name, (signed, operation) in augmentation.TRIVIAL.items():
        for strength in (1, -1) if signed else (1,):
            changed = np.asarray(operation(Image.fromarray(data), strength))
            assert changed.shape == data.shape and np.array_equal(changed, data) == (name == "identity"), name
        if name not in ("autocontrast", "equalize"):  # These know no strength.
            unchanged = np.asarray(operation(Image.fromarray(data), 0))
            assert_array_equal(unchanged, data, err_msg=name)


def test_trivial_operations_move_and_cut_as_torchvisions_do():
    data = np.zeros((40, 40, 3), np.uint8)
    data[10, 12] = 255
    image = Image.fromarray(data)
    moved = np.asarray(augmentation.TRIVIAL["translate x"][1](image, 0.25))  # 8 pixels to the right
    assert moved[10, 20].all() and moved.astype(bool).sum() == 3
    sheared = np.asarray(
        augmentation.TRIVIAL["shear x"][1](image, 1 / 0.99)
    )  # x = 12 - 10.5, from the upper left corner
    assert sheared[10, 1].any() or sheared[10, 2].any()
    levels = np.unique(np.asarray(augmentation.TRIVIAL["posterize"][1](Image.fromarray(picture(64, 64)), 1)))
    assert set(levels) <= {0, 64, 128, 192}  # 8 - 6 bits are left
    inverted = np.asarray(augmentation.TRIVIAL["solarize"][1](image, 1))
    assert (inverted == 255 - data).all()


def test_trivial_augment_takes_every_operation_and_follows_the_flip():
    data = picture(64, 64)
    seen = {augmentation.trivial_augment(data, np.random.default_rng(seed)).tobytes() for seed in range(100)}
    assert len(seen) > 50  # Some have no strength, or none that shows.
    assert "flip" not in row(data, crop="center", image_size=64, flip=True, trivial_augment=True)


TORCHVISION = np.load(ROOT / "tests/fixtures/randaugment/torchvision.npz")
# Its names of the fourteen operations, in the order of ours.
NAMES = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), list(zip(augmentation.RAND, NAMES, strict=True)))
def test_each_operation_of_rand_augment_is_torchvisions(ours, theirs):
    cases = [name for name in TORCHVISION.files if name.partition(" ")[0] == theirs]
    assert len(cases) == (6 if augmentation.RAND[ours].signed else 3)
    for case in cases:
        strength = int(case.split()[1]) / 30
        found = np.asarray(augmentation.RAND[ours].change(Image.fromarray(TORCHVISION["picture"]), strength))
        off = np.abs(found.astype(int) - TORCHVISION[case])
        if "Shear" in theirs:  # They round to float32, which decides between neighbours, and what lies on the border.
            assert (off > 0).mean() < 0.05 and (off > 1).mean() < 0.005
        else:
            assert not off.any(), case


def test_rand_augment_draws_operations_and_signs_and_follows_the_flip():
    data = picture(64, 64)
    seen = {augmentation.rand_augment(data, np.random.default_rng(seed), 2, 15).tobytes() for seed in range(100)}
    assert len(seen) > 80  # Of 14 x 14 pairs, most with two signs.
    rng = np.random.default_rng(5)
    first, second = (list(augmentation.RAND.values())[number] for number in rng.integers(14, size=2))
    signs = [-1 if operation.signed and rng.random() < 0.5 else 1 for operation in (first, second)]
    image = second.change(first.change(Image.fromarray(data), signs[0] / 3), signs[1] / 3)
    assert_array_equal(augmentation.rand_augment(data, np.random.default_rng(5), 2, 10), image)
    assert "flip" not in row(data, crop="center", image_size=64, flip=True, rand_augment=1)
    assert_array_equal(row(data, crop="center", image_size=64)["images"], data)


@pytest.mark.parametrize("transform", ["exact", "fast"])
def test_random_crops_of_rectangles(transform):
    cut = row(jpeg(picture(300, 400)), image_size=(96, 160), transform=transform)["images"]
    assert cut.shape == (96, 160, 3)


def test_random_shift_moves_by_at_most_its_reach_and_fills_with_zeros():
    image = np.arange(1, 26, dtype=np.uint8).reshape(5, 5, 1)
    seen = set()
    for seed in range(200):
        moved = augmentation.random_shift(image, np.random.default_rng(seed), 1)
        assert moved.shape == image.shape
        (place,), (column,) = (axis for axis in np.nonzero(moved[..., 0] == 13))
        seen.add((place - 2, column - 2))
    assert seen == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
