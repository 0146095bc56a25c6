"""Which images a source holds, with their labels, for a data set of all its splits."""

import logging
import re
from dataclasses import dataclass

from ..config import VAL_SHARE
from ..data.folders import ELSEWHERE, open_folder
from ..data.inventory import Entry, Inventory, Note, Part, describe_skipped
from ..data.trees import Skipped, walk
from ..errors import InputError

__all__ = ["Contents", "Entry", "read_contents"]


@dataclass(frozen=True)
class Contents:
    """A source of images.

    Attributes:
      splits: the images of each split.
      classes: the names of the labels, or their number where nothing names them.
      notes: what was decided and ignored, for `inventory.report_notes`.
      skipped: how many files were ignored.
    """

    splits: dict[str, list[Entry]]
    classes: tuple[str, ...] | int
    notes: tuple[Note, ...]
    skipped: int


def read_contents(source, *, val_share=VAL_SHARE) -> Contents:
    """Read which images a folder, a zip, a tar, or one or both of ILSVRC2012's tars hold.

    Args:
      source: its path.
      val_share: the share of each class that is held out as val where there are no splits.
    Raises:
      InputError: the source is none of these, holds no images, or a part of it has no labels.
    """
    inventory = open_folder(source, val_share=val_share)
    for split in inventory.splits:
        if not re.fullmatch(r"\w+", split):
            raise InputError(f"{split!r} is no name for a split; use letters, digits and _")
    parts = {split: read() for split, read in inventory.splits.items() if split not in inventory.unusable}
    if not parts:
        raise InputError(f"{source} holds no images as <split>/<class>/<image> or <class>/<image>; check `source`")
    skipped = _skipped_in(inventory, parts)
    notes = [*inventory.notes, *(note for part in parts.values() for note in part.notes)]
    notes += describe_skipped(inventory.place, skipped)
    notes += [
        Note(logging.WARNING, f"split {split} of {source} is left out: {reason}")
        for split, reason in inventory.unusable.items()
    ]
    classes, more = _classes_of(source, parts)
    return Contents({split: part.entries for split, part in parts.items()}, classes, (*notes, *more), skipped.total)


def _skipped_in(inventory: Inventory, parts: dict[str, Part]) -> Skipped:
    """Count the files that are ignored in a source, with the images in folders that are no splits."""
    skipped = Skipped()
    for counted in (inventory.skipped, *(part.skipped for part in parts.values())):
        skipped.merge(counted)
    for tree in inventory.elsewhere:
        for path, _ in walk(tree, skipped):
            skipped.add(ELSEWHERE, f"{tree.path}/{path}".removeprefix(f"{inventory.place}/"))
    return skipped


def _classes_of(source, parts: dict[str, Part]) -> tuple[tuple[str, ...] | int, list[Note]]:
    """Return the names of the labels of all splits, or their number, and a warning where lists meet class folders.

    Raises:
      InputError: lists have larger labels than there are class folders.
    """
    classes = max((part.classes for part in parts.values() if part.classes), key=len, default=())
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
    told = (
        f"the lists of {source} have labels without names: taken in the order of the class folders, label {pairs}, ..."
    )
    return classes, [Note(logging.WARNING, told)] if listed else []
