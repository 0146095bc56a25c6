"""Folders as trees of their visible images and other files."""

import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..files import printable, real_path
from .locations import Location

# Formats that both OpenCV and Pillow decode.
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
) | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2"}
# Names, in lower case, that operating systems put beside images. Names that begin with a dot are hidden too.
SYSTEM = frozenset(
    ("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found")
) | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__"}
# Reasons to ignore a file, as the end of "3 files are ...".
HIDDEN, OTHER = "hidden or system", "without the suffix of an image"
BROKEN, SPECIAL, OUTSIDE = "behind a broken link", "neither file nor folder", "with a path that leads outside"
REPLACED = "replaced by a later one of the same name"  # Only in archives.
HARMLESS = {HIDDEN, OTHER}
NAMED = 3  # Number of file names that a message shows per reason.
MOST_COUNTED = 10_000  # Counting the files of a hidden folder stops here; some hold copies of the whole data.


class Skip(NamedTuple):
    """Ignored files.

    Attributes:
      reason: why they are ignored.
      name: of the file, or of the folder that holds them.
      number: how many files.
    """

    reason: str
    name: str
    number: int = 1


class Skipped:
    """Counts of ignored files by reason, with the names of the first ones.

    Attributes:
      counts: {reason: number of files}.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._names: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count ignored files.

        Args:
          reason: why they are ignored.
          name: of the file, or of the folder that holds them.
          count: how many files.
        """
        self.counts[reason] += count
        if len(self._names[reason]) < NAMED:
            self._names[reason].append("".join(map(_shown, printable(name))))

    def add_file(self, name: str, reason: str) -> None:
        """Count an ignored file.

        Args:
          name: of the file.
          reason: why it is ignored if it is an image; other files are ignored for their suffix.
        """
        self.add(reason if is_image(name) else OTHER, name)

    def merge(self, other: "Skipped") -> None:
        """Add the counts of another Skipped."""
        for reason, count in other.counts.items():
            self.counts[reason] += count
            self._names[reason] = [*self._names[reason], *other._names[reason]][:NAMED]

    @property
    def total(self) -> int:
        """The number of ignored files."""
        return self.counts.total()

    @property
    def harmless(self) -> bool:
        """Whether all ignored files are hidden or have no suffix of an image."""
        return set(self.counts) <= HARMLESS

    def describe(self, place: str) -> str:
        """Return one line about the ignored files of a place: their number, the reasons and some names."""
        files = "file" if self.total == 1 else "files"
        return f"skipped: {self.total:,} {files} of {place}: {', '.join(map(self._describe, self.counts))}"

    def _describe(self, reason: str) -> str:
        names, more = self._names[reason], self.counts[reason] - len(self._names[reason])
        named = "" if reason == HIDDEN else f" ({', '.join(names)}{', ...' if more > 0 else ''})"
        least = "at least " if reason == HIDDEN and self.counts[reason] >= MOST_COUNTED else ""
        return f"{least}{self.counts[reason]:,} {reason}{named}"


def _shown(letter: str) -> str:
    """Return a letter, escaped if it would break a line or move the cursor."""
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


class Listing(NamedTuple):
    """The contents of a folder.

    Attributes:
      files: {name: location} of images and other files.
      folders: {name: folder}.
      skips: ignored files.
      identity: equal for all paths to the folder.
    """

    files: dict[str, Location]
    folders: "dict[str, Tree]"
    skips: list[Skip]
    identity: object


class Tree:
    """A folder that is listed on first use.

    Args:
      path: path of the folder, for messages.
      scan: lists the folder.
    """

    def __init__(self, path: str, scan: Callable[[], Listing]) -> None:
        self.path, self._scan = path, scan

    @cached_property
    def listing(self) -> Listing:
        """The contents of the folder."""
        return self._scan()

    @property
    def files(self) -> dict[str, Location]:
        """{name: location} of the visible files."""
        return self.listing.files

    @property
    def folders(self) -> "dict[str, Tree]":
        """{name: folder} of the visible folders."""
        return self.listing.folders

    @property
    def images(self) -> dict[str, Location]:
        """{name: location} of the images directly in the folder, in the order of names."""
        return {name: self.files[name] for name in sorted(self.files) if is_image(name)}

    def find(self, parts: Iterable[str]) -> "Tree | Location | None":
        """Return the folder or file at a path below this folder, or None.

        Args:
          parts: the parts of the path.
        """
        node: Tree | Location | None = self
        for part in parts:
            node = node.folders.get(part) or node.files.get(part) if isinstance(node, Tree) else None
        return node


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or comes from an operating system."""
    return name.startswith(".") or name.casefold() in SYSTEM


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image, in any case."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def walk(tree: Tree, skipped: Skipped, within: str = "") -> Iterator[tuple[str, Location]]:
    """Yield (path, location) of each image below a folder, in the order of paths.

    Args:
      tree: the folder. Each folder is entered once, even if several links lead to it.
      skipped: counts the ignored files.
      within: path of the folder, with a slash, for the names of ignored files.
    """
    seen: set[object] = set()
    ahead: list[tuple[str, Tree | Location]] = [("", tree)]
    while ahead:
        path, node = ahead.pop()
        if isinstance(node, Location):
            if is_image(path):
                yield path, node
            else:
                skipped.add(OTHER, f"{within}{path}")
        elif node.listing.identity not in seen:
            seen.add(node.listing.identity)
            prefix = f"{path}/" if path else ""
            for skip in node.listing.skips:
                skipped.add(skip.reason, f"{within}{prefix}{skip.name}", skip.number)
            inside: list[tuple[str, Tree | Location]] = [*node.files.items(), *node.folders.items()]
            inside.sort(key=lambda item: item[0], reverse=True)
            ahead += [(prefix + name, child) for name, child in inside]


def has_images(tree: Tree) -> bool:
    """Whether a folder, or any folder below it, holds an image."""
    return next(walk(tree, Skipped()), None) is not None


def disk_tree(path: Path) -> Tree:
    """Open a folder on a disk."""
    return _tree_at(str(path), frozenset(_identity(str(parent)) for parent in real_path(path).parents))


def _tree_at(path: str, above: frozenset[object]) -> Tree:
    return Tree(path, partial(_scan, path, above))


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _scan(path: str, above: frozenset[object]) -> Listing:
    """List a folder on a disk. Skip links to folders that contain it, which would form a cycle."""
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
    """Return what an entry is, or its link points to: a "folder", a "file", something "else" or "nothing"."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except OSError:  # The target is missing, or links form a cycle.
        return "nothing"
    return "else"


def _count_files(entry: os.DirEntry[str]) -> int:
    """Count the files in a hidden entry, up to about MOST_COUNTED."""
    if not entry.is_dir(follow_symlinks=False):
        return 1
    count = 0
    for _, _, files in os.walk(entry.path):
        count += len(files)
        if count >= MOST_COUNTED:
            break
    return count
