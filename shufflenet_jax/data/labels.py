"""Class names: their order and spelling, and ImageNet's own from the lists of the challenge ILSVRC2012."""

import operator
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import SupportsIndex

from ..errors import InputError
from ..files import printable

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


@cache
def imagenet_classes() -> dict[str, str]:
    """Return {WordNet ID: short name} of ImageNet's classes, in the order of the labels."""
    lines = files(__package__).joinpath("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


@cache
def validation_wnids() -> list[str]:
    """Return the WordNet ID of each validation image of ILSVRC2012, by number. TFDS contains the list."""
    spec = find_spec("tensorflow_datasets")  # Importing TFDS takes half a second.
    assert spec and spec.origin
    path = Path(spec.origin).parent / "datasets" / "imagenet2012" / "validation_labels.txt"
    return path.read_text(encoding="utf-8").split()


def class_name(classes: Sequence[str] | None, label: SupportsIndex) -> str:
    """Return the name of a class as people read it: for ImageNet the short name.

    Args:
      classes: name of each label; None gives the label itself.
      label: index of the class.
    """
    index = operator.index(label)
    return imagenet_classes().get(classes[index], classes[index]) if classes else str(index)


def class_named(folder: str) -> str:
    """Return the class name that belongs to the name of a folder.

    Args:
      folder: name of the folder. Spaces around it are ignored, and bytes that are not text are escaped.

    Raises:
      InputError: the name has no characters, or some that cannot be printed.
    """
    name = printable(folder).strip()
    if not name or any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
        raise InputError(f"{folder!r} is not a valid name for a class; use characters that can be printed")
    return name


def spelling(name: str) -> str:
    """Return a normal form of a class name: without spaces around it, in lower case, and in Unicode's form NFC.

    Single letters keep their case, since data sets of handwriting have classes a and A.
    """
    name = unicodedata.normalize("NFC", name).strip()
    return name if len(name) == 1 else unicodedata.normalize("NFC", name.casefold())


def require_distinct(place: str, folders: Iterable[str]) -> None:
    """Raise InputError if two class folders have names that some file systems do not distinguish.

    Args:
      place: path of the folders, for the error.
      folders: names of the folders.
    """
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    for folder in folders:
        spellings[spelling(folder)].add(folder)
    for names in spellings.values():
        if len(names) > 1:
            first, second = sorted(names)[:2]
            raise InputError(
                f"{place} has the classes {first!a} and {second!a}, which differ only in case, spaces or Unicode form; "
                "give their folders one name"
            )


def are_imagenets(names: Sequence[str]) -> bool:
    """Whether the names are ImageNet's 1000 in label order; more than half must match, since spellings differ."""
    spelled = [(_plain(name), _plain(ours)) for name, ours in zip(names, imagenet_classes().values(), strict=False)]
    return len(names) == 1000 and sum(name == ours for name, ours in spelled) > 500


def _plain(name: str) -> str:
    """Return the first synonym in a class name, in lower case and with spaces."""
    return name.partition(",")[0].replace("_", " ").strip().casefold()


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all names are numbers."""
    return all(map(NUMBER.fullmatch, names))


def in_order(names: Iterable[str]) -> list[str]:
    """Sort class names without duplicates: as numbers if all are numbers, else alphabetically."""
    ranked = sorted(set(names))
    return sorted(ranked, key=Decimal) if are_numbers(ranked) else ranked
