"""What a place with images holds: its splits, the images of each with their labels, and what is ignored."""

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
      name: its path below the split, or in the list.
      label: its place among the classes, or what the list says.
      location: where its bytes lie.
    """

    name: str
    label: int
    location: Location


class Note(NamedTuple):
    """What was decided or ignored, in one line, and its level of logging."""

    level: int
    text: str


@dataclass(frozen=True)
class Part:
    """The images of one split.

    Attributes:
      entries: the images, in order.
      classes: the name of each label; None where a list says the labels.
      present: the classes that this split has.
      num_classes: the number of classes, or the largest label of a list, plus one.
      skipped: what is ignored in it.
      notes: what is odd about it.
    """

    entries: list[Entry]
    classes: tuple[str, ...] | None
    present: tuple[str, ...]
    num_classes: int
    skipped: Skipped
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """What a place holds.

    Attributes:
      place: its path.
      splits: what reads each split.
      unusable: splits of which no data set can be made, and why.
      elsewhere: folders beside the splits.
      skipped: what is ignored around the splits.
      notes: what was decided for the place as a whole.
    """

    place: str
    splits: Mapping[str, Callable[[], Part]]
    unusable: dict[str, str] = field(default_factory=dict)
    elsewhere: tuple[Tree, ...] = ()
    skipped: Skipped = field(default_factory=Skipped)
    notes: tuple[Note, ...] = ()


def report_notes(notes: Iterable[Note]) -> None:
    """Log what was decided and ignored, each line once."""
    for note in dict.fromkeys(notes):
        logger.log(note.level, note.text)


def describe_skipped(place: str, *parts: Skipped) -> tuple[Note, ...]:
    """Return the line about the files of a place that are ignored, or nothing where there are none."""
    skipped = Skipped()
    for part in parts:
        skipped.merge(part)
    level = logging.INFO if skipped.harmless else logging.WARNING
    return (Note(level, skipped.describe(place)),) if skipped.total else ()


def count_images(images: Sized) -> str:
    """Return the number of images in words."""
    return "1 image" if len(images) == 1 else f"{len(images):,} images"


def some(names: Sequence[str], most: int = 5) -> str:
    """Return how many names there are, with the first ones."""
    return f"{len(names):,} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
