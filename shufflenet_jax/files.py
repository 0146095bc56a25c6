"""Places on disk: the cache, and files and folders that appear completely or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import InputError, Unchecked

LARGEST = 400_000_000  # Bytes of a file that is read at once: several times the size of any image.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError)  # The errors of zipfile.
MOST_SHOWN = 200  # Characters of a name in an error.
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # "gs://", or "gs:/" after pathlib.
REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # Reading raises none of these.
CACHE = "SHUFFLENET_JAX_CACHE"


def cache_dir() -> Path:
    """Return the folder of converted weights and compiled programs: $SHUFFLENET_JAX_CACHE, or the user's cache."""
    if CACHE in os.environ:
        return path_of(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shufflenet_jax"


class UnwritableError(InputError):
    """A place cannot be written: the disk is full or read-only, or a folder is gone or is no folder.

    Args:
      place: the file or folder.
      reason: the system's message.
      advice: what to do.

    Attributes:
      reason: the system's message.
    """

    def __init__(self, place: str | Path, reason: str | None, advice: str = "choose another place") -> None:
        super().__init__(f"{place} cannot be written: {reason}; {advice}")
        self.reason = reason


def why_unwritable(folder: Path) -> str | None:
    """Return why no file can be created in a folder; None if one can.

    Args:
      folder: which need not exist yet.
    """
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        return os.strerror(errno.ENOTDIR)
    if os.access(place, os.W_OK | os.X_OK):
        return None
    return os.strerror(errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES)


def path_of(name: Unchecked) -> Path:
    """Return the path that a user named, with ~ expanded.

    Args:
      name: of a file or folder.

    Raises:
      InputError: no file can have this name, or it is the address of a bucket.
    """
    if ADDRESS.match(str(name)):
        address = re.sub(":/(?!/)", "://", str(name), count=1)
        raise InputError(
            f"{address[:MOST_SHOWN]} is an address, but data, checkpoints and results lie in folders of this machine; "
            "copy it, mount the bucket, or name another place"
        )
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # The last for ~NAME without such a user.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(name)[:MOST_SHOWN]} cannot be read or written: {reason}; correct the name") from error
    return path


def real_path(path: str | Path) -> Path:
    """Return a path without links. Unlike `Path.resolve`, follow a loop of links as far as it goes, without an error.

    Args:
      path: of a file or folder, which need not exist.
    """
    return Path(os.path.realpath(path))


def read_file(path: str | Path, most: int = LARGEST) -> bytes:
    """Return the bytes of a file.

    Args:
      path: of the file.
      most: largest allowed number of bytes.

    Raises:
      OSError: there is no file, or it is too large, or it is a pipe or a device.
    """
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
        return file.read()


def open_file(path: str | Path) -> io.BufferedReader:
    """Open a file for reading its bytes.

    Args:
      path: of the file.

    Raises:
      OSError: there is no file, or it is a pipe or a device, which might never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "Is a directory" if os.path.isdir(path) else "Is no regular file")
    return open(path, "rb")


def require_plain(folder: Path) -> None:
    """Raise InputError if a folder holds a pipe, a device or a broken link, which libraries might try to read.

    Args:
      folder: its path.
    """
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{folder} is damaged: {path.relative_to(folder)} is neither a file nor a folder")


def refused_write(error: BaseException) -> str | None:
    """Return why a disk cannot be written, if that is the reason of an exception: it is full or read-only.

    Args:
      error: of any library.
    """
    if isinstance(error, OSError) and error.errno in REFUSED_WRITES:
        return error.strerror
    # TensorStore, Orbax, PyTorch and others wrap the system's errors in their own exceptions.
    return next((reason for reason in map(os.strerror, REFUSED_WRITES) if reason in str(error)), None)


@contextlib.contextmanager
def writing(target: Path, *, below: Path | None = None) -> Iterator[None]:
    """Raise an InputError that names the target if the block cannot write: the disk is full, or a folder is gone.

    Args:
      target: the file or folder that the block writes.
      below: the folder in which it writes, if that is another one.

    Raises:
      UnwritableError: the block cannot write.
    """
    try:
        yield
    except Exception as error:
        reason = refused_write(error)
        if reason is None and isinstance(error, OSError) and error.filename:
            reason = error.strerror if Path(error.filename).is_relative_to(below or target) else None
        if reason is None or isinstance(error, InputError):
            raise
        raise UnwritableError(target, reason, "make room there, or choose another place") from error


@contextlib.contextmanager
def written_aside(
    target: str | Path, *, folder: bool = False, check: Callable[[Path], object] = lambda _: None
) -> Iterator[Path]:
    """Yield a path in a new folder beside `target`; the file or folder there replaces the target after the block.

    If the block raises, or writes nothing, the target stays as it was.

    Args:
      target: the file or folder to write.
      folder: whether it is a folder; only a folder may replace a folder.
      check: called with the target after its replacement. If it raises, the old target returns.

    Raises:
      InputError: the place cannot be written, which is checked before the block runs; or the disk is full.
    """
    place = path_of(target).absolute()
    if place.is_dir() and not folder:
        raise InputError(f"{place} is a folder; name a file")
    if os.path.lexists(place) and not (place.is_file() or place.is_dir()):  # A device, or a link to nowhere.
        raise InputError(f"{place} is neither a file nor a folder; choose another place")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise UnwritableError(place, error.strerror) from error
    draft, old = aside / place.name, aside / "old"
    try:
        with writing(place, below=aside):
            yield draft
            if folder and place.exists():  # Renaming replaces files, but not folders.
                place.rename(old)
            try:
                draft.rename(place)
                check(place)
            except BaseException:
                if folder and place.exists():
                    place.rename(aside / "refused")
                if old.exists():
                    old.rename(place)
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Let one process at a time create a file or folder of the cache; the others wait.

    Args:
      target: the file or folder.

    Raises:
      UnwritableError: the cache cannot be written, or is full.
    """
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(target.with_name(f".{target.name}.lock"), os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise UnwritableError(target, error.strerror) from error
        try:
            with contextlib.suppress(OSError):  # Some network file systems have no locks.
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except UnwritableError as error:
        advice = f"name another folder in {CACHE}"
        raise UnwritableError(f"the cache {target.parent}", error.reason, advice) from error


def hash_of(path: str | Path) -> str:
    """Return the sha256 of a checkpoint file, in hexadecimal.

    Args:
      path: of the file.

    Raises:
      InputError: it cannot be read.
    """
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror}; check the path") from error


def printable(name: str) -> str:
    """Return a file name as text that can be printed, whatever bytes it has.

    Args:
      name: as Python holds it.
    """
    return name.encode(errors="backslashreplace").decode()
