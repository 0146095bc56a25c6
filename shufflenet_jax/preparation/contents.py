"""Which images a source holds, with their labels: class folders, zips of them, and ILSVRC2012's official tars."""

import re
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from ..data.labels import imagenet_classes
from ..data.locations import Location, zip_files
from ..data.sources import EVAL_SPLITS, IMAGE_SUFFIXES
from ..errors import InputError
from ..files import path_of, printable

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


class Entry(NamedTuple):
    """An image of a source."""

    name: str
    label: int
    location: Location


@dataclass(frozen=True)
class Contents:
    """A source of images: {split: entries} and the names of the labels."""

    splits: dict
    classes: tuple


def read_contents(source):
    """The images in a class folder, a zip of one, or one or both of ILSVRC2012's tars.

    Raises:
      InputError: the source is none of these, or holds no images.
    """
    source = path_of(source)
    try:
        if source.is_dir():
            tars = [source / f"ILSVRC2012_img_{part}.tar" for part in ("train", "val")]
            tars = [path for path in tars if path.is_file()]
            contents = _read_tars(tars) if tars else _read_tree(_folder_files(source))
        elif source.is_file() and zipfile.is_zipfile(source):
            contents = _read_tree(_zip_files(source))
        elif source.is_file() and tarfile.is_tarfile(source):
            contents = _read_tars([source])
        else:
            raise InputError(f"{source} is no folder, zip or tar of images; check `source`")
    except InputError:
        raise
    except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise InputError(f"{source} is damaged: {error}; fetch it again") from error
    if not any(contents.splits.values()):
        raise InputError(f"{source} holds no images as <split>/<class>/<image>, nor ILSVRC2012's tars")
    return contents


def _folder_files(root):
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            yield path.relative_to(root).parts, Location(str(path))


def _zip_files(path):
    for parts, location in zip_files(path, splits=("train", *EVAL_SPLITS)).items():
        if Path(parts[-1]).suffix.lower() in IMAGE_SUFFIXES:
            yield parts, location


def _read_tree(files):
    """Class folders: files come as ((split, class, ..., name), location)."""
    files = [(parts, location) for parts, location in files if len(parts) >= 3]
    for split in {parts[0] for parts, _ in files}:
        if not re.fullmatch(r"\w+", split):
            raise InputError(f"{split!r} is no name for a split; use letters, digits and _")
    for name in {parts[1] for parts, _ in files}:
        if not name.isprintable() or name.strip() in ("", ".", ".."):
            raise InputError(f"{name!r} is no name for a class; use characters that can be printed")
    classes = tuple(sorted({parts[1] for parts, _ in files}))
    rank = {name: label for label, name in enumerate(classes)}
    splits = {}
    for (split, *parts), location in files:
        splits.setdefault(split, []).append(Entry(printable("/".join(parts)), rank[parts[0]], location))
    return Contents(splits, classes)


def _read_tars(paths):
    classes = tuple(imagenet_classes())
    rank = {wnid: label for label, wnid in enumerate(classes)}
    splits = {}
    for path in paths:
        members = list(_tar_members(path, 0))
        if any(name.endswith(".tar") for name, *_ in members):
            splits["train"] = [
                Entry(inner, _label(rank, name.removesuffix(".tar"), path), Location(str(path), start, size))
                for name, offset, _ in sorted(members)
                for inner, start, size in sorted(_tar_members(path, offset))
            ]
        else:
            wnids = _validation_wnids()
            splits["validation"] = []
            for name, start, size in sorted(members):
                number = VALIDATION_NAME.fullmatch(name)
                if not number or not 1 <= int(number[1]) <= len(wnids):
                    raise InputError(f"{path} holds {name}, which is no image of ILSVRC2012's validation set")
                wnid = wnids[int(number[1]) - 1]
                splits["validation"].append(Entry(name, rank[wnid], Location(str(path), start, size)))
    return Contents(splits, classes)


def _label(rank, wnid, path):
    if wnid not in rank:
        raise InputError(f"{path} holds {wnid}.tar, which is no class of ILSVRC2012")
    return rank[wnid]


def _tar_members(path, offset):
    """(name, offset in the file, size) of each file in a tar that begins at an offset."""
    with open(path, "rb") as file:
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield Path(member.name).name, member.offset_data, member.size


def _validation_wnids():
    """The WNID of each validation image by its number; the list ships with TFDS."""
    path = Path(tfds.__file__).parent / "datasets" / "imagenet2012" / "validation_labels.txt"
    return path.read_text(encoding="utf-8").split()
