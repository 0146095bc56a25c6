"""The images of a source with their labels, for a data set with all of its splits."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from ..config import VAL_SHARE
from ..data.folders import ELSEWHERE, open_folder
from ..data.inventory import Entry, Inventory, Note, Part, describe_skipped
from ..data.trees import Skipped, walk
from ..errors import InputError
from ..files import path_of
from .parquet import open_shards

__all__ = ["Contents", "Entry", "read_contents"]


@dataclass(frozen=True)
class Contents:
    """The contents of a source of images.

    Attributes:
      place: path of the source.
      splits: {name of a split: its images}.
      classes: name of each label, or the number of labels if they have no names.
      notes: decisions about the source and ignored files, for `inventory.report_notes`.
      skipped: number of ignored files.
    """

    place: str
    splits: dict[str, list[Entry]]
    classes: tuple[str, ...] | int
    notes: tuple[Note, ...]
    skipped: int


def read_contents(*sources: str | Path, val_share: float = VAL_SHARE) -> Contents:
    """List the images of a folder, a zip, a tar, one or both of ILSVRC2012's tars, or ImageNet's Parquet shards.

    Args:
      sources: path of the source; several only of Parquet shards.
      val_share: share of each class that is held out as val if the source has no splits.

    Raises:
      InputError: the source is none of these, holds no images, or has images without labels.
    """
    source, *others = sources
    inventory = open_shards(list(map(path_of, sources)))
    if inventory is None:
        if others:
            raise InputError(f"{source} and {others[0]} are not both Parquet shards; give one `source`")
        inventory = open_folder(source, val_share=val_share)
    for split in inventory.splits:
        if not re.fullmatch(r"\w+", split):
            raise InputError(f"{split!r} is not a valid name for a split; use letters, digits and _")
    parts = {split: read() for split, read in inventory.splits.items() if split not in inventory.unusable}
    if not parts:
        reasons = "".join(f"; {split}: {reason}" for split, reason in inventory.unusable.items())
        raise InputError(
            f"{source} holds no images with labels, as <split>/<class>/<image> or <class>/<image>{reasons}; check "
            "`source`"
        )
    skipped = _skipped_in(inventory, parts)
    notes = [*inventory.notes, *(note for part in parts.values() for note in part.notes)]
    notes += describe_skipped(inventory.place, skipped)
    notes += [
        Note(logging.WARNING, f"split {split} of {source} is skipped: {reason}")
        for split, reason in inventory.unusable.items()
    ]
    classes, more = _classes_of(source, parts)
    images = {split: part.entries for split, part in parts.items()}
    return Contents(inventory.place, images, classes, (*notes, *more), skipped.total)


def _skipped_in(inventory: Inventory, parts: dict[str, Part]) -> Skipped:
    """Count the ignored files of a source, including the images in folders beside its splits."""
    skipped = Skipped()
    for counted in (inventory.skipped, *(part.skipped for part in parts.values())):
        skipped.merge(counted)
    for tree in inventory.elsewhere:
        for path, _ in walk(tree, skipped):
            skipped.add(ELSEWHERE, f"{tree.path}/{path}".removeprefix(f"{inventory.place}/"))
    return skipped


def _classes_of(source: str | Path, parts: dict[str, Part]) -> tuple[tuple[str, ...] | int, list[Note]]:
    """Return the name of each label, or the number of labels, and a warning if lists meet class folders.

    Raises:
      InputError: the labels of a list are larger than the number of class folders.
    """
    named = [part.classes for part in parts.values() if part.classes]
    classes = max(named, key=len, default=())
    listed = {split: part.num_classes for split, part in parts.items() if part.classes is None}
    if not classes:
        return max(listed.values()), []
    for split, count in listed.items():
        if count > len(classes):
            raise InputError(
                f"the list of {split} in {source} has the label {count - 1}, but other splits have {len(classes)} "
                "class folders; write lists for all splits"
            )
    pairs = ", ".join(f"{label} is {name}" for label, name in enumerate(classes[:3]))
    message = (
        f"the lists of {source} have labels without names: the class folders name them in order, label {pairs}, ..."
    )
    return classes, [Note(logging.WARNING, message)] if listed else []
