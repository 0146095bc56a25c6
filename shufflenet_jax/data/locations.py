"""Where the bytes of a stored file lie: a file, a part of one, or a member of a zip."""

import functools
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import NamedTuple

from ..errors import InputError
from ..files import LARGEST, read_file


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
                self._require_small(open_zip(self.path).getinfo(self.member).file_size)
                return open_zip(self.path).read(self.member)
            if self.size < 0:
                return read_file(self.path)
            self._require_small(self.size)
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        # zipfile raises the others for members that are missing, damaged, locked or packed in a way it does not know.
        except (OSError, EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.member or self.path} cannot be read: {reason}; repair or remove it") from error

    def _require_small(self, size):
        if size > LARGEST:
            raise OSError(f"it has {size:,} bytes")


@functools.cache
def open_zip(path):
    """Open a zip once in each process. Threads may read its members at the same time."""
    return zipfile.ZipFile(path)


def zip_files(path, *, splits=()):
    """List the files in a zip, sorted by path, as {parts of the path: Location}.

    Many zips hold everything in one folder of their own name, NAME/<split>/<class>/<image> or NAME/meta/<split>.txt:
    its name is left out of the parts, unless it is one of the `splits`.
    """
    names = [info.filename for info in open_zip(str(path)).infolist() if not info.is_dir()]
    files = {PurePosixPath(name).parts: Location(str(path), member=name) for name in names}
    tops = {parts[0] for parts in files}
    deep = all(len(parts) > 3 for parts in files) or any(parts[1:2] == ("meta",) for parts in files)
    if len(tops) == 1 and not tops & set(splits) and deep:
        files = {parts[1:]: location for parts, location in files.items()}
    return dict(sorted(files.items()))
