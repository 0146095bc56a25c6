"""Folders as trees of what is visible in them: images and other files, without what is hidden."""

import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..files import printable
from .locations import Location

# What OpenCV and Pillow both decode.
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
) | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2"}
# What systems put beside images, in small letters; names that begin with a dot are hidden too.
SYSTEM = frozenset(
    ("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found")
) | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__"}
# Why a file is ignored.
HIDDEN, OTHER = "hidden or system", "without the suffix of an image"
BROKEN, SPECIAL, OUTSIDE = "behind a broken link", "neither file nor folder", "with a path that leads outside"
REPLACED = "replaced by a later one of the same name"  # In archives.
HARMLESS = {HIDDEN, OTHER}
NAMED = 3  # Names shown for a reason.
MOST_COUNTED = 10_000  # Files counted in a hidden folder: some hold whole copies of the data.


class Skip(NamedTuple):
    """Files that are ignored."""

    reason: str
    name: str
    number: int = 1


class Skipped:
    """How many files are ignored, by reason, with the names of the first ones."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._names: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count what is ignored for a reason."""
        self.counts[reason] += count
        if len(self._names[reason]) < NAMED:
            self._names[reason].append("".join(map(_shown, printable(name))))

    def add_file(self, name: str, reason: str) -> None:
        """Count a file: an image for the reason, any other because it is none."""
        self.add(reason if is_image(name) else OTHER, name)

    def merge(self, other: "Skipped") -> None:
        """Count what another one has counted."""
        for reason, count in other.counts.items():
            self.counts[reason] += count
            self._names[reason] = [*self._names[reason], *other._names[reason]][:NAMED]

    @property
    def total(self) -> int:
        """How many files are ignored for any reason."""
        return self.counts.total()

    @property
    def harmless(self) -> bool:
        """Whether nothing among them could have been meant as an image."""
        return set(self.counts) <= HARMLESS

    def describe(self, place: str) -> str:
        """Return one line: how many files of a place are skipped, and why."""
        files = "file" if self.total == 1 else "files"
        return f"skipped: {self.total:,} {files} of {place}: {', '.join(map(self._describe, self.counts))}"

    def _describe(self, reason: str) -> str:
        names, more = self._names[reason], self.counts[reason] - len(self._names[reason])
        named = "" if reason == HIDDEN else f" ({', '.join(names)}{', ...' if more > 0 else ''})"
        least = "at least " if reason == HIDDEN and self.counts[reason] >= MOST_COUNTED else ""
        return f"{least}{self.counts[reason]:,} {reason}{named}"


def _shown(letter: str) -> str:
    """Return a letter as it is, or escaped if it would break a line or move the cursor."""
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


class Listing(NamedTuple):
    """What is in a folder."""

    files: dict[str, Location]  # Images and others.
    folders: "dict[str, Tree]"
    skips: list[Skip]
    identity: object  # The same for all ways to the folder.


class Tree:
    """A folder, listed when it is first looked at.

    Attributes:
      path: how messages call it.
    """

    def __init__(self, path: str, scan: Callable[[], Listing]) -> None:
        self.path, self._scan = path, scan

    @cached_property
    def listing(self) -> Listing:
        """What is in the folder."""
        return self._scan()

    @property
    def files(self) -> dict[str, Location]:
        """The visible files by their names."""
        return self.listing.files

    @property
    def folders(self) -> "dict[str, Tree]":
        """The visible folders by their names."""
        return self.listing.folders

    @property
    def images(self) -> dict[str, Location]:
        """The images directly in the folder, by their names in order."""
        return {name: self.files[name] for name in sorted(self.files) if is_image(name)}

    def find(self, parts: Iterable[str]) -> "Tree | Location | None":
        """Return the folder or file at a path below this folder."""
        found: Tree | Location | None = self
        for part in parts:
            found = found.folders.get(part) or found.files.get(part) if isinstance(found, Tree) else None
        return found


def is_hidden(name: str) -> bool:
    """Whether a name is that of a file or folder which is hidden, or which a system made."""
    return name.startswith(".") or name.casefold() in SYSTEM


def is_image(name: str) -> bool:
    """Whether a name has the suffix of an image, in small or large letters."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def walk(tree: Tree, skipped: Skipped, within: str = "") -> Iterator[tuple[str, Location]]:
    """Yield the path and Location of each image below a folder, in the order of paths.

    Args:
      tree: the folder. Whatever links lead to, each folder is entered once.
      skipped: counts what is ignored.
      within: path of the folder, by which ignored files are named.
    """
    seen: set[object] = set()
    ahead: list[tuple[str, Tree | Location]] = [("", tree)]
    while ahead:
        path, found = ahead.pop()
        if isinstance(found, Location):
            if is_image(path):
                yield path, found
            else:
                skipped.add(OTHER, f"{within}{path}")
        elif found.listing.identity not in seen:
            seen.add(found.listing.identity)
            prefix = f"{path}/" if path else ""
            for skip in found.listing.skips:
                skipped.add(skip.reason, f"{within}{prefix}{skip.name}", skip.number)
            inside: list[tuple[str, Tree | Location]] = [*found.files.items(), *found.folders.items()]
            inside.sort(key=lambda item: item[0], reverse=True)
            ahead += [(prefix + name, node) for name, node in inside]


def has_images(tree: Tree) -> bool:
    """Whether there is any image in a folder or below it."""
    return next(walk(tree, Skipped()), None) is not None


def disk_tree(path: Path) -> Tree:
    """Open a folder on a disk."""
    return _tree_at(str(path), frozenset(_identity(str(parent)) for parent in path.resolve().parents))


def _tree_at(path: str, above: frozenset[object]) -> Tree:
    return Tree(path, partial(_scan, path, above))


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _scan(path: str, above: frozenset[object]) -> Listing:
    """List a folder on a disk. Links to folders around it are left out: they would never end."""
    try:
        listing = Listing({}, {}, [], _identity(path))
        above |= {listing.identity}
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                _add_entry(entry, listing, above)
    except OSError as error:
        raise InputError(f"folder {path} cannot be read: {error.strerror}; check its permissions") from error
    return listing


def _add_entry(entry: os.DirEntry[str], listing: Listing, above: frozenset[object]) -> None:
    kind = _kind_of(entry)
    if is_hidden(entry.name):
        listing.skips.append(Skip(HIDDEN, entry.name, _count_files(entry)))
    elif kind == "folder":
        if not entry.is_symlink() or _identity(entry.path) not in above:
            listing.folders[entry.name] = _tree_at(entry.path, above)
    elif kind == "file":
        listing.files[entry.name] = Location(entry.path)
    else:
        listing.skips.append(Skip(BROKEN if entry.is_symlink() and kind == "nothing" else SPECIAL, entry.name))


def _kind_of(entry: os.DirEntry[str]) -> str:
    """Whether an entry is, or a link leads to, a "folder", a "file", something "else" or "nothing"."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except OSError:  # Nothing there, or links that lead in a circle.
        return "nothing"
    return "else"


def _count_files(entry: os.DirEntry[str]) -> int:
    """Count the files in a hidden folder, as far as MOST_COUNTED; a file is one."""
    if not entry.is_dir(follow_symlinks=False):
        return 1
    count = 0
    for _, _, files in os.walk(entry.path):
        count += len(files)
        if count >= MOST_COUNTED:
            break
    return count
