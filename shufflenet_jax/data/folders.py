"""The contents of a folder, a zip or a tar of images: its splits, its classes, and the label of each image.

All commands use this code, so they see the same images, and they report the same ignored files.
"""

import hashlib
import logging
import math
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Container
from functools import partial
from pathlib import Path, PurePosixPath

from ..config import MOST, VAL_SHARE
from ..errors import InputError
from ..files import path_of, printable
from .archives import begins_as_zip, plain_tar, read_tar, tree_of, zip_tree
from .imagenet import SOLUTION, TEST_NAME, labels_of_validation, open_official
from .inventory import Entry, Inventory, Note, Part, count_images, some
from .labels import class_named, imagenet_classes, in_order, require_distinct
from .locations import Location
from .trees import Skipped, Tree, disk_tree, has_images, walk

EVAL_SPLITS = ("val", "validation", "test")
SPLITS = ("train", *EVAL_SPLITS)
# Other names of splits. A folder of folders with this name is a split; a folder of images may be a class.
SPLIT_WORDS = frozenset(("training", "trainset", "valid", "dev", "eval", "evaluation", "testing", "testset"))
META = "meta"  # The folder with lists, <split>.txt.
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # Paths of the splits in Kaggle's archive of ImageNet.
# Reasons to ignore an image, in addition to those in trees.py.
UNSORTED, UNLISTED, ELSEWHERE = "outside class folders", "not in the list", "outside the splits"


def open_folder(place: str | Path, split: str | None = None, *, val_share: float = VAL_SHARE) -> Inventory:
    """List the splits of a folder, a zip or a tar.

    Args:
      place: its path.
      split: the split to read, which may have any name; other splits need one of the usual names.
      val_share: share of each class that is held out as val if there are no splits, between 0 and 1.

    Returns:
      The Inventory. It has no splits if there are no images in any supported form.

    Raises:
      InputError: the place is missing or damaged, or its splits or classes are ambiguous.
    """
    if not 0 < val_share < 1:
        raise InputError(f"`val_share` is {val_share}, but must lie between 0 and 1")
    path = path_of(place)
    top = _open_tree(path)
    official = open_official(path, top)
    if official:
        return official
    chain = _enter(top, split)
    inner, skipped = chain[-1], _skipped_around(chain)
    lists = _lists_of(inner, split)
    trees = _splits_of(inner, split, lists)
    if trees or lists:
        return _Splits(path, chain, trees, lists).inventory(skipped, _notes_on_guess(inner, trees, lists, split))
    if any(map(has_images, inner.folders.values())):
        return _open_flat(path, inner, val_share, skipped)
    if inner.images:
        return _open_loose(path, chain)
    return Inventory(str(path), {}, skipped=skipped)


def find_images(folder: str | Path) -> tuple[list[str], Skipped]:
    """Find all images below a folder.

    Args:
      folder: its path.

    Returns:
      The paths of the images, in order, and the ignored files.
    """
    skipped = Skipped()
    return [location.path for _, location in walk(disk_tree(Path(folder)), skipped)], skipped


# The folder with the data


def _open_tree(path: Path) -> Tree:
    """Open a folder, a zip or a tar. Raise InputError if the path is none of these, damaged or encrypted."""
    if path.is_dir():
        return disk_tree(path)
    # Tars first: a tar with a zip at its end looks like a zip.
    plain = plain_tar(path) if path.is_file() else None
    if plain:
        return tree_of(str(path), read_tar(path, plain))
    if path.is_file() and zipfile.is_zipfile(path):
        return zip_tree(path)
    if path.is_file() and begins_as_zip(path):
        raise InputError(f"{path} is damaged: the end of the zip is missing; fetch it again")
    raise InputError(f"no data at {path}: it is no folder, zip or tar of images; check the name")


def _enter(top: Tree, split: str | None) -> list[Tree]:
    """Return the folders from the top one to the one with the data. Enter a folder that is alone in its parent."""
    chain = [top]
    while split is None or split not in chain[-1].folders:
        found = _kaggle(chain[-1]) or _sole(chain[-1])
        if not found or found.listing.identity in {tree.listing.identity for tree in chain}:
            break
        chain.append(found)
    return chain


def _kaggle(tree: Tree) -> Tree | None:
    """Return the folder of splits in Kaggle's archive of ImageNet."""
    for place in KAGGLE:
        found = tree.find(place.split("/"))
        if isinstance(found, Tree) and {*SPLITS} & set(found.folders):
            return found
    return None


def _sole(tree: Tree) -> Tree | None:
    """Return the only folder in a folder, or None if that is a split, a class or the folder with lists."""
    if len(tree.folders) != 1 or tree.images:
        return None
    [(name, found)] = tree.folders.items()
    return None if _is_split_name(name) or name == META or not found.folders else found


def _is_split_name(name: str) -> bool:
    return name.casefold() in {*SPLITS, *SPLIT_WORDS}


def _skipped_around(chain: list[Tree], used: Container[str] = (SOLUTION,)) -> Skipped:
    """Count the ignored files in the folders above the splits or classes, except for `used` files."""
    skipped = Skipped()
    for tree in chain:
        for skip in tree.listing.skips:
            skipped.add(*skip)
        for name in sorted(tree.files):
            if name not in used:
                skipped.add_file(name, UNSORTED)
    return skipped


def _lists_of(tree: Tree, split: str | None) -> dict[str, Location]:
    """Return {split: its list} of the splits that have a folder or a usual name, and of `split`."""
    meta = tree.folders.get(META)
    files = (
        {name.removesuffix(".txt"): where for name, where in meta.files.items() if name.endswith(".txt")}
        if meta
        else {}
    )
    return {name: where for name, where in sorted(files.items()) if name in {*SPLITS, split} or name in tree.folders}


def _splits_of(tree: Tree, split: str | None, lists: dict[str, Location]) -> dict[str, Tree]:
    """Return {split: its folder}; {} if the folders are classes.

    Raises:
      InputError: the folders may be splits or classes.
    """
    folders = {name: tree.folders[name] for name in sorted(tree.folders) if name != META}
    deep = {name: found for name, found in folders.items() if found.folders and not found.images}
    chosen = {
        name
        for name in folders
        if name in lists or name.casefold() in SPLITS or (name in deep and _is_split_name(name))
    }
    if chosen or lists or split in deep:
        classes = {name for found in map(folders.get, chosen) if found for name in found.folders}
        chosen |= {name for name, found in deep.items() if name == split or _is_odd_split(found, classes)}
    elif deep and not any(found.images for found in folders.values()) and any(map(has_images, deep.values())):
        _require_equal_splits(tree, deep)
        chosen = set(deep)
    return {name: _unwrap(name, found) for name, found in folders.items() if name in chosen}


def _is_odd_split(tree: Tree, classes: Container[str]) -> bool:
    """Whether a folder beside splits is also one: it has images, in folders of the same classes."""
    return any(name in classes for name in tree.folders) and has_images(tree)


def _require_equal_splits(tree: Tree, folders: dict[str, Tree]) -> None:
    """Raise InputError unless folders of folders have the same classes, and therefore must be splits."""
    names = [frozenset(found.folders) for found in folders.values()]
    if len(set(names)) > 1 or len(names[0]) < 2 or len(names) < 2:
        name, found = next(iter(folders.items()))
        raise InputError(
            f"{tree.path} has folders of folders, like {name}/{min(found.folders)}, but none called "
            f"{', '.join(SPLITS)}; rename its splits, or put the images of each class directly into its folder"
        )


def _notes_on_guess(
    tree: Tree, trees: dict[str, Tree], lists: dict[str, Location], split: str | None
) -> tuple[Note, ...]:
    """Return a warning if folders count as splits only because all of them hold the same folders."""
    if lists or split in trees or any(map(_is_split_name, trees)):
        return ()
    inside = some(sorted(next(iter(trees.values())).folders))
    message = f"taken for splits of {tree.path}: {some(list(trees))}, since all hold the same folders: {inside}"
    return (Note(logging.WARNING, message),)


def _unwrap(name: str, tree: Tree) -> Tree:
    """Return the inner folder of a split if it is alone and has the same name, as in train/train/<class>."""
    inner = next(iter(tree.folders.values())) if len(tree.folders) == 1 else None
    again = inner and inner.folders and not tree.images and next(iter(tree.folders)).casefold() == name.casefold()
    return inner if inner and again else tree


# Splits


class _Splits:
    """A place with a folder or a list for each split.

    Args:
      path: path that the user gave.
      chain: the folders from the top one to the one with the splits.
      trees: {split: its folder}.
      lists: {split: its list}.
    """

    def __init__(self, path: Path, chain: list[Tree], trees: dict[str, Tree], lists: dict[str, Location]) -> None:
        self.path, self.chain, self.trees, self.lists = path, chain, trees, lists
        self.place = chain[-1].path
        self._labels: dict[str, dict[str, str] | None] = {}
        require_distinct(self.place, (name for split in trees if split not in lists for name in trees[split].folders))

    def inventory(self, skipped: Skipped, notes: tuple[Note, ...]) -> Inventory:
        """Return the Inventory of the splits.

        Args:
          skipped: ignored files outside the splits.
          notes: messages about the place.
        """
        beside = (tree for name, tree in sorted(self.chain[-1].folders.items()) if name not in {META, *self.trees})
        unusable = {
            split: f"{META}/{split}.txt lists images of a folder {split}, which is missing"
            for split in self.lists
            if split not in self.trees
        }
        for split, tree in self.trees.items():
            if split not in self.lists and tree.images and all(map(TEST_NAME.fullmatch, tree.images)):
                unusable[split] = f"the labels of its {count_images(tree.images)} were never published"
            elif split not in self.lists and not has_images(tree):
                unusable[split] = "it holds no images"
        splits = sorted({*self.trees, *self.lists})
        readers = {split: partial(self.read, split) for split in splits}
        return Inventory(str(self.path), readers, unusable, tuple(beside), skipped, notes)

    def read(self, split: str) -> Part:
        """Read a split.

        Args:
          split: its name.

        Raises:
          InputError: the split holds no images, or they have no labels.
        """
        if split in self.lists:
            return self._read_list(split)
        tree, what = self.trees[split], f"{self.place}/{split}"
        flat = self._flat_labels(split)
        classes = self._classes_for(split)
        skipped = _skipped_around([tree], used=flat or ())
        if flat is not None:
            labels = {name: label for label, name in enumerate(classes)}
            entries = [Entry(name, labels[flat[name]], where) for name, where in tree.images.items()]
        else:
            entries = _entries_of(tree.folders, classes, skipped)
        if not entries and tree.images:
            raise InputError(
                f"{what} holds {count_images(tree.images)}, but no class folders, and there is no list "
                f"{META}/{split}.txt beside it; sort them into <class>/<image>, or write the list"
            )
        if not entries:
            raise InputError(f"{what} holds no images in class folders, <class>/<image>")
        return Part(entries, classes, tuple(self._names(split)), len(classes), skipped, self._notes_on(classes))

    def _names(self, split: str) -> set[str]:
        """Return the names of the classes in a split; none if its labels come from a list."""
        if split in self.lists:
            return set()
        return set((self._flat_labels(split) or {}).values()) or set(map(class_named, self.trees[split].folders))

    def _classes_for(self, split: str) -> tuple[str, ...]:
        """Return the classes of a split in the order of the labels, which is the same for all splits.

        The classes of train and of the evaluation split come first. Classes that occur only in other splits follow, if
        this split has any of them.
        """
        names = {name: self._names(name) for name in self.trees}
        every: set[str] = set().union(*names.values())
        evaluated = next((name for name in EVAL_SPLITS if name in names), "")
        first = in_order(names.get("train", set()) | names.get(evaluated, set()) or every)
        more = names[split] - set(first)
        return tuple(first + in_order(every - set(first)) if more else first)

    def _notes_on(self, classes: tuple[str, ...]) -> tuple[Note, ...]:
        """Return a warning if train lacks some of the classes."""
        known = self._names("train") if "train" in self.trees else set()
        lacking = [name for name in classes if known and name not in known]
        message = f"train in {self.place} lacks classes of other splits: {some(lacking)}"
        return (Note(logging.WARNING, message),) if lacking else ()

    def _flat_labels(self, split: str) -> dict[str, str] | None:
        """Return {image: class} of a split without class folders, or None unless ImageNet's labels are available."""
        tree = self.trees[split]
        if split not in self._labels:
            flat = tree.images and not tree.folders
            self._labels[split] = labels_of_validation(tree.images, self.chain, self.path) if flat else None
        return self._labels[split]

    def _read_list(self, split: str) -> Part:
        """Read a split in MMPretrain's form: a line `file label` for each image below the folder of the split."""
        listing = f"{self.place}/{META}/{split}.txt"
        entries: list[Entry] = []
        listed: dict[str, str] = {}
        text = self.lists[split].read().decode(errors="surrogateescape").removeprefix("\ufeff")
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            *name, label = line.strip().rsplit(maxsplit=1)
            if not (name and label.isascii() and label.isdigit() and len(label) < 8 and int(label) < MOST):
                raise InputError(f"line {number} of {listing} is not 'file label' with a label from 0 to {MOST - 1}")
            entries.append(Entry(printable(name[0]), int(label), self._locate(split, name[0])))
            before = listed.setdefault(PurePosixPath(name[0]).as_posix(), label)
            if int(before) != int(label):
                raise InputError(
                    f"line {number} of {listing} gives {printable(name[0])} the label {label}, but a line before it "
                    f"{before}; remove one of the two"
                )
        if not entries:
            raise InputError(f"{listing} lists no images")
        skipped = Skipped()
        for path, _ in walk(self.trees[split], skipped) if split in self.trees else ():
            if path not in listed:
                skipped.add(UNLISTED, path)
        return Part(entries, None, (), max(entry.label for entry in entries) + 1, skipped)

    def _locate(self, split: str, name: str) -> Location:
        """Return the location of a listed file. If the file is missing, reading it will raise an error."""
        if self.path.is_dir():
            return Location(str(path_of(Path(self.place) / split / name)))
        found = self.chain[-1].find((split, *PurePosixPath(name).parts))
        return found if isinstance(found, Location) else Location(f"{self.place}/{split}/{name}")


def _entries_of(folders: dict[str, Tree], classes: tuple[str, ...], skipped: Skipped) -> list[Entry]:
    """Return the images in class folders, in the order of classes and paths."""
    labels = {name: label for label, name in enumerate(classes)}
    return [
        Entry(printable(f"{folder}/{path}"), label, where)
        for label, folder in sorted((labels[class_named(folder)], folder) for folder in folders)
        for path, where in walk(folders[folder], skipped, f"{folder}/")
    ]


# Folders without splits


def hold_out(names: list[str], share: float) -> set[str]:
    """Choose the images of one class that are held out for evaluation.

    A hash of the names decides, so every host and every run chooses the same images.

    Args:
      names: class and path of each image, like cat/1.jpg.
      share: share of the images to hold out, between 0 and 1.

    Returns:
      Names of about that share of the images: at least one but not all of them; none of a single image.
    """
    if len(names) < 2:
        return set()
    number = min(max(math.floor(len(names) * share + 0.5), 1), len(names) - 1)
    return set(sorted(names, key=_digest)[:number])


def _digest(name: str) -> tuple[bytes, str]:
    return hashlib.sha256(unicodedata.normalize("NFC", name).encode()).digest(), name


def _open_flat(path: Path, tree: Tree, val_share: float, skipped: Skipped) -> Inventory:
    """Return the Inventory of a folder `<class>/<image>`, with a share of the images held out.

    A folder without images is a class only if it is empty. Otherwise it holds other files, such as tables or texts.
    """
    folders = {
        name: found
        for name, found in tree.folders.items()
        if has_images(found) or (name != META and not (found.files or found.folders))
    }
    for name in sorted(set(tree.folders) - set(folders)):
        list(walk(tree.folders[name], skipped, f"{name}/"))  # Counts them.
    require_distinct(tree.path, folders)
    classes = tuple(in_order(map(class_named, folders)))
    entries = _entries_of(folders, classes, skipped)
    names: defaultdict[int, list[str]] = defaultdict(list)
    for entry in entries:
        names[entry.label].append(entry.name)
    chosen: set[str] = set().union(*(hold_out(found, val_share) for found in names.values()))
    if not chosen:
        raise InputError(f"{path} has no splits, and no class has two images, of which one could be held out; add more")
    message = (
        f"no splits in {path}: held out {len(chosen):,} of {len(entries):,} images "
        f"({100 * len(chosen) / len(entries):.0f} %) as val by a hash of class and file name; classes: {some(classes)}"
    )

    def read(split: str) -> Part:
        part = [entry for entry in entries if (entry.name in chosen) == (split == "val")]
        return Part(part, classes, classes, len(classes), Skipped())

    splits = {split: partial(read, split) for split in ("train", "val")}
    return Inventory(str(path), splits, skipped=skipped, notes=(Note(logging.INFO, message),))


def _open_loose(path: Path, chain: list[Tree]) -> Inventory:
    """Return the Inventory of images without any folders, which must be ImageNet's validation images."""
    tree = chain[-1]
    skipped = _skipped_around(chain, used={SOLUTION, *tree.images})
    labels = labels_of_validation(tree.images, chain, path)
    if labels is None:
        raise InputError(
            f"{tree.path} holds {count_images(tree.images)}, but no class folders; sort them into <class>/<image>"
        )
    classes = tuple(imagenet_classes())
    rank = {name: label for label, name in enumerate(classes)}
    if not set(labels.values()) <= set(classes):
        raise InputError(f"{SOLUTION} beside {path} names classes that ILSVRC2012 does not have; fetch it again")
    entries = [Entry(name, rank[labels[name]], where) for name, where in tree.images.items()]
    part = Part(entries, classes, classes, len(classes), Skipped())
    return Inventory(str(path), {"validation": lambda: part}, skipped=skipped)
