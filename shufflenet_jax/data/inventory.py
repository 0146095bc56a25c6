"""The contents of a place with images: its splits, their images and labels, and ignored files."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import NamedTuple

from .locations import Location
from .trees import Skipped, Tree

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """An image.

    Attributes:
      name: its path below the split, or as the list has it.
      label: index of its class, or the label in the list.
      location: where its bytes are.
    """

    name: str
    label: int
    location: Location


class Note(NamedTuple):
    """A message about decisions or ignored files.

    Attributes:
      level: level of logging.
      text: the message, one line.
    """

    level: int
    text: str


@dataclass(frozen=True)
class Part:
    """The images of one split.

    Attributes:
      entries: the images, in order.
      classes: name of each label; None if the labels come from a list.
      present: the classes that occur in this split.
      num_classes: number of classes; for a list its largest label plus one.
      skipped: ignored files.
      notes: messages about the split.
    """

    entries: list[Entry]
    classes: tuple[str, ...] | None
    present: tuple[str, ...]
    num_classes: int
    skipped: Skipped
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """The contents of a place with images.

    Attributes:
      place: its path.
      splits: {name of a split: the function that reads it}.
      unusable: {name of a split that cannot become a data set: the reason}.
      elsewhere: folders beside the splits.
      skipped: ignored files outside the splits.
      notes: messages about the place.
    """

    place: str
    splits: Mapping[str, Callable[[], Part]]
    unusable: dict[str, str] = field(default_factory=dict)
    elsewhere: tuple[Tree, ...] = ()
    skipped: Skipped = field(default_factory=Skipped)
    notes: tuple[Note, ...] = ()


def report_notes(notes: Iterable[Note]) -> None:
    """Log notes, each different one once."""
    for note in dict.fromkeys(notes):
        logger.log(note.level, note.text)


def describe_skipped(place: str, *parts: Skipped) -> tuple[Note, ...]:
    """Return a note about the ignored files of a place, or no note if there are none.

    Args:
      place: path of the place.
      parts: ignored files in its parts.
    """
    skipped = Skipped()
    for part in parts:
        skipped.merge(part)
    level = logging.INFO if skipped.harmless else logging.WARNING
    return (Note(level, skipped.describe(place)),) if skipped.total else ()


def count_images(images: Sized) -> str:
    """Return the number of images in words."""
    return "1 image" if len(images) == 1 else f"{len(images):,} images"


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the number of names and the first ones.

    Args:
      names: the names.
      most: how many of them to show.
    """
    return f"{len(names):,} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
