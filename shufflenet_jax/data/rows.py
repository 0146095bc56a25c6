"""Rows of Parquet files with images, as the Hugging Face Hub stores data sets: `image` {bytes, path} and `label`."""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import parquet, types

from ..errors import InputError

BATCH = 16  # Images that are decoded at a time.
BUFFER = 2**20  # Bytes that are read at a time.
# pyarrow raises these for files that are damaged or use an unknown encoding. MemoryError: a damaged size.
UNREADABLE = (pyarrow.ArrowException, OSError, ValueError, MemoryError)


class Row(NamedTuple):
    """A row without its image.

    Attributes:
      group: index of its row group.
      position: its place in the row group, from 0.
      name: path that the image had; None if the file does not say.
      label: index of the class; None if the row has none.
    """

    group: int
    position: int
    name: str | None
    label: int | None


def count_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file.

    Raises:
      InputError: the file is damaged, or has other columns.
    """
    with _reading(str(path)):
        return _open(str(path)).metadata.num_rows


def list_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file in order, without reading its images.

    Raises:
      InputError: the file is damaged, or has other columns.
    """
    with _reading(str(path)):
        file = _open(str(path))
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["image.path", "label"], use_threads=False)
            labels = table["label"].to_pylist()
            images = table["image"].to_pylist() if "image" in table.column_names else [None] * len(labels)
            for position, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield Row(group, position, image and image["path"], label)


def label_names(path: Path) -> tuple[str, ...]:
    """Return the names of the labels that `datasets` wrote beside the columns; none if there are no names.

    Raises:
      InputError: the file is damaged, or has other columns.
    """
    with _reading(str(path)):
        described = _open(str(path)).schema_arrow.metadata or {}
    try:
        return tuple(map(str, json.loads(described[b"huggingface"])["info"]["features"]["label"]["names"]))
    except (ValueError, LookupError, TypeError):  # Other programs write Parquet files too.
        return ()


def read_image(path: str, group: int, position: int) -> bytes:
    """Read the encoded image of a row. Fast if rows are read in order.

    Args:
      path: path of the Parquet file.
      group: index of the row group.
      position: place in the row group.

    Raises:
      InputError: the row holds no image, or the file is damaged.
    """
    with _reading(path):
        status = os.stat(path)
        data = _open_group(path, group, status.st_size, status.st_mtime_ns).read(position)
    if data is None:
        raise InputError(f"row {position} of row group {group} of {path} holds no image; repair or remove it")
    return data


class _Images:
    """The images of a row group. Decodes a few at a time, so memory grows with the file's pages, not with row groups.

    Args:
      path: path of the Parquet file.
      group: index of the row group.
    """

    def __init__(self, path: str, group: int) -> None:
        self._path, self._group = path, group
        self._restart()

    def _restart(self) -> None:
        self._batches = _open(self._path).iter_batches(
            BATCH, row_groups=[self._group], columns=["image.bytes"], use_threads=False
        )
        self._first = 0  # Place of the batch in the row group.
        self._batch = pyarrow.nulls(0)

    def read(self, position: int) -> bytes | None:
        """Return the image at a place in the row group; None if the row holds none."""
        if position < self._first:
            self._restart()
        while position >= self._first + len(self._batch):
            self._first += len(self._batch)
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"row group {self._group} ends before row {position}")
            (self._batch,) = batch.column("image").flatten()
        return self._batch[position - self._first].as_py()


@functools.lru_cache(maxsize=1)
def _open_group(path: str, group: int, *_: int) -> _Images:
    """Open a row group, once per process unless the file changes."""
    return _Images(path, group)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Raise an InputError that names the file if the block cannot read it."""
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} is damaged or no Parquet file: {reason}; fetch it again") from error


def _open(path: str) -> parquet.ParquetFile:
    """Open a Parquet file. Raise InputError unless it has the columns of images and labels."""
    # Without `pre_buffer` the bytes of a row group are read as they are decoded, not all at once.
    file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True)
    columns = {field.name: field.type for field in file.schema_arrow}
    image, label = columns.get("image"), columns.get("label")
    inside = {field.name: field.type for field in image} if image is not None and types.is_struct(image) else {}
    stored = inside.get("bytes")
    if stored is None or not (types.is_binary(stored) or types.is_large_binary(stored)):
        raise InputError(
            f"{path} has the columns {', '.join(columns)}, but needs an image with bytes and path, as the Hub's "
            "imagenet-1k; give other files"
        )
    if label is None or not types.is_integer(label):
        raise InputError(f"{path} needs a column label of whole numbers, but has {label or 'none'}; give other files")
    return file
