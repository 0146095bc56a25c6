"""Random image files of every format, mode, bit depth and orientation that Pillow writes, and all ways to read them."""

import contextlib
import dataclasses
import io
import struct
import warnings
from typing import NamedTuple

import cv2
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageCms, ImageOps

import shufflenet_jax as snet
from shufflenet_jax.checkpoint import module_of
from shufflenet_jax.config import MMPRETRAIN_EVAL, TORCHVISION_EVAL, ModelInfo
from shufflenet_jax.data import augmentation, decoding, geometry, survey
from shufflenet_jax.data.sources import Example, Source
from shufflenet_jax.errors import InputError
from shufflenet_jax.preparation.records import shrink

ORIENTATION, RESOLUTION = 0x0112, 0x011A
Image.init()
FORMATS = sorted(set(Image.SAVE) - {"BUFR", "GRIB", "HDF5", "WMF"})  # Pillow writes these with other libraries alone.
ORIENTED = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF")
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
MODES = (
    *("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "PA", "RGBA", "RGBa", "RGBX"),
    *("I;16", "I;16B", "I", "F"),
)
EVALS = {
    decoder: dataclasses.replace(preprocess, resize=32, crop=28)
    for decoder, preprocess in (("cv2", MMPRETRAIN_EVAL), ("pillow", TORCHVISION_EVAL))
}
CLEAR = ("RGBA", "RGBa", "LA", "La")  # Modes with transparency.


class ImageFile(NamedTuple):
    """A file, and how it was made."""

    form: str
    mode: str
    settings: dict
    data: bytes

    def __str__(self):
        return f"{self.form} of mode {self.mode}, {self.settings}"


def picture(rng, size):
    """A smooth RGB image: other ways to interpolate hardly change it."""
    colors = rng.integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC)


def in_mode(image, mode):
    """An RGB image in another mode, its transparency running from side to side."""
    grey = image.convert("L")
    slope = Image.linear_gradient("L").resize(image.size)
    if mode == "1":
        return image.convert("1", dither=Image.Dither.NONE)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    if mode.startswith("I;16"):
        deep = np.asarray(grey).astype(np.uint16) * 256 + np.asarray(slope)
        return Image.frombytes(mode, image.size, deep.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(np.asarray(grey).astype(np.int32 if mode == "I" else np.float32) * 200)
    if mode in CLEAR:
        clear = (grey if mode in ("LA", "La") else image).copy()
        clear.putalpha(slope)
        return clear.convert(mode)
    return image.convert(mode)


def segment(body):
    """A JPEG's segment of the kind that holds EXIF and XMP."""
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def exif_block(tag, value):
    """A JPEG's segment with an EXIF block of one entry."""
    return segment(b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, tag, 3, 1, value, 0, 0))


def behind_start(data, *segments):
    """A JPEG with further segments, or stray bytes, before all others."""
    return data[:2] + b"".join(segments) + data[2:]


def random_settings(rng, form, mode):
    """Options of Pillow's writers."""
    settings = {}
    if form in ("JPEG", "MPO"):
        settings = {"quality": int(rng.integers(70, 101)), "progressive": bool(rng.integers(2))}
        if mode == "RGB":
            settings["subsampling"] = int(rng.integers(3))
        if not settings["progressive"]:
            settings["restart_marker_blocks"] = int(rng.integers(3))
    elif form == "TIFF":
        settings = {"compression": [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"][rng.integers(4)]}
    elif form == "WEBP":
        settings = {"lossless": bool(rng.integers(2)), "exact": True}
    elif form == "PNG" and mode == "P" and rng.integers(2):
        settings = {"transparency": [3, bytes(range(0, 200, 50))][rng.integers(2)]}
    elif form == "TGA":
        settings = {"compression": [None, "tga_rle"][rng.integers(2)]}
    return {key: value for key, value in settings.items() if value is not None}


def encode(image, form, settings, orientation=1, following=()):
    """An image's bytes, with EXIF's orientation where the format has it, and further frames or pages behind it."""
    settings = dict(settings)
    if form == "TIFF":
        settings["tiffinfo"] = {ORIENTATION: orientation}
    elif orientation != 1:
        settings["exif"] = Image.Exif()
        settings["exif"][ORIENTATION] = orientation
    if following:
        settings |= {"save_all": True, "append_images": list(following)}
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def random_file(seed, form=None):
    """An ImageFile in one of Pillow's formats, or a given one, and in one of the modes that it takes."""
    rng = np.random.default_rng(seed)
    form = form or str(rng.choice(FORMATS if rng.integers(2) else ORIENTED))
    size = tuple(int(side) for side in rng.integers(32, 120, 2))
    for mode in rng.permutation(MODES).tolist():
        image = in_mode(picture(rng, size), mode)
        settings = random_settings(rng, form, mode)
        orientation = int(rng.integers(1, 9)) if form in ORIENTED else 1
        pages = [in_mode(picture(rng, size), mode)] if form in ANIMATED and rng.integers(3) == 0 else []
        if form == "AVIF" and pages:
            orientation = 1  # Pillow 13 crashes in writing others.
        with contextlib.suppress(OSError, ValueError, KeyError, SystemError, RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Some formats cannot hold all of a mode.
            data = encode(image, form, settings, orientation, pages)
            settings |= {"size": size, "orientation": orientation, "pages": 1 + len(pages)}
            return ImageFile(form, mode, settings, odd_jpeg(data, rng, settings) if form == "JPEG" else data)
    raise AssertionError(f"Pillow writes no {form}")


def odd_jpeg(data, rng, settings):
    """A JPEG with another EXIF block, or stray bytes between its segments, or as it is."""
    settings["oddity"] = str(rng.choice(["none", "first block", "second block", "stray bytes"]))
    if settings["oddity"] == "first block":
        return behind_start(data, exif_block(ORIENTATION, int(rng.integers(1, 9))))
    if settings["oddity"] == "second block":
        return behind_start(data, exif_block(RESOLUTION, 1))
    if settings["oddity"] == "stray bytes":
        place = 4 + int.from_bytes(data[4:6], "big")
        return data[:place] + bytes(rng.integers(0, 255, rng.integers(1, 9), np.uint8)) + data[place:]
    return data


def model(decoder):
    """A Model that only prepares images."""
    info = ModelInfo(width=0.5, layout="torchvision", num_classes=10, preprocess=EVALS[decoder])
    return snet.Model(module_of(info), {}, info)


def opened(data):
    """A Pillow image as a user opens it, or None where Pillow refuses it at once."""
    try:
        return Image.open(io.BytesIO(data))
    except OSError:
        return None


def crop(transform, data, decoder, seed=0):
    cut = augmentation.fast_random_crop if transform == "fast" else augmentation.exact_random_crop
    return cut(Example("x", data, 0), EVALS[decoder], 0.08, np.random.default_rng(seed))


def verified(data):
    source = Source(1, lambda index: Example("x", data, 0), 1, None, lambda: [0])
    fault = survey.examine(source, 0).fault
    if fault:
        raise InputError(fault)


def results_of(data, path):
    """{way to read a file: its pixels, or the InputError that refuses it}."""
    path.write_bytes(data)
    ways = {
        "verify": lambda: verified(data),
        "stored as it is": lambda: shrink(data, 2000, 100, "x"),
        "stored smaller": lambda: shrink(data, 9, 100, "x"),
    }
    for decoder in EVALS:
        ways |= {
            decoder: lambda decoder=decoder: decoding.decode(data, decoder, "x"),
            f"{decoder}, exact": lambda decoder=decoder: crop("exact", data, decoder),
            f"{decoder}, fast": lambda decoder=decoder: crop("fast", data, decoder),
            f"{decoder}, path": lambda decoder=decoder: model(decoder).preprocess(path, name="x")[0],
            f"{decoder}, bytes": lambda decoder=decoder: model(decoder).preprocess(data, name="x")[0],
        }
        if (image := opened(data)) is not None:
            ways[f"{decoder}, Pillow image"] = lambda decoder=decoder, image=image: model(decoder).preprocess(
                image, name="x"
            )[0]
    results = {}
    for way, read in ways.items():
        try:
            results[way] = read()
        except InputError as error:
            results[way] = error
    return results


def assert_one_decoding(file, path):
    """All ways to read a file show the same pixels, or refuse it with the same words. Returns whether they read it."""
    results = results_of(file.data, path)
    refusals = {way: str(result) for way, result in results.items() if isinstance(result, InputError)}
    if refusals:
        assert refusals.keys() == results.keys(), f"{file}: {refusals}, but others take it"
        # What is wrong with the data of a Pillow image only Pillow knows.
        words = {message.partition(" (")[0] if "Pillow image" in way else message for way, message in refusals.items()}
        assert len({message.partition(" (")[0] for message in words}) == 1, f"{file}: {refusals}"
        assert len(words) <= 2, f"{file}: {refusals}"
        return False
    # OpenCV and Pillow round the colors of CMYK differently; only JPEG is read by both.
    apart = 1 if file.mode == "CMYK" and file.form in ("JPEG", "MPO") else 0
    stored, seen = results["pillow"], results["cv2"]
    orientation = decoding.read(file.data, "pillow").orientation
    assert_allclose(seen, upright(stored, orientation), rtol=0, atol=apart, err_msg=str(file))
    if (theirs := opencv(file)) is not None:
        assert_array_equal(seen, theirs, err_msg=str(file))
    for decoder, preprocess in EVALS.items():
        expected = geometry.prepare(results[decoder], preprocess)
        for way in ("path", "bytes", "Pillow image"):
            atol = apart if (decoder, way) == ("cv2", "Pillow image") else 0
            assert_allclose(results[f"{decoder}, {way}"], expected, rtol=0, atol=atol, err_msg=f"{way}: {file}")
        exact, fast = (results[f"{decoder}, {transform}"] for transform in ("exact", "fast"))
        assert_array_equal(exact, crop("exact", results[decoder], decoder), err_msg=str(file))
        assert np.abs(exact.astype(int) - fast).mean() <= fast_tolerance(file), file
    assert results["stored as it is"] == file.data
    assert_stored_smaller(results["stored smaller"], stored, orientation, file)
    return True


def fast_tolerance(file):
    """How far the fast transform may be from the exact one, of 255 on average."""
    if file.form not in ("JPEG", "MPO") or file.mode == "CMYK":
        return 0
    # 1.5 is usual in smooth pictures, 7 the most of hundreds; another part of the picture differs by dozens. Black and
    # white have sharp edges, which interpolation changes most.
    return 20 if file.mode == "1" else 10


def assert_stored_smaller(data, stored, orientation, file):
    """What `prepare --short-edge` stores shows the pixels of the file, its orientation apart."""
    height, width = stored.shape[:2]
    size = [9 if side == min(height, width) else 9 * side // min(height, width) for side in (width, height)]
    smaller = Image.fromarray(stored).resize(size, Image.Resampling.BILINEAR)
    expected = decoding.decode(encode(smaller, "JPEG", {"quality": 100}), "pillow")
    assert_array_equal(decoding.decode(data, "pillow"), expected, err_msg=str(file))
    assert decoding.read(data, "pillow").orientation == orientation, file


def upright(pixels, orientation):
    """Pixels as Pillow turns them."""
    image = Image.fromarray(pixels)
    image.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def opencv(file):
    """What OpenCV itself makes of a file, where MMPretrain's images are of that kind; None elsewhere."""
    if file.form not in ("JPEG", "PNG", "BMP", "WEBP") or file.settings.get("pages", 1) > 1:
        return None
    return cv2.imdecode(np.frombuffer(file.data, np.uint8), cv2.IMREAD_COLOR_RGB)
