import io

import numpy as np
import pytest
import simplejpeg
from numpy.testing import assert_array_equal
from PIL import Image

from shufflenet_jax.data import jpeg
from shufflenet_jax.preparation.records import shrink

SIZE = (150, 210)  # Neither is a multiple of any block's side.
BOXES = [(0, 0, 150, 210), (37, 50, 60, 81), (16, 32, 16, 16), (149, 209, 1, 1), (0, 100, 20, 110), (100, 0, 50, 9)]


def encoded(mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def decoded(data, **options):
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True, **options)


def assert_shows_the_same(data, box, *, strict=True):
    """What `cut` returns: the box's pixels are among it, and are those of the whole."""
    file, held = jpeg.cut(data, jpeg.read_header(data), *box)
    (top, left, height, width), (first, begin, *size) = box, held
    pixels = decoded(file, strict=strict)  # Of what is still in the file, not all need be used.
    assert list(pixels.shape[:2]) == size
    part = pixels[top - first : top - first + height, left - begin : left - begin + width]
    assert_array_equal(part, decoded(data)[top : top + height, left : left + width])
    return held


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ({"subsampling": "4:2:0"}, (16, 16)),
        ({"subsampling": "4:2:2"}, (8, 16)),
        ({"subsampling": "4:4:4"}, (8, 8)),
        ({"mode": "L"}, (8, 8)),
    ],
)
def test_where_blocks_stand_alone_those_of_the_box_are_enough(options, unit, box):
    held = assert_shows_the_same(encoded(**options, restart_marker_blocks=1), box)
    for place, length, side, whole in zip(box[:2], box[2:], unit, SIZE, strict=True):
        axis = 0 if whole == SIZE[0] else 1
        first, last = place // side * side, min(whole, -(-(place + length) // side) * side)
        assert (held[axis], held[axis + 2]) == (first, last - first)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"mode": "L"}, {"subsampling": "4:4:4"}])
def test_elsewhere_what_lies_below_the_box_is_left_out(options, box):
    held = assert_shows_the_same(encoded(**options), box, strict=False)
    assert held[:2] == (0, 0) and held[3] == SIZE[1] and box[0] + box[2] <= held[2] < box[0] + box[2] + 16


def test_a_file_whose_blocks_come_more_than_once_stays_whole():
    data = encoded(progressive=True)
    assert jpeg.cut(data, jpeg.read_header(data), 37, 50, 60, 81) == (data, (0, 0, *SIZE))


def test_a_missing_restart_marker_is_left_to_the_decoder():
    data = encoded(restart_marker_blocks=1)
    place = data.index(b"\xff\xd3")
    less = data[:place] + data[place + 2 :]
    file, held = jpeg.cut(less, jpeg.read_header(less), 37, 50, 60, 81)
    assert held == (0, 0, 112, SIZE[1]) and file.endswith(less[-1000:])


def test_images_that_prepare_makes_smaller_can_be_cut():
    small = shrink(encoded(), 64, 90, "x")
    assert jpeg.read_header(small).restarts
    assert_shows_the_same(small, (10, 20, 30, 40))
