"""ImageNet as the Hugging Face Hub has it (`imagenet-1k`): Parquet shards like train-00000-of-00294.parquet."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..data.inventory import Entry, Inventory, Note, Part, count_images, some
from ..data.labels import are_imagenets, imagenet_classes
from ..data.locations import Location
from ..data.rows import Row, count_rows, label_names, list_rows
from ..data.trees import Skipped, Tree, disk_tree
from ..errors import InputError

SUFFIX, FOLDER = ".parquet", "data"  # The folder of a copy of the repository in which the shards lie.
# Older names end with a hash.
SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d+)-of-(?P<of>\d+)(-[0-9a-f]{16})?\.parquet")
# The Hub's names of images end with the WordNet ID of the class: n01440764_10026_n01440764.JPEG.
NAMED = re.compile(r"(?P<image>.+)_(?P<wnid>n\d{8})(?P<suffix>\.\w+)")
WITHOUT_LABEL = -1  # The label of all images of the test split.
BESIDE = "beside the shards"  # A reason to ignore an image.


class Shard(NamedTuple):
    """A Parquet file of a split.

    Attributes:
      path: the file.
      number: which of the split's shards it is, from 0.
      of: number of shards of the split.
    """

    path: Path
    number: int
    of: int


def open_shards(sources: Sequence[Path]) -> Inventory | None:
    """List the splits of ImageNet's Parquet shards.

    Args:
      sources: the shards, or a folder with them.

    Returns:
      The Inventory; None if there are no Parquet files.

    Raises:
      InputError: a file has another name or other columns, is damaged, or there are several copies of a shard.
    """
    if not all(path.suffix == SUFFIX and path.is_file() for path in sources):
        return _open_folder(sources[0]) if len(sources) == 1 and sources[0].is_dir() else None
    place = sources[0] if len(sources) == 1 else Path(os.path.commonpath([path.absolute() for path in sources]))
    return _inventory_of(place, sources, Skipped(), ())


def _open_folder(folder: Path) -> Inventory | None:
    """Return the Inventory of a folder; None unless the folder, or `data` in it, holds Parquet files."""
    tree, skipped = disk_tree(folder), Skipped()
    chain = [tree]
    if not _shards_in(tree) and FOLDER in tree.folders:
        chain.append(tree.folders[FOLDER])
    files = _shards_in(chain[-1])
    if not files:
        return None
    for above in chain:
        for skip in above.listing.skips:
            skipped.add(*skip)
        for name in sorted(set(above.files) - {path.name for path in files}):
            skipped.add_file(name, BESIDE)
    beside = tuple(found for above in chain for _, found in sorted(above.folders.items()) if found not in chain)
    return _inventory_of(folder, files, skipped, beside)


def _shards_in(tree: Tree) -> list[Path]:
    return [Path(tree.files[name].path) for name in sorted(tree.files) if name.endswith(SUFFIX)]


def _inventory_of(place: Path, files: Sequence[Path], skipped: Skipped, beside: tuple[Tree, ...]) -> Inventory:
    splits: defaultdict[str, list[Shard]] = defaultdict(list)
    for path in files:
        match = SHARD.fullmatch(path.name)
        if not match:
            raise InputError(f"{path} is not called like train-00000-of-00294.parquet, which says its split; rename it")
        splits[match["split"]].append(Shard(path, int(match["number"]), int(match["of"])))
    notes, unusable = [], {}
    for split, shards in splits.items():
        shards.sort(key=lambda shard: shard.number)
        notes += _notes_on_missing(split, shards, place)
        first = next(list_rows(shards[0].path), None)
        if first and first.label == WITHOUT_LABEL:
            count = sum(count_rows(shard.path) for shard in shards)
            unusable[split] = f"the labels of its {count_images(range(count))} were never published"
    readers = {split: partial(_read_split, shards) for split, shards in splits.items()}
    return Inventory(str(place), readers, unusable, beside, skipped, tuple(notes))


def _notes_on_missing(split: str, shards: list[Shard], place: Path) -> list[Note]:
    """Return a warning if shards of a split are missing. Raise InputError if there are several copies of one."""
    counts, numbers = {shard.of for shard in shards}, {shard.number for shard in shards}
    if len(counts) > 1 or len(numbers) < len(shards):
        raise InputError(
            f"{place} holds several copies of the split {split}, like {shards[0].path.name} and "
            f"{shards[1].path.name}; keep one of them"
        )
    missing = [f"{number:05}" for number in range(shards[0].of) if number not in numbers]
    message = f"{split} in {place} lacks shards: {some(missing)}; the data set will hold the others' images"
    return [Note(logging.WARNING, message)] if missing else []


def _read_split(shards: list[Shard]) -> Part:
    """Read a split. Its labels are ranks: label k is the k-th of the sorted WordNet IDs, as everywhere."""
    classes = tuple(imagenet_classes())
    entries, named = [], True
    for shard in shards:
        names = label_names(shard.path)
        if names and not are_imagenets(names):
            raise InputError(
                f"{shard.path} has {len(names)} classes, like {names[0]}, but not ImageNet's; give the shards of "
                "imagenet-1k"
            )
        for row in list_rows(shard.path):
            entry, proven = _entry_of(shard.path, row, classes)
            entries.append(entry)
            named = named and (proven or bool(names))
    notes = () if named else (_note_on_guess(shards[0].path),)
    return Part(entries, classes, classes, len(classes), Skipped(), notes)


def _entry_of(path: Path, row: Row, classes: tuple[str, ...]) -> tuple[Entry, bool]:
    """Return an image under its official name, and whether its name on the Hub proves its label."""
    where = f"row {row.position} of row group {row.group} of {path}"
    label = row.label
    if label is None or not 0 <= label < len(classes):
        raise InputError(f"{where} has the label {label}, but ImageNet has 0 to {len(classes) - 1}; fetch it again")
    name = row.name or f"{path.stem}/{row.group}-{row.position}"
    match = NAMED.fullmatch(PurePosixPath(name).name)
    if match and match["wnid"] in classes and classes[label] != match["wnid"]:
        raise InputError(
            f"{where} has the label {label}, {classes[label]}, but is called {name}; give the shards of imagenet-1k"
        )
    location = Location(str(path), row=(row.group, row.position))
    return Entry(f"{match['image']}{match['suffix']}" if match else name, label, location), match is not None


def _note_on_guess(path: Path) -> Note:
    return Note(
        logging.WARNING,
        f"{path} does not name its classes: label k is taken for the k-th of ImageNet's sorted WordNet IDs",
    )
