"""JPEG files without decoding them: what their headers say, and smaller files with a part of their pixels.

Decoders that come from PyPI decode whole files. A file that was cut before costs them only what is left of it.
"""

import contextlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

START = b"\xff\xd8"  # How such a file begins, and how it ends.
END = b"\xff\xd9"
MOST_PIXELS = 178_956_970  # Beyond which Pillow refuses an image.
ORIENTATION = 0x0112  # EXIF's tag; from 5 on, width and height are exchanged.
EXIF = b"Exif\0\0"
MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # Pillow's names for what so many channels hold.
FIRST = 0xC0  # Lower markers have no meaning.
NOWHERE = (0xFF, START[1], END[1])  # No markers of the header's segments.
UNMARKED = (0x00, 0xFF)  # Behind 0xFF: a stray byte, or one of any number that may fill up before a marker.
SCAN = 0xDA  # The marker before the coded pixels.
RESTART = 0xD0  # To 0xD7, in turn: markers behind which nothing depends on what came before.


class Header(NamedTuple):
    """What a file says of itself."""

    height: int  # As stored, in pixels.
    width: int
    bits: int  # Of each channel.
    mode: str  # Pillow's name of the colors, as stored.
    orientation: int  # EXIF's, 1 to 8.
    frame: int  # Where its segment begins, which tells the size.
    scan: int  # Where the coded pixels begin.
    unit: tuple[int, int] | None  # Height and width of the blocks that are coded in turn; None: it stays whole.
    apart: bool  # Whether each of these blocks can be decoded without the others.


def read_header(data: bytes) -> Header:
    """Read the Header of a whole JPEG file.

    Raises:
      ValueError: a part of the file was cut off, it is too large, or its header is none that the decoders read.
    """
    frame = interval = 0
    blocks = []
    for marker, position in _markers(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # Start of a frame, not a table.
            frame = position
        elif marker == 0xDD:
            interval = _number(data, position + 4)
        elif marker == 0xE1 and data.startswith(EXIF, position + 4):
            blocks.append(data[position + 4 : position + 2 + _number(data, position + 2)])
        elif marker == SCAN:
            break
    # Behind the start of the scan, 0xFF is followed by 0xD9 at the end of the image alone.
    if data.rfind(END) < position:
        raise ValueError("the file is truncated")
    if not frame:
        raise ValueError("no part of the file tells the size")
    height, width = (_number(data, frame + place) for place in (5, 7))
    if height * width > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too many")
    if not height * width or data[frame + 9] not in MODES:
        raise ValueError(f"{width} x {height} pixels with {data[frame + 9]} channels")
    scan = position + 2 + _number(data, position + 2)
    return Header(
        *(height, width, data[frame + 4], MODES[data[frame + 9]], orientation_in(blocks)),
        *(frame, scan, _unit(data, frame, position), interval == 1),
    )


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, where its 0xFF stands) up to the first scan; stray bytes between segments are skipped, as by
    libjpeg."""
    position = len(START)
    while (position := data.find(b"\xff", position)) >= 0 and position + 1 < len(data):
        marker = data[position + 1]
        if marker >= FIRST and marker not in NOWHERE:
            yield marker, position
            position += 2 if marker & 0xF8 == RESTART else 2 + _number(data, position + 2)
        elif marker in UNMARKED:
            position += 1
        else:
            raise ValueError(f"marker {marker:#x} stands before the pixels")
    raise ValueError("the file is truncated")


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


def orientation_in(blocks: Iterable[bytes]) -> int:
    """Return EXIF's orientation, 1 to 8: that of the first block that has one, as OpenCV does.

    What cannot be read, and any other number, counts as upright.
    """
    for block in blocks:
        with contextlib.suppress(SyntaxError, OSError, ValueError, LookupError, TypeError, struct.error):
            exif = Image.Exif()
            exif.load(block)
            if (orientation := exif.get(ORIENTATION)) is not None:
                return orientation if orientation in range(1, 9) else 1
    return 1
