"""Places on disk: the cache, and files and folders that appear whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path

from .errors import InputError

LARGEST = 400_000_000  # Bytes of a file that is read at once: several times what any image takes.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError)  # What zipfile raises.
MOST_SHOWN = 200  # Characters of a name in an error.


def cache_dir():
    """Where converted weights and compiled programs are kept: $SHUFFLENET_JAX_CACHE, or the user's cache folder."""
    if "SHUFFLENET_JAX_CACHE" in os.environ:
        return Path(os.environ["SHUFFLENET_JAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shufflenet_jax"


def path_of(name):
    """A path that the user named, ~ expanded. Raises InputError where there can be no file of this name."""
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # The last of ~NAME where there is no such user.
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


@contextlib.contextmanager
def written_aside(target, *, folder=False):
    """A path in a new folder beside `target`: what the block leaves there takes the target's place at its end.

    If the block raises, or leaves nothing, the target stays as it was. Raises InputError, before the block runs, where
    nothing can be written; a folder is replaced only by a `folder`.
    """
    target = path_of(target).absolute()
    if target.is_dir() and not folder:
        raise InputError(f"{target} is a folder; name a file")
    if os.path.lexists(target) and not (target.is_file() or target.is_dir()):  # A device, or a link to nowhere.
        raise InputError(f"{target} is neither a file nor a folder; choose another place")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}; choose another place") from error
    draft, old = aside / target.name, aside / "old"
    try:
        yield draft
        if folder and target.exists():  # A folder does not give way to a rename; a file does.
            target.rename(old)
        try:
            draft.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(target):
    """Lets one process at a time make a file or folder of the cache: the others wait, and find it made."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target.with_name(f".{target.name}.lock"), os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise InputError(f"the cache {target.parent} cannot be written: {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):  # Some network file systems know no locks.
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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
