"""JPEG files without decoding them: what their headers say, and smaller files with a part of their pixels.

Decoders that come from PyPI decode whole files. A file that was cut before costs them only what is left of it.
"""

import contextlib
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image

START = b"\xff\xd8"  # How such a file begins, and how it ends.
END = b"\xff\xd9"
MOST_PIXELS = 178_956_970  # Beyond which Pillow refuses an image.
ORIENTATION = 0x0112  # EXIF's tag; from 5 on, width and height are exchanged.
EXIF = b"Exif\0\0"
RESTART = 0xD0  # To 0xD7, in turn: markers behind which nothing depends on what came before.


class Header(NamedTuple):
    """What a file says of itself."""

    height: int  # As stored, in pixels.
    width: int
    orientation: int  # EXIF's, 1 to 8.
    frame: int = 0  # Where its segment begins, which tells the size.
    scan: int = 0  # Where the coded pixels begin.
    unit: tuple[int, int] | None = None  # Height and width of the blocks that are coded in turn; None: it stays whole.
    apart: bool = False  # Whether each of these blocks can be decoded without the others.


def read_header(data):
    """The Header of a whole JPEG file. Raises ValueError where a part of it was cut off, or it is too large."""
    height = width = frame = interval = 0
    orientation, position = 1, 2
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] not in (b"", b"\xda"):
        marker = data[position + 1]
        if marker == 0xFF:  # Any number of these may fill up before a marker.
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # Start of a frame, not a table.
            frame = position
            height, width = (_number(data, position + place) for place in (5, 7))
        elif marker == 0xDD:
            interval = _number(data, position + 4)
        elif marker == 0xE1 and data.startswith(EXIF, position + 4):
            orientation = _orientation(data[position + 4 : position + 2 + _number(data, position + 2)])
        position += 2 + _number(data, position + 2)
    if height * width > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too many")
    # Behind the start of the scan, 0xFF is followed by 0xD9 at the end of the image alone.
    if data.rfind(END) < position:
        raise ValueError("the file is truncated")
    scan = position + 2 + _number(data, position + 2)
    return Header(height, width, orientation, frame, scan, _unit(data, frame, position), interval == 1)


def cut(data, header, top, left, height, width):
    """A file with less of the pixels: at least those of a box, the same as in the whole file.

    Below the box nothing is left of any file that codes its blocks once, from top to bottom. Above it and beside it
    pixels can be left out where each block stands alone, as in those that `prepare --short-edge` writes.

    Args:
      data: encoded bytes.
      header: their Header.
      top, left, height, width: the box, in pixels as stored.
    Returns:
      (encoded bytes, the box that they hold).
    """
    if header.unit is None:
        return data, (0, 0, header.height, header.width)
    tall, wide = header.unit
    rows, columns = slice(top // tall, -(-(top + height) // tall)), slice(left // wide, -(-(left + width) // wide))
    coded = _blocks(data, header, rows, columns) if header.apart else None
    if coded is None:
        coded, rows, columns = data[header.scan :], slice(0, rows.stop), slice(0, -(-header.width // wide))
    top, left = rows.start * tall, columns.start * wide
    height, width = min(header.height, rows.stop * tall) - top, min(header.width, columns.stop * wide) - left
    size = header.frame + 5
    head = data[:size] + struct.pack(">HH", height, width) + data[size + 4 : header.scan]
    return head + coded, (top, left, height, width)


def _blocks(data, header, rows, columns):
    """The coded pixels of some blocks; None where the file has not as many as its header says."""
    tall, wide = -(-header.height // header.unit[0]), -(-header.width // header.unit[1])
    coded = np.frombuffer(data, np.uint8, data.rfind(END) + len(END) - header.scan, header.scan)
    marks = np.flatnonzero(coded[:-1] == 0xFF)
    marks = marks[coded[marks + 1] & 0xF8 == RESTART]
    if len(marks) != tall * wide - 1:
        return None
    # Where each block begins and ends, with the marker behind it.
    edges = np.concatenate([[0], marks + 2, [len(coded)]])
    starts, ends = (edges[side:][: tall * wide].reshape(tall, wide)[rows, columns] for side in (0, 1))
    runs = zip(starts[:, 0].tolist(), ends[:, -1].tolist(), strict=True)
    found = np.concatenate([coded[start:end] for start, end in runs])
    behind = np.cumsum(ends - starts) - 1
    found[behind] = RESTART + np.arange(len(behind)) % 8
    found[behind[-1]] = END[1]
    return found.tobytes()


def _number(data, position):
    """Two bytes of a file, or as many as it has."""
    return int.from_bytes(data[position : position + 2], "big")


def _unit(data, frame, scan):
    """The size in pixels of the blocks that one scan codes in turn, or None where there are several scans."""
    if data[frame + 1 : frame + 2] not in (b"\xc0", b"\xc1") or data[frame + 9] != data[scan + 4]:
        return None
    count = data[frame + 9]
    if count == 1:
        return 8, 8
    factors = [(factor & 15, factor >> 4) for factor in data[frame + 11 : frame + 11 + 3 * count : 3]]
    tall, wide = map(max, zip(*factors, strict=True))
    return (8 * tall, 8 * wide) if 0 not in (tall, wide) else None


def _orientation(segment):
    """The EXIF orientation, 1 to 8; what cannot be read counts as upright, as OpenCV has it."""
    exif = Image.Exif()
    with contextlib.suppress(SyntaxError, OSError, ValueError, struct.error):
        exif.load(segment)
    return orientation_in(exif)


def orientation_in(exif):
    """1 to 8; damaged EXIF holds anything."""
    return found if (found := exif.get(ORIENTATION)) in range(1, 9) else 1
