"""Zips and tars as trees of files. Members are read in place; nothing is unpacked beside the archive."""

import bz2
import gzip
import hashlib
import io
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
from typing import Literal, NamedTuple

from .. import progress
from ..errors import InputError
from ..files import cache_dir, locked, printable, real_path, refused_write, written_aside
from .locations import UNREADABLE, Location, open_zip
from .trees import BROKEN, HIDDEN, OUTSIDE, REPLACED, SPECIAL, Listing, Skip, Tree, is_hidden

Opener = Callable[[Path, Literal["rb"]], io.BufferedIOBase]

MOST_UNPACKED = 100  # A compressed tar may unpack to this many times its size, plus a gigabyte.
DAMAGED_TAR = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error, lzma.LZMAError)
# {first bytes of a file: the function that opens it for decompression}
COMPRESSED: dict[bytes, Opener] = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\0": lzma.LZMAFile}
UNICODE_PATH = 0x7075  # The extra field of a zip's member with its name in UTF-8.
MOST_PADDING = 2**20  # Bytes that are checked after the end of a tar. Programs write up to 10 KiB of zeros there.


class Member(NamedTuple):
    """An entry of an archive: a file, a link, or, without location and target, a folder or a device.

    Attributes:
      name: its path in the archive.
      location: where the bytes of a file are.
      target: the path in the archive to which a link points.
      is_folder: whether it is a folder.
    """

    name: str
    location: Location | None = None
    target: str | None = None
    is_folder: bool = False


def _branch(path: str) -> Tree:
    listing = Listing({}, {}, [], object())
    return Tree(path, lambda: listing)


def tree_of(path: str, members: Iterable[Member]) -> Tree:
    """Return the members of an archive as a tree.

    Args:
      path: path of the archive, for messages.
      members: its members. The last one of several with the same name replaces the others.
    """
    top = _branch(path)
    links: dict[tuple[str, ...], str] = {}
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
    """Return the parts of a member's path, or None if the path leads outside the archive."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    return None if name.startswith("/") or ".." in parts else parts


def _reach(tree: Tree, parts: Iterable[str]) -> Tree:
    """Return the folder at a path below a tree; create it if it is missing."""
    for part in parts:
        if part not in tree.folders:
            tree.folders[part] = _branch(f"{tree.path}/{part}")
        tree = tree.folders[part]
    return tree


def _follow(top: Tree, links: dict[tuple[str, ...], str], hidden: dict[tuple[str, ...], Location]) -> None:
    """Replace links, also links to links, by their targets. Skip links to folders that contain them.

    Links to hidden files count, as they do on a disk, since some data stores keep all files in hidden folders.

    Args:
      top: the tree of the archive.
      links: {parts of a link's path: path of its target}.
      hidden: {parts of a hidden file's path: its location}.
    """
    progressed = True
    while progressed:
        progressed = False
        for parts, target in list(links.items()):
            wanted = _parts(target)
            node = None if wanted is None else top.find(wanted) or hidden.get(wanted)
            if node is None:
                continue
            del links[parts]
            progressed = True
            folder = _reach(top, parts[:-1])
            if isinstance(node, Location):
                folder.files[parts[-1]] = node
            elif wanted != parts[: len(wanted or ())]:
                folder.folders[parts[-1]] = node
    for parts in links:
        _reach(top, parts[:-1]).listing.skips.append(Skip(BROKEN, parts[-1]))


# Zips


def begins_as_zip(path: Path) -> bool:
    """Whether the first bytes of a file are those of a zip."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def zip_tree(path: Path) -> Tree:
    """Read the members of a zip as a tree.

    Raises:
      InputError: the zip is damaged or encrypted.
    """
    try:
        members = open_zip(str(path)).infolist()
        names = [_zip_name(info) for info in members]
        # The standard requires slashes; some older tools on Windows wrote backslashes.
        if not any("/" in name for name in names):
            names = [name.replace("\\", "/") for name in names]
        locked_name = next((n for n, info in zip(names, members, strict=True) if info.flag_bits & 1), None)
        if locked_name is not None:
            raise InputError(
                f"{path} is encrypted: {printable(locked_name)} needs a password; unpack it, and give its folder"
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
    """Return a member's name from its Unicode field, else decode each part as UTF-8 or, failing that, code page 437."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        raw = info.filename.encode("cp437")
        named = _unicode_path(info.extra, raw)
        # Each part alone: the name of a file must not affect the name of its folder.
        return named.decode() if named else "/".join(map(_decoded, raw.split(b"/")))
    except UnicodeError:
        return info.filename


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeError:
        return raw.decode("cp437")


def _unicode_path(extra: bytes, raw: bytes) -> bytes | None:
    """Return the UTF-8 name in a member's extra fields if its checksum matches the name in the member's code page."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == UNICODE_PATH and field[1:5] == struct.pack("<I", zlib.crc32(raw)):
            return field[5:]
    return None


def _target(name: str, target: str) -> str:
    """Return the path in an archive to which a symbolic link points."""
    return posixpath.normpath(
        posixpath.join("/", target) if target.startswith("/") else posixpath.join(posixpath.dirname(name), target)
    )


# Tars


def plain_tar(path: Path) -> Path | None:
    """Return the uncompressed form of a tar.

    Args:
      path: a file.

    Returns:
      The file itself, or for a compressed tar a copy in the cache; None if the file is not a tar.

    Raises:
      InputError: the file cannot be read, is damaged, or unpacks to an unreasonable size.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
        if opener is None:
            return path if tarfile.is_tarfile(path) else None
    except DAMAGED_TAR as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}; check its permissions, or fetch it again") from error
    return _unpacked(path, opener)


def _unpacked(path: Path, opener: Opener) -> Path:
    """Return the decompressed copy of a tar in the cache, whose key is the file's path, size and time of change."""
    status = path.stat()
    key = f"{real_path(path)} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape")
    target = cache_dir() / "archives" / f"{hashlib.sha256(key).hexdigest()[:16]}.tar"
    with locked(target):
        if not target.exists():
            with written_aside(target) as draft:
                try:
                    _decompress(path, opener, draft, most=10**9 + MOST_UNPACKED * status.st_size)
                except DAMAGED_TAR as error:
                    if isinstance(error, InputError) or refused_write(error):
                        raise
                    raise InputError(f"{path} is damaged: {error}; fetch it again") from error
                for _ in read_tar(path, draft):
                    pass
    return target


def _decompress(path: Path, opener: Opener, draft: Path, most: int) -> None:
    """Decompress a file into a draft. Raise InputError if that takes more than `most` bytes."""
    with (
        opener(path, "rb") as source,
        open(draft, "wb") as copy,
        progress.bar(total=None, unit="B", description=f"unpacking {path.name}", scaled=True) as bar,
    ):
        while block := source.read(2**20):
            copy.write(block)
            bar.update(len(block))
            if copy.tell() > most:
                raise InputError(f"{path} unpacks to more than {most:,} bytes; unpack it, and give its folder")


def read_tar(path: Path, plain: Path, offset: int = 0, size: int = -1) -> Iterator[Member]:
    """Yield the members of a tar.

    Args:
      path: path of the tar, for errors.
      plain: the file that holds its uncompressed form.
      offset: position of the tar in that file, in bytes.
      size: size of the tar in bytes; -1: up to the end of the file.

    Raises:
      InputError: the tar is damaged, or holds files in a form that cannot be read in place.
    """
    try:
        with open(plain, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                before = -1
                for info in iter(tar.next, None):
                    tar.members.clear()  # type: ignore[attr-defined] # tarfile would keep a kilobyte per member.
                    if info.size < 0 or info.offset_data <= before:
                        raise tarfile.ReadError("its members overlap")
                    before = info.offset_data
                    yield _tar_member(str(plain), info)
                # tarfile stops silently at data that it does not understand.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("its end is missing")
                left = MOST_PADDING if size < 0 else min(max(offset + size - file.tell(), 0), MOST_PADDING)
                if any(file.read(left)):
                    raise InputError(
                        f"{path} continues after its end, like several tars joined together; unpack it with tar -xi, "
                        "and give its folder"
                    )
    except InputError:
        raise
    except DAMAGED_TAR as error:
        raise InputError(f"{path} is damaged: {error}; fetch it again") from error


def _tar_member(plain: str, info: tarfile.TarInfo) -> Member:
    if info.issparse():
        raise tarfile.ReadError(f"{printable(info.name)} is a sparse file")
    if info.isfile():
        return Member(info.name, Location(plain, info.offset_data, info.size))
    if info.islnk():
        return Member(info.name, target=info.linkname)
    if info.issym():
        return Member(info.name, target=_target(info.name, info.linkname))
    return Member(info.name, is_folder=info.isdir())
