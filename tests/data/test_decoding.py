"""Unusual image files: what each holds is what every path sees, or every path refuses it with the same words."""

import io
import struct

import cv2
import image_files
import numpy as np
import pytest
from image_files import ORIENTATION, behind_start, encode, exif_block, in_mode, picture, segment
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import shufflenet_jax as snet
from shufflenet_jax.checkpoint import module_of
from shufflenet_jax.config import DIGITS_EVAL, ModelInfo
from shufflenet_jax.data import decoding
from shufflenet_jax.data.jpeg import orientation_in
from shufflenet_jax.errors import InputError

# Pillow 13 announces that it will read this format no longer.
pytestmark = pytest.mark.filterwarnings("ignore:IM image format is deprecated:DeprecationWarning")

RNG = np.random.default_rng(0)
SMOOTH = picture(RNG, (40, 30))
COLORS = np.asarray(SMOOTH)
OTHER = picture(RNG, (40, 30))
DEEP = RNG.integers(0, 2**16, (30, 40, 3), np.uint16)


def tiff(numbers, bits, photometric=1, kind=1):
    """An uncompressed TIFF of an array (H, W) or (H, W, C), whose numbers take so many bits, of 1: unsigned, 2: signed
    or 3: floating-point ones."""
    height, width, channels = np.atleast_3d(numbers).shape
    if bits == 12:
        rows = ["".join(f"{number:012b}" for number in row) for row in numbers.tolist()]
        pixels = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    else:
        pixels = numbers.tobytes()
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0), (277, channels)]
    entries += [(278, height), (279, len(pixels)), (339, kind)]
    behind = 8 + 2 + 12 * len(entries) + 4
    fields = [
        # More than two numbers stand behind the entries.
        struct.pack("<HHII", tag, 3, channels, behind)
        if tag == 258 and channels > 2
        else struct.pack("<HHII", tag, 4, 1, behind + 2 * channels if tag == 273 else value)
        for tag, value in entries
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(fields) + bytes(4)
    return head + struct.pack(f"<{channels}H", *[bits] * channels) + pixels


def grey_of(pixels):
    return np.repeat(pixels[..., None], 3, axis=-1).astype(np.uint8)


def animated(form, **settings):
    return encode(SMOOTH, form, settings, following=[OTHER])


def palette(**settings):
    return encode(SMOOTH.quantize(16), "PNG", settings)


GREY = np.asarray(SMOOTH.convert("L"))
QUANTIZED = np.asarray(SMOOTH.quantize(16).convert("RGB"))
TWELVE = DEEP[..., 0] >> 4
FILES = {
    # name: (file, the pixels that it holds)
    "palette": (palette(), QUANTIZED),
    "palette of 4 bits, partly clear": (palette(transparency=bytes(range(0, 160, 10)), bits=4), QUANTIZED),
    "palette with one clear color": (palette(transparency=3), QUANTIZED),
    "black and white": (
        encode(SMOOTH.convert("1"), "TIFF", {}),
        grey_of(255 * np.asarray(SMOOTH.convert("1"), np.uint8)),
    ),
    "grey with alpha": (encode(in_mode(SMOOTH, "LA"), "PNG", {}), grey_of(GREY)),
    "PNG with alpha": (encode(in_mode(SMOOTH, "RGBA"), "PNG", {}), COLORS),
    "TIFF with alpha": (encode(in_mode(SMOOTH, "RGBA"), "TIFF", {}), COLORS),
    "WebP with alpha": (encode(in_mode(SMOOTH, "RGBA"), "WEBP", {"lossless": True, "exact": True}), COLORS),
    "CMYK TIFF": (encode(SMOOTH.convert("CMYK"), "TIFF", {}), COLORS),
    "YCbCr TIFF": (
        encode(SMOOTH.convert("YCbCr"), "TIFF", {}),
        np.asarray(SMOOTH.convert("YCbCr").convert("RGB")),
    ),
    "LAB TIFF": (encode(in_mode(SMOOTH, "LAB"), "TIFF", {}), np.asarray(in_mode(SMOOTH, "LAB").convert("RGB"))),
    "16 bits of grey": (encode(Image.fromarray(DEEP[..., 0]), "PNG", {}), grey_of(DEEP[..., 0] >> 8)),
    "16 bits, high byte first": (
        b"P5 40 30 65535\n" + DEEP[..., 0].astype(">u2").tobytes(),
        grey_of(DEEP[..., 0] >> 8),
    ),
    "16 bits in colors": (cv2.imencode(".png", DEEP[..., ::-1])[1].tobytes(), DEEP >> 8),
    "16 bits in colors, TIFF": (tiff(DEEP, 16, photometric=2), DEEP >> 8),
    "16 bits of a negative": (tiff(DEEP[..., 0], 16, photometric=0), grey_of(255 - (DEEP[..., 0] >> 8))),
    "8 bits of a negative": (tiff(GREY, 8, photometric=0), grey_of(255 - GREY)),
    "12 bits": (tiff(TWELVE, 12), grey_of(TWELVE >> 4)),
    "animated WebP": (animated("WEBP", lossless=True), COLORS),
    "animated PNG": (animated("PNG"), COLORS),
    "animated GIF": (
        encode(SMOOTH.quantize(16), "GIF", {}, following=[OTHER.quantize(16)]),
        QUANTIZED,
    ),
    "TIFF of two pages": (animated("TIFF"), COLORS),
    "other format": (encode(SMOOTH, "QOI", {}), COLORS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_path_sees_the_pixels_that_a_file_holds(name, tmp_path):
    data, pixels = FILES[name]
    for decoder in ("cv2", "pillow"):
        assert_array_equal(decoding.decode(data, decoder), pixels)
    image_files.assert_one_decoding(image_files.ImageFile(name, "", {}, data), tmp_path / "x")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", image_files.ORIENTED)
def test_opencvs_decoder_turns_every_format_and_pillows_none_but_tiff(form, orientation):
    settings = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "AVIF": {"quality": 95}}.get(form, {})
    data = encode(SMOOTH, form, settings, orientation)
    stored = COLORS if form in ("PNG", "TIFF", "WEBP") else decoding.decode(encode(SMOOTH, form, settings), "pillow")
    expected = image_files.upright(stored, orientation)
    assert_array_equal(decoding.decode(data, "cv2"), expected)
    assert_array_equal(decoding.decode(data, "pillow"), expected if form == "TIFF" else stored)


PLAIN = encode(SMOOTH, "JPEG", {})
BLOCKS = {
    # name: (segments behind the first two bytes, the orientation that OpenCV takes from them)
    "one": ([exif_block(ORIENTATION, 6)], 6),
    "the first has none": ([exif_block(0x011A, 1), exif_block(ORIENTATION, 6)], 6),
    "the second has none": ([exif_block(ORIENTATION, 8), exif_block(0x011A, 1)], 8),
    "two": ([exif_block(ORIENTATION, 3), exif_block(ORIENTATION, 6)], 3),
    "the first is none of the eight": ([exif_block(ORIENTATION, 9), exif_block(ORIENTATION, 6)], 1),
    "the first is damaged": ([segment(b"Exif\0\0garbage."), exif_block(ORIENTATION, 6)], 6),
    "XMP": ([segment(b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')], 1),
    "behind other segments": ([b"\xff\xed\0\6abcd", b"\0\1\2", exif_block(ORIENTATION, 5)], 5),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_first_exif_block_with_an_orientation_counts(name, tmp_path):
    segments, orientation = BLOCKS[name]
    data = behind_start(PLAIN, *segments)
    expected = image_files.upright(decoding.decode(PLAIN, "pillow"), orientation)
    assert_array_equal(decoding.decode(data, "cv2"), expected)
    assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB), expected)
    image_files.assert_one_decoding(image_files.ImageFile("JPEG", "RGB", {}, data), tmp_path / "x")


def test_an_orientation_of_another_type_counts_as_upright():
    block = exif_block(ORIENTATION, 6)[4:]
    for kind in (2, 5, 7, 12):  # Text, fractions, bytes and floats.
        changed = block.replace(struct.pack("<HH", ORIENTATION, 3), struct.pack("<HH", ORIENTATION, kind))
        assert orientation_in([changed]) == 1


HALVES = np.asarray(SMOOTH.convert("L")) / np.float32(255)
NARROW = Image.fromarray(COLORS).resize((1010, 10))
FRAME = PLAIN.index(b"\xff\xc0")  # Where a JPEG says how many bits and channels it has.
REFUSED = {
    # name: (file, what is said about it)
    "floats": (encode(Image.fromarray(HALVES), "TIFF", {}), "has 32 bits a channel, which"),
    "integers of 32 bits": (
        encode(Image.fromarray(DEEP[..., 0].astype(np.int32)), "TIFF", {}),
        "has 32 bits a channel",
    ),
    "floats in colors": (tiff(COLORS / np.float32(255), 32, photometric=2, kind=3), "has 32 bits a channel"),
    "doubles": (tiff(HALVES.astype(np.float64), 64, kind=3), "has 64 bits a channel"),
    "half floats": (tiff(HALVES.astype(np.float16), 16, kind=3), "has floats of 16 bits a channel"),
    "signed numbers": (tiff(DEEP[..., 0].astype(np.int16), 16, kind=2), "has signed 16 bits a channel"),
    "floats of another format": (encode(Image.fromarray(HALVES), "PPM", {}), "has 32 bits a channel"),
    "JPEG of 12 bits": (PLAIN[: FRAME + 4] + b"\x0c" + PLAIN[FRAME + 5 :], "is a JPEG with 12 bits a channel"),
    "JPEG of 2 channels": (PLAIN[: FRAME + 9] + b"\2" + PLAIN[FRAME + 10 :], "is damaged or not an image"),
    "JPEG without a frame": (PLAIN[:FRAME] + PLAIN[FRAME + 19 :], "is damaged or not an image"),
    "JPEG with an unknown marker": (behind_start(PLAIN, b"\xff\x01"), "is damaged or not an image"),
    "narrow PNG": (encode(NARROW, "PNG", {}), "has 1010 x 10 pixels, which is too narrow"),
    "narrow JPEG": (encode(NARROW, "JPEG", {}), "has 1010 x 10 pixels, which is too narrow"),
    "cut PNG": (encode(SMOOTH, "PNG", {})[:-100], "is damaged or not an image"),
    "cut TIFF": (encode(SMOOTH, "TIFF", {})[:-3000], "is damaged or not an image"),
    "cut JPEG": (PLAIN[:-100], "is damaged or not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_path_refuses_with_the_same_words(name, tmp_path):
    data, reason = REFUSED[name]
    with pytest.raises(InputError, match=f"^image x {reason}.*; "):
        decoding.decode(data, "cv2", "x")
    image_files.assert_one_decoding(image_files.ImageFile(name, "", {}, data), tmp_path / "x")


PICTURES = {
    "grey": (SMOOTH.convert("L"), grey_of(GREY)),
    "palette": (SMOOTH.quantize(16), QUANTIZED),
    "16 bits": (Image.fromarray(DEEP[..., 0]), grey_of(DEEP[..., 0] >> 8)),
    "CMYK": (SMOOTH.convert("CMYK"), COLORS),
    **{
        mode: (in_mode(SMOOTH, mode), np.asarray(in_mode(SMOOTH, mode).convert("RGB")))
        for mode in ("1", "YCbCr", "HSV", "LAB", "LA", "RGBA", "RGBX", "PA")
    },
    "multiplied with alpha": (in_mode(SMOOTH, "La"), np.asarray(in_mode(SMOOTH, "La").convert("LA").convert("RGB"))),
}


@pytest.mark.parametrize("decoder", image_files.EVALS)
@pytest.mark.parametrize("name", PICTURES)
def test_pillow_images_of_every_mode_are_seen_in_their_colors(name, decoder):
    image, pixels = PICTURES[name]
    model = image_files.model(decoder)
    assert_array_equal(model.preprocess(image), model.preprocess(pixels))


def test_a_palette_with_clear_colors_keeps_what_it_holds():
    image = Image.open(io.BytesIO(palette(transparency=bytes(range(0, 160, 10)))))
    assert_array_equal(image_files.model("cv2").preprocess(image), image_files.model("cv2").preprocess(QUANTIZED))
    assert image.mode == "P" and "transparency" in image.info


@pytest.mark.parametrize("decoder", image_files.EVALS)
def test_pillow_images_are_turned_where_their_files_are(decoder):
    data = encode(SMOOTH, "JPEG", {}, 6)
    model = image_files.model(decoder)
    image = Image.open(io.BytesIO(data))
    assert_array_equal(model.preprocess(image), model.preprocess(data))
    assert_array_equal(model.preprocess(image.copy()), model.preprocess(data))
    assert (model.preprocess(data) == model.preprocess(encode(SMOOTH, "JPEG", {}))).all() == (decoder == "pillow")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pillow_images_of_32_bits_are_refused(mode):
    with pytest.raises(InputError, match="has 32 bits a channel, which"):
        image_files.model("cv2").preprocess(in_mode(SMOOTH, mode))


def test_damaged_pillow_images_are_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(encode(SMOOTH, "PNG", {})[:-100])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(InputError, match=r"cut\.png is damaged"):
        image_files.model("cv2").preprocess(image)


def test_networks_for_grey_images_take_pillow_images_of_every_mode():
    info = ModelInfo(width=0.5, layout="torchvision", num_classes=10, in_chans=1, preprocess=DIGITS_EVAL)
    model = snet.Model(module_of(info), {}, info)
    for image in (SMOOTH.convert("YCbCr"), in_mode(SMOOTH, "LA"), SMOOTH.convert("L")):
        # Colors were rounded twice on the way.
        assert_allclose(model.preprocess(image).astype(int), model.preprocess(GREY), rtol=0, atol=2)


@pytest.mark.parametrize("form", image_files.FORMATS)
def test_random_files_of_every_format_look_the_same_down_every_path(form, tmp_path):
    image_files.assert_one_decoding(image_files.random_file(0, form), tmp_path / "x")
