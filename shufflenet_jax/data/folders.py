"""What a folder, a zip or a tar of images holds: its splits, its classes, and the label of each image.

Every command decides by this code, and says what it ignored.
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
# Other words for splits. A folder of images may also be a class of this name; a folder of folders is not.
SPLIT_WORDS = frozenset(("training", "trainset", "valid", "dev", "eval", "evaluation", "testing", "testset"))
META = "meta"  # The folder of lists, <split>.txt.
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # Where Kaggle's archive of ImageNet has its splits.
# Why an image is ignored, beside the reasons of trees.
UNSORTED, UNLISTED, ELSEWHERE = "outside class folders", "not in the list", "outside the splits"


def open_folder(place: str | Path, split: str | None = None, *, val_share: float = VAL_SHARE) -> Inventory:
    """Decide what a folder, a zip or a tar holds.

    Args:
      place: its path.
      split: the split that is wanted, which may then have any name.
      val_share: the share of each class that is held out where there are no splits, between 0 and 1.
    Returns:
      The Inventory, without splits where there are no images in any known form.
    Raises:
      InputError: there is nothing, it is damaged, or its classes or splits cannot be told.
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
    """Return the paths of all images below a folder, in order, and what is ignored there."""
    skipped = Skipped()
    return [location.path for _, location in walk(disk_tree(Path(folder)), skipped)], skipped


# Where the data begins


def _open_tree(path: Path) -> Tree:
    """Open a folder, a zip or a tar. Raises InputError if there is none of these, or it is damaged or locked."""
    if path.is_dir():
        return disk_tree(path)
    # A tar comes first: the end of one that holds a zip looks like a zip's.
    plain = plain_tar(path) if path.is_file() else None
    if plain:
        return tree_of(str(path), read_tar(path, plain))
    if path.is_file() and zipfile.is_zipfile(path):
        return zip_tree(path)
    if path.is_file() and begins_as_zip(path):
        raise InputError(f"{path} is damaged: the end of the zip is missing; fetch it again")
    raise InputError(f"no data at {path}: it is no folder, zip or tar of images; check the name")


def _enter(top: Tree, split: str | None) -> list[Tree]:
    """Return the folders from the top one to the one with the data: a folder that is alone in its own is entered."""
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
    """Return the only folder in a folder, unless it is a split, a class or the folder of lists."""
    if len(tree.folders) != 1 or tree.images:
        return None
    [(name, found)] = tree.folders.items()
    return None if _is_split_name(name) or name == META or not found.folders else found


def _is_split_name(name: str) -> bool:
    return name.casefold() in {*SPLITS, *SPLIT_WORDS}


def _skipped_around(chain: list[Tree], used: Container[str] = (SOLUTION,)) -> Skipped:
    """Count what is ignored in the folders above the splits or classes, but for files that are used."""
    skipped = Skipped()
    for tree in chain:
        for skip in tree.listing.skips:
            skipped.add(*skip)
        for name in sorted(tree.files):
            if name not in used:
                skipped.add_file(name, UNSORTED)
    return skipped


def _lists_of(tree: Tree, split: str | None) -> dict[str, Location]:
    """Return the list of each split that has a folder or one of the usual names, or is wanted."""
    meta = tree.folders.get(META)
    files = (
        {name.removesuffix(".txt"): where for name, where in meta.files.items() if name.endswith(".txt")}
        if meta
        else {}
    )
    return {name: where for name, where in sorted(files.items()) if name in {*SPLITS, split} or name in tree.folders}


def _splits_of(tree: Tree, split: str | None, lists: dict[str, Location]) -> dict[str, Tree]:
    """Return the folder of each split; {} where the folders are classes.

    Raises:
      InputError: the folders may be splits as well as classes.
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
    """Whether a folder beside splits is one too: it has images in folders of their classes."""
    return any(name in classes for name in tree.folders) and has_images(tree)


def _require_equal_splits(tree: Tree, folders: dict[str, Tree]) -> None:
    """Raises InputError unless folders of folders have the same classes, and so can only be splits."""
    names = [frozenset(found.folders) for found in folders.values()]
    if len(set(names)) > 1 or len(names[0]) < 2 or len(names) < 2:
        name, found = next(iter(folders.items()))
        raise InputError(
            f"{tree.path} has folders of folders, like {name}/{min(found.folders)}, but none called "
            f"{', '.join(SPLITS)}; name its splits so, or put the images of each class directly into its folder"
        )


def _notes_on_guess(
    tree: Tree, trees: dict[str, Tree], lists: dict[str, Location], split: str | None
) -> tuple[Note, ...]:
    """Return a warning where nothing but equal folders inside says that folders are splits."""
    if lists or split in trees or any(map(_is_split_name, trees)):
        return ()
    inside = some(sorted(next(iter(trees.values())).folders))
    told = f"taken for splits of {tree.path}: {some(list(trees))}, since all hold the same folders: {inside}"
    return (Note(logging.WARNING, told),)


def _unwrap(name: str, tree: Tree) -> Tree:
    """Return the folder inside a split's folder that alone has the split's name again, as in train/train/<class>."""
    inner = next(iter(tree.folders.values())) if len(tree.folders) == 1 else None
    again = inner and inner.folders and not tree.images and next(iter(tree.folders)).casefold() == name.casefold()
    return inner if inner and again else tree


# Splits


class _Splits:
    """A place with a folder or a list for each split."""

    def __init__(self, path: Path, chain: list[Tree], trees: dict[str, Tree], lists: dict[str, Location]) -> None:
        self.path, self.chain, self.trees, self.lists = path, chain, trees, lists
        self.place = chain[-1].path
        self._labels: dict[str, dict[str, str] | None] = {}
        require_distinct(self.place, (name for split in trees if split not in lists for name in trees[split].folders))

    def inventory(self, skipped: Skipped, notes: tuple[Note, ...]) -> Inventory:
        """Return the Inventory of the splits."""
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
        """Read a split. Raises InputError if it holds no images, or has no labels for them."""
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
        """Return the names of the classes that a split has; none where a list has the labels."""
        if split in self.lists:
            return set()
        return set((self._flat_labels(split) or {}).values()) or set(map(class_named, self.trees[split].folders))

    def _classes_for(self, split: str) -> tuple[str, ...]:
        """Return the classes in the order of labels, which is the same for all splits.

        Those that a training meets, in train and in the split it evaluates on, come first; classes that only other
        splits have follow them, if this split has any of them.
        """
        names = {name: self._names(name) for name in self.trees}
        every: set[str] = set().union(*names.values())
        evaluated = next((name for name in EVAL_SPLITS if name in names), "")
        first = in_order(names.get("train", set()) | names.get(evaluated, set()) or every)
        more = names[split] - set(first)
        return tuple(first + in_order(every - set(first)) if more else first)

    def _notes_on(self, classes: tuple[str, ...]) -> tuple[Note, ...]:
        """Return a warning where train lacks some of the classes."""
        known = self._names("train") if "train" in self.trees else set()
        lacking = [name for name in classes if known and name not in known]
        told = f"train in {self.place} lacks classes of other splits: {some(lacking)}"
        return (Note(logging.WARNING, told),) if lacking else ()

    def _flat_labels(self, split: str) -> dict[str, str] | None:
        """Return the class of each image of a split without class folders, where ImageNet's labels are at hand."""
        tree = self.trees[split]
        if split not in self._labels:
            flat = tree.images and not tree.folders
            self._labels[split] = labels_of_validation(tree.images, self.chain, self.path) if flat else None
        return self._labels[split]

    def _read_list(self, split: str) -> Part:
        """Read MMPretrain's form: a line `file label` for each image below the split's folder."""
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
                    f"{before}; keep one of both"
                )
        if not entries:
            raise InputError(f"{listing} lists no images")
        skipped = Skipped()
        for path, _ in walk(self.trees[split], skipped) if split in self.trees else ():
            if path not in listed:
                skipped.add(UNLISTED, path)
        return Part(entries, None, (), max(entry.label for entry in entries) + 1, skipped)

    def _locate(self, split: str, name: str) -> Location:
        """Return where a listed file lies; it may be missing, which is an error once it is read."""
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
    """Choose images of one class for evaluation: a share of them, at least one of two, but not all.

    A hash of each name decides, so that every host chooses the same ones on every day.

    Args:
      names: the class and path of each image, like cat/1.jpg.
      share: between 0 and 1.
    """
    if len(names) < 2:
        return set()
    number = min(max(math.floor(len(names) * share + 0.5), 1), len(names) - 1)
    return set(sorted(names, key=_digest)[:number])


def _digest(name: str) -> tuple[bytes, str]:
    return hashlib.sha256(unicodedata.normalize("NFC", name).encode()).digest(), name


def _open_flat(path: Path, tree: Tree, val_share: float, skipped: Skipped) -> Inventory:
    """Return the Inventory of a folder `<class>/<image>`, of which a share is held out.

    Folders without images are classes only where they are empty: others hold tables or texts beside the images.
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
    told = (
        f"no splits in {path}: held out {len(chosen):,} of {len(entries):,} images "
        f"({100 * len(chosen) / len(entries):.0f} %) as val by a hash of class and file name; classes: {some(classes)}"
    )

    def read(split: str) -> Part:
        part = [entry for entry in entries if (entry.name in chosen) == (split == "val")]
        return Part(part, classes, classes, len(classes), Skipped())

    splits = {split: partial(read, split) for split in ("train", "val")}
    return Inventory(str(path), splits, skipped=skipped, notes=(Note(logging.INFO, told),))


def _open_loose(path: Path, chain: list[Tree]) -> Inventory:
    """Return the Inventory of images without any folders: those of ImageNet's validation set have labels."""
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
