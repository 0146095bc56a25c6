"""Locations of stored bytes: a file, a part of a file, a member of a zip, or a row of a Parquet file."""

import functools
import lzma
import os
import threading
import zipfile
import zlib
from typing import NamedTuple

from ..errors import InputError
from ..files import LARGEST, read_file

# zipfile raises these for members that are missing, damaged, encrypted, or compressed by an unsupported method.
IN_ZIP = (EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
UNREADABLE = (OSError, *IN_ZIP)


class Location(NamedTuple):
    """A file, a part of a file, a member of a zip, or a row of a Parquet file. Other processes can use it too.

    Attributes:
      path: path of the file.
      offset: position in the file where the part starts, in bytes.
      size: size of the part in bytes; -1 is the whole file.
      member: name inside the zip; None outside zips.
      row: row group and position in it; None outside Parquet files.
    """

    path: str
    offset: int = 0
    size: int = -1
    member: str | None = None
    row: tuple[int, int] | None = None

    def read(self) -> bytes:
        """Read the bytes.

        Raises:
          InputError: they cannot be read, or there are far more of them than an image has.
        """
        if self.row is not None:
            from .rows import read_image  # Importing pyarrow takes a third of a second, and only `prepare` needs it.

            return read_image(self.path, *self.row)
        try:
            if self.member is not None:
                archive = open_zip(self.path)
                self._require_small(archive.getinfo(self.member).file_size)
                return archive.read(self.member)
            if self.size < 0:
                return read_file(self.path)
            self._require_small(self.size)
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
            if len(data) < self.size:
                raise EOFError(f"{self.path} is truncated")
            return data
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.member or self.path} cannot be read: {reason}; repair or remove it") from error

    def length(self) -> int:
        """Return the number of bytes without reading them; -1 if the file is missing."""
        if self.size >= 0:
            return self.size
        try:
            if self.member is not None:
                return open_zip(self.path).getinfo(self.member).file_size
            return os.stat(self.path).st_size
        except (OSError, KeyError, ValueError):  # ValueError: no file can have this name.
            return -1

    def _require_small(self, size: int) -> None:
        if size > LARGEST:
            raise OSError(f"it has {size:,} bytes")


def open_zip(path: str) -> zipfile.ZipFile:
    """Open a zip, once per process unless the file changes. Several threads may read members at a time.

    A forked process opens the zip again, since it would otherwise share the position in the file with its parent.

    Args:
      path: path of the zip.
    """
    status = os.stat(path)
    with _opening:  # The directory of a million members takes a gigabyte, so it is read once.
        return _open_zip(path, os.getpid(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


_opening = threading.Lock()


@functools.lru_cache(maxsize=4)
def _open_zip(path: str, *_: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
