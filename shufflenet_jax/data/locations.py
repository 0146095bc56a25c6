"""Where the bytes of a stored file lie: a file, a part of one, or a member of a zip."""

import functools
import lzma
import os
import threading
import zipfile
import zlib
from typing import NamedTuple

from ..errors import InputError
from ..files import LARGEST, read_file

# zipfile raises these for members that are missing, damaged, locked or packed in a way it does not know.
IN_ZIP = (EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
UNREADABLE = (OSError, *IN_ZIP)


class Location(NamedTuple):
    """A file, a part of one, or a member of a zip. It can be sent to other processes."""

    path: str
    offset: int = 0
    size: int = -1  # Bytes; -1 is the whole file.
    member: str | None = None  # Name inside the zip.

    def read(self):
        """Read the bytes. Raises InputError if they cannot be read, or are far more than an image has."""
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
                raise EOFError(f"{self.path} ends in the middle of it")
            return data
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.member or self.path} cannot be read: {reason}; repair or remove it") from error

    def length(self) -> int:
        """Return the number of bytes, without reading them; -1 where there is no such file."""
        if self.size >= 0:
            return self.size
        try:
            if self.member is not None:
                return open_zip(self.path).getinfo(self.member).file_size
            return os.stat(self.path).st_size
        except (OSError, KeyError, ValueError):  # ValueError is of a name that no file can have.
            return -1

    def _require_small(self, size):
        if size > LARGEST:
            raise OSError(f"it has {size:,} bytes")


def open_zip(path: str) -> zipfile.ZipFile:
    """Open a zip once in each process, and anew when the file is another one. Threads may read members side by side.

    A process that was forked opens it for itself: else both would move one position in the file.
    """
    status = os.stat(path)
    with _opening:  # Its directory takes a gigabyte for a million members.
        return _open_zip(path, os.getpid(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


_opening = threading.Lock()


@functools.lru_cache(maxsize=4)
def _open_zip(path: str, *_: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
