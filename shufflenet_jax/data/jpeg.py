"""JPEG files without decoding: reads their headers, and cuts out smaller files that hold a part of the pixels.

The decoders on PyPI decode whole files. They take less time for a file that was cut before.
"""

import contextlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

START = b"\xff\xd8"  # The first bytes of a file.
END = b"\xff\xd9"  # The last bytes of a file.
MOST_PIXELS = 178_956_970  # Pillow's limit: it refuses larger images.
ORIENTATION = 0x0112  # EXIF's tag for the orientation. Orientations 5 to 8 swap width and height.
EXIF = b"Exif\0\0"
MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # {number of channels: Pillow's name of the mode}
FIRST = 0xC0  # Lower markers have no meaning.
NOWHERE = (0xFF, START[1], END[1])  # Markers that begin no segment of a header.
UNMARKED = (0x00, 0xFF)  # After 0xFF these mean a stray byte, or padding before a marker.
SCAN = 0xDA  # The marker before the coded pixels.
RESTART = 0xD0  # The first of eight restart markers, used cyclically. Decoding can start anew after each of them.

Box = tuple[int, int, int, int]  # (top, left, height, width), in pixels.


class Header(NamedTuple):
    """The header of a file.

    Attributes:
      height: of the image as stored, in pixels.
      width: of the image as stored, in pixels.
      bits: bits per channel.
      mode: Pillow's name of the colors, as stored.
      orientation: EXIF's orientation, 1 to 8.
      frame: position in the file of the segment with the size.
      scan: position in the file of the coded pixels.
      unit: (height, width) of the coded blocks, in pixels; None for a file that cannot be cut.
      restarts: whether each of these blocks can be decoded without the others.
    """

    height: int
    width: int
    bits: int
    mode: str
    orientation: int
    frame: int
    scan: int
    unit: tuple[int, int] | None
    restarts: bool


def read_header(data: bytes) -> Header:
    """Read the header of a JPEG file.

    Args:
      data: the whole file.

    Raises:
      ValueError: the file is truncated or too large, or the decoders cannot read its header.
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
    # After the start of the scan, 0xFF 0xD9 occurs only at the end of the image.
    if data.rfind(END) < position:
        raise ValueError("the file is truncated")
    if not frame:
        raise ValueError("the file does not state its size")
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
    """Yield (marker, position of its 0xFF) up to the first scan. Skip stray bytes between segments, as libjpeg does."""
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


def cut(data: bytes, header: Header, top: int, left: int, height: int, width: int) -> tuple[bytes, Box]:
    """Cut out a smaller file with the same pixels in a box.

    The result lacks the blocks below the box, if the file codes its blocks once, from top to bottom. It also lacks the
    blocks above and beside the box, if each block can be decoded alone, as in files from `preparation.records`.

    Args:
      data: the encoded file.
      header: its header.
      top: of the box, in pixels as stored.
      left: of the box, in pixels as stored.
      height: of the box, in pixels.
      width: of the box, in pixels.

    Returns:
      The smaller file, and the box of the original image that it holds.
    """
    if header.unit is None:
        return data, (0, 0, header.height, header.width)
    tall, wide = header.unit
    rows, columns = slice(top // tall, -(-(top + height) // tall)), slice(left // wide, -(-(left + width) // wide))
    coded = _blocks(data, header, rows, columns) if header.restarts else None
    if coded is None:
        coded, rows, columns = data[header.scan :], slice(0, rows.stop), slice(0, -(-header.width // wide))
    top, left = rows.start * tall, columns.start * wide
    height, width = min(header.height, rows.stop * tall) - top, min(header.width, columns.stop * wide) - left
    size = header.frame + 5
    head = data[:size] + struct.pack(">HH", height, width) + data[size + 4 : header.scan]
    return head + coded, (top, left, height, width)


def _blocks(data: bytes, header: Header, rows: slice, columns: slice) -> bytes | None:
    """Return the coded pixels of some blocks, or None if the file has another number of blocks than its header says."""
    assert header.unit
    tall, wide = -(-header.height // header.unit[0]), -(-header.width // header.unit[1])
    coded = np.frombuffer(data, np.uint8, data.rfind(END) + len(END) - header.scan, header.scan)
    marks = np.flatnonzero(coded[:-1] == 0xFF)
    marks = marks[coded[marks + 1] & 0xF8 == RESTART]
    if len(marks) != tall * wide - 1:
        return None
    # Start and end of each block, with the marker after it.
    edges = np.concatenate([[0], marks + 2, [len(coded)]])
    starts, ends = (edges[side:][: tall * wide].reshape(tall, wide)[rows, columns] for side in (0, 1))
    runs = zip(starts[:, 0].tolist(), ends[:, -1].tolist(), strict=True)
    chosen = np.concatenate([coded[start:end] for start, end in runs])
    last_bytes = np.cumsum(ends - starts) - 1
    chosen[last_bytes] = RESTART + np.arange(len(last_bytes)) % 8
    chosen[last_bytes[-1]] = END[1]
    return chosen.tobytes()


def _number(data: bytes, position: int) -> int:
    """Read a number of two bytes; at the end of the file, of as many as there are."""
    return int.from_bytes(data[position : position + 2], "big")


def _unit(data: bytes, frame: int, scan: int) -> tuple[int, int] | None:
    """Return (height, width) of the coded blocks in pixels, or None if there are several scans."""
    if data[frame + 1 : frame + 2] not in (b"\xc0", b"\xc1") or data[frame + 9] != data[scan + 4]:
        return None
    count = data[frame + 9]
    if count == 1:
        return 8, 8
    factors = [(factor & 15, factor >> 4) for factor in data[frame + 11 : frame + 11 + 3 * count : 3]]
    tall, wide = map(max, zip(*factors, strict=True))
    return (8 * tall, 8 * wide) if 0 not in (tall, wide) else None


def orientation_in(blocks: Iterable[bytes]) -> int:
    """Return EXIF's orientation, 1 to 8, from the first block that has one, as OpenCV does.

    Args:
      blocks: EXIF data. Blocks that cannot be read are skipped.

    Returns:
      The orientation; 1, upright, if there is none or its number is invalid.
    """
    for block in blocks:
        with contextlib.suppress(SyntaxError, OSError, ValueError, LookupError, TypeError, struct.error):
            exif = Image.Exif()
            exif.load(block)
            if (orientation := exif.get(ORIENTATION)) is not None:
                return orientation if orientation in range(1, 9) else 1
    return 1
