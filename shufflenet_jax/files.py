"""Places on disk: the cache, and files and folders that appear whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import InputError

LARGEST = 400_000_000  # Bytes of a file that is read at once: several times what any image takes.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError)  # What zipfile raises.
MOST_SHOWN = 200  # Characters of a name in an error.
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # "gs://", or what pathlib makes of it: "gs:/".
REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # Which no reading raises.
CACHE = "SHUFFLENET_JAX_CACHE"


def cache_dir() -> Path:
    """Where converted weights and compiled programs are kept: $SHUFFLENET_JAX_CACHE, or the user's cache folder."""
    if CACHE in os.environ:
        return path_of(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shufflenet_jax"


class UnwritableError(InputError):
    """Something cannot be written: the disk is full or read-only, or a folder is gone or no folder.

    Args:
      place: what cannot be written.
      reason: why, in the system's words.
      advice: what to do.
    """

    def __init__(self, place: str | Path, reason: str | None, advice: str = "choose another place") -> None:
        super().__init__(f"{place} cannot be written: {reason}; {advice}")
        self.reason = reason


def why_unwritable(folder: Path) -> str | None:
    """Return why no file can be made in a folder, which need not exist yet; None where nothing speaks against it."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        return os.strerror(errno.ENOTDIR)
    if os.access(place, os.W_OK | os.X_OK):
        return None
    return os.strerror(errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES)


def path_of(name: str | Path) -> Path:
    """A path that the user named, ~ expanded.

    Raises:
      InputError: there can be no file of this name, or it is the address of a bucket.
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
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # The last of ~NAME where there is no such user.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(name)[:MOST_SHOWN]} cannot be read or written: {reason}; correct the name") from error
    return path


def read_file(path, most=LARGEST):
    """The bytes of a file. Raises OSError where there is none, or a pipe or a device, or it has more than `most`."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
        return file.read()


def open_file(path):
    """A file that is open for reading its bytes. Raises OSError for what might never end: a pipe or a device."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "Is a directory" if os.path.isdir(path) else "Is no regular file")
    return open(path, "rb")


def require_plain(folder):
    """Raises InputError where a folder that libraries read holds a pipe, a device or a broken link."""
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{folder} is damaged: {path.relative_to(folder)} is neither a file nor a folder")


def refused_write(error: BaseException) -> str | None:
    """Return why a disk takes no more, if that is what an exception of any library says: it is full or read-only."""
    if isinstance(error, OSError) and error.errno in REFUSED_WRITES:
        return error.strerror
    # TensorStore, Orbax, PyTorch and others have exceptions of their own for what the system reports.
    return next((reason for reason in map(os.strerror, REFUSED_WRITES) if reason in str(error)), None)


@contextlib.contextmanager
def writing(target: Path, *, below: Path | None = None) -> Iterator[None]:
    """Raise an InputError that names the target where the block cannot write: the disk is full, or a folder is gone.

    Args:
      target: the file or folder that the block writes.
      below: where it writes it, if that is elsewhere.
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
    target: str | Path, *, folder: bool = False, check: Callable[[Path], object] = lambda target: None
) -> Iterator[Path]:
    """A path in a new folder beside `target`: what the block leaves there takes the target's place at its end.

    If the block raises, or leaves nothing, the target stays as it was.

    Args:
      target: the file or folder to write.
      folder: whether it is a folder, which alone may replace a folder.
      check: opens the target when it is in its place. If it raises, what was there before returns.

    Raises:
      InputError: nothing can be written, which shows before the block runs; or the disk is full.
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
            if folder and place.exists():  # A folder does not give way to a rename; a file does.
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
    """Let one process at a time make a file or folder of the cache: the others wait, and find it made.

    Raises:
      UnwritableError: the cache cannot be written, or cannot take what the block writes.
    """
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(target.with_name(f".{target.name}.lock"), os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise UnwritableError(target, error.strerror) from error
        try:
            with contextlib.suppress(OSError):  # Some network file systems know no locks.
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except UnwritableError as error:
        advice = f"name another folder in {CACHE}"
        raise UnwritableError(f"the cache {target.parent}", error.reason, advice) from error


def hash_of(path):
    """The sha256 of a checkpoint file, in hexadecimal. Raises InputError where it cannot be read."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror}; check the path") from error


def printable(name):
    """A file name as text, whatever bytes it consists of."""
    return name.encode(errors="backslashreplace").decode()
