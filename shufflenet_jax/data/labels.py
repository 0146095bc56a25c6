"""Names of classes: their order and spelling, and those of ILSVRC2012 from the challenge's own lists."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from ..errors import InputError
from ..files import printable

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


@cache
def imagenet_classes():
    """{WNID: short name}, in label order."""
    lines = files(__package__).joinpath("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


@cache
def validation_wnids() -> list[str]:
    """Return the WNID of each validation image of ILSVRC2012 by its number; the list ships with TFDS."""
    spec = find_spec("tensorflow_datasets")  # Importing it costs half a second.
    assert spec and spec.origin
    path = Path(spec.origin).parent / "datasets" / "imagenet2012" / "validation_labels.txt"
    return path.read_text(encoding="utf-8").split()


def class_name(classes, label):
    """What people call a class: ImageNet's by its short name, others as their data does; without names, the label."""
    return imagenet_classes().get(classes[label], classes[label]) if classes else str(label)


def class_named(folder: str) -> str:
    """Return the name of the class in a folder: without surrounding spaces, and as text whatever its bytes are.

    Raises:
      InputError: it has no name that can be printed.
    """
    name = printable(folder).strip()
    if not name or any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
        raise InputError(f"{folder!r} is no name for a class; use characters that can be printed")
    return name


def spelling(name: str) -> str:
    """Return what equal names have in common that differ in spaces around them, case or Unicode form.

    Single letters may differ in case: data sets of handwriting have classes a and A.
    """
    name = unicodedata.normalize("NFC", name).strip()
    return name if len(name) == 1 else unicodedata.normalize("NFC", name.casefold())


def require_distinct(place: str, folders: Iterable[str]) -> None:
    """Raises InputError if folders would be one class for some systems and two for others."""
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


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all names are numbers."""
    return all(map(NUMBER.fullmatch, names))


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the names of classes: as numbers if all are numbers, else letter by letter."""
    ranked = sorted(set(names))
    return sorted(ranked, key=Decimal) if are_numbers(ranked) else ranked
