"""Zips and tars as trees. Their members are read in place: nothing is ever unpacked beside them."""

import bz2
import gzip
import hashlib
import lzma
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .. import progress
from ..errors import InputError
from ..files import cache_dir, locked, printable, refused_write, written_aside
from .locations import UNREADABLE, Location, open_zip
from .trees import BROKEN, HIDDEN, OUTSIDE, REPLACED, SPECIAL, Listing, Skip, Tree, is_hidden

MOST_UNPACKED = 100  # Times its own size that a compressed tar may take, beyond a gigabyte.
DAMAGED_TAR = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error, lzma.LZMAError)
COMPRESSED: dict[bytes, Callable] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
UNICODE_PATH = 0x7075  # The field of a zip's member that has its name in UTF-8.
MOST_PADDING = 2**20  # Bytes behind a tar's end that are looked at: programs write up to 10 KiB of zeros there.


class Member(NamedTuple):
    """An entry of an archive: a file, a link, or, with neither location nor target, a folder or a device."""

    name: str
    location: Location | None = None
    target: str | None = None  # Of a link: the path in the archive that it leads to.
    is_folder: bool = False


def _branch(path: str) -> Tree:
    listing = Listing({}, {}, [], object())
    return Tree(path, lambda: listing)


def tree_of(path: str, members: Iterable[Member]) -> Tree:
    """Return the tree that an archive's members make; of members with one name the last one counts."""
    top, links = _branch(path), {}
    hidden: dict[tuple[str, ...], Location] = {}
    for member in members:
        parts = _parts(member.name)
        if parts is None:
            top.listing.skips.append(Skip(OUTSIDE, member.name))
        elif place := next((number for number, part in enumerate(parts, 1) if is_hidden(part)), 0):
            if not member.is_folder:
                _reach(top, parts[: place - 1]).listing.skips.append(Skip(HIDDEN, parts[-1]))
            if member.location:
                hidden[parts] = member.location
        elif member.target is not None:
            links[parts] = member.target
        elif member.location and parts:
            links.pop(parts, None)
            folder = _reach(top, parts[:-1])
            if parts[-1] in folder.files:
                folder.listing.skips.append(Skip(REPLACED, parts[-1]))
            folder.files[parts[-1]] = member.location
        elif member.is_folder:
            _reach(top, parts)
        else:
            top.listing.skips.append(Skip(SPECIAL, member.name))
    _follow(top, links, hidden)
    return top


def _parts(name: str) -> tuple[str, ...] | None:
    """Return the parts of a member's path, or None if it leads outside the archive."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    return None if name.startswith("/") or ".." in parts else parts


def _reach(tree: Tree, parts: Iterable[str]) -> Tree:
    """Return the folder at a path below a branch; it is made where there is none."""
    for part in parts:
        if part not in tree.folders:
            tree.folders[part] = _branch(f"{tree.path}/{part}")
        tree = tree.folders[part]
    return tree


def _follow(top: Tree, links: dict[tuple[str, ...], str], hidden: dict[tuple[str, ...], Location]) -> None:
    """Put what links lead to in their places, also links to links; those to folders around them are left out.

    Links to hidden files count, as they do on a disk: stores of data keep the files themselves in hidden folders.
    """
    found = True
    while found:
        found = False
        for parts, target in list(links.items()):
            wanted = _parts(target)
            node = None if wanted is None else top.find(wanted) or hidden.get(wanted)
            if node is None:
                continue
            found = links.pop(parts) is not None
            folder = _reach(top, parts[:-1])
            if isinstance(node, Location):
                folder.files[parts[-1]] = node
            elif wanted != parts[: len(wanted or ())]:
                folder.folders[parts[-1]] = node
    for parts in links:
        _reach(top, parts[:-1]).listing.skips.append(Skip(BROKEN, parts[-1]))


# Zips


def begins_as_zip(path: Path) -> bool:
    """Whether a file begins like a zip, whatever follows."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def zip_tree(path: Path) -> Tree:
    try:
        members = open_zip(str(path)).infolist()
        names = [_zip_name(info) for info in members]
        # The standard wants slashes; some older tools of Windows wrote backslashes alone.
        if not any("/" in name for name in names):
            names = [name.replace("\\", "/") for name in names]
        locked_name = next((n for n, info in zip(names, members, strict=True) if info.flag_bits & 1), None)
        if locked_name is not None:
            raise InputError(
                f"{path} is locked: {printable(locked_name)} needs a password; unpack it, and name its folder"
            )
        return tree_of(str(path), map(partial(_zip_member, str(path)), names, members))
    except InputError:
        raise
    except (*UNREADABLE, struct.error) as error:
        raise InputError(f"{path} is damaged: {error}; fetch it again") from error


def _zip_member(path: str, name: str, info: zipfile.ZipInfo) -> Member:
    if name.endswith("/"):
        return Member(name, is_folder=True)
    if stat.S_ISLNK(info.external_attr >> 16) and info.file_size < 4096:
        target = open_zip(path).read(info).decode(errors="surrogateescape")
        return Member(name, target=_target(name, target))
    return Member(name, Location(path, member=info.filename))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name: as its Unicode field says, else what is UTF-8 of it so, and the rest in code page 437."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        raw = info.filename.encode("cp437")
        named = _unicode_path(info.extra, raw)
        # Part by part: a file's name must not change that of its folder.
        return named.decode() if named else "/".join(map(_decoded, raw.split(b"/")))
    except UnicodeError:
        return info.filename


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeError:
        return raw.decode("cp437")


def _unicode_path(extra: bytes, raw: bytes) -> bytes | None:
    """Return the name in UTF-8 from a member's extra fields, if it belongs to the name in another code page."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == UNICODE_PATH and field[1:5] == struct.pack("<I", zlib.crc32(raw)):
            return field[5:]
    return None


def _target(name: str, target: str) -> str:
    """Return the path in an archive that a symbolic link leads to."""
    return posixpath.normpath(
        posixpath.join("/", target) if target.startswith("/") else posixpath.join(posixpath.dirname(name), target)
    )


# Tars


def plain_tar(path: Path) -> Path | None:
    """Return a tar that is not compressed: the file itself, or its copy in the cache; None where it is no tar."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        opened = next((opened for magic, opened in COMPRESSED.items() if start.startswith(magic)), None)
        if opened is None:
            return path if tarfile.is_tarfile(path) else None
    except DAMAGED_TAR as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}; check its permissions, or fetch it again") from error
    return _unpacked(path, opened)


def _unpacked(path: Path, opened: Callable) -> Path:
    """Decompress a tar into the cache, unless it is there. The copy belongs to the file's place, size and time."""
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape")
    target = cache_dir() / "archives" / f"{hashlib.sha256(key).hexdigest()[:16]}.tar"
    with locked(target):
        if not target.exists():
            with written_aside(target) as draft:
                try:
                    _decompress(path, opened, draft, most=10**9 + MOST_UNPACKED * status.st_size)
                except DAMAGED_TAR as error:
                    if isinstance(error, InputError) or refused_write(error):
                        raise
                    raise InputError(f"{path} is damaged: {error}; fetch it again") from error
                for _ in read_tar(path, draft):
                    pass
    return target


def _decompress(path: Path, opened: Callable, draft: Path, most: int) -> None:
    """Write the plain form of a compressed file. Raises InputError where it is larger than `most` bytes."""
    with (
        opened(path, "rb") as source,
        open(draft, "wb") as copy,
        progress.bar(total=None, unit="B", description=f"unpacking {path.name}", scaled=True) as bar,
    ):
        while block := source.read(2**20):
            copy.write(block)
            bar.update(len(block))
            if copy.tell() > most:
                raise InputError(f"{path} unpacks to more than {most:,} bytes; unpack it, and name its folder")


def read_tar(path: Path, plain: Path, offset: int = 0, size: int = -1) -> Iterator[Member]:
    """Yield the members of a tar.

    Args:
      path: the tar that the user named.
      plain: its form that is not compressed.
      offset: where it begins in the file.
      size: its bytes; -1: all to the end of the file.
    Raises:
      InputError: it is damaged, or holds files in a form that cannot be read in place.
    """
    try:
        with open(plain, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                before = -1
                for info in iter(tar.next, None):
                    tar.members.clear()  # type: ignore[attr-defined] # The library would keep a kilobyte of each.
                    if info.size < 0 or info.offset_data <= before:
                        raise tarfile.ReadError("its members overlap")
                    before = info.offset_data
                    yield _tar_member(str(plain), info)
                # The library ends silently at what it does not understand.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("its end is missing")
                left = MOST_PADDING if size < 0 else min(max(offset + size - file.tell(), 0), MOST_PADDING)
                if any(file.read(left)):
                    raise InputError(
                        f"{path} holds more behind its end, as if tars were joined; unpack it with tar -xi, "
                        "and name its folder"
                    )
    except InputError:
        raise
    except DAMAGED_TAR as error:
        raise InputError(f"{path} is damaged: {error}; fetch it again") from error


def _tar_member(plain: str, info: tarfile.TarInfo) -> Member:
    if info.issparse():
        raise tarfile.ReadError(f"{printable(info.name)} is stored with holes")
    if info.isfile():
        return Member(info.name, Location(plain, info.offset_data, info.size))
    if info.islnk():
        return Member(info.name, target=info.linkname)
    if info.issym():
        return Member(info.name, target=_target(info.name, info.linkname))
    return Member(info.name, is_folder=info.isdir())
