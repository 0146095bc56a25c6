"""ImageNet as it is distributed: the tars of ILSVRC2012, and labels for validation images without class folders."""

import re
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

from ..errors import InputError
from ..files import printable, real_path
from .archives import read_tar, tree_of
from .inventory import Entry, Inventory, Part
from .labels import imagenet_classes, validation_wnids
from .locations import Location
from .trees import Skipped, Tree, walk

SOLUTION, SOLUTION_ABOVE = "LOC_val_solution.csv", 3  # Kaggle's labels, and how many levels above they may be.
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
TEST_NAME = re.compile(r"ILSVRC2012_test_\d{8}\.JPEG")  # The labels of these images are not public.
OFFICIAL = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
WNID_TAR = re.compile(r"(n\d{8})\.tar")
BESIDE = "beside the tars"  # A reason to ignore an image.


def labels_of_validation(images: Iterable[str], chain: list[Tree], path: Path) -> dict[str, str] | None:
    """Return the labels of ImageNet's validation images, from Kaggle's table or, without one, the challenge's list.

    Args:
      images: names of the images.
      chain: the folder with the images, last, and the folders that contain it.
      path: path that the user gave, above which Kaggle's table may be.

    Returns:
      {name: WordNet ID}, or None if any image has no label there.
    """
    names = list(images)
    table = _solution(chain, path)
    if table:
        labels = {name: table.get(PurePosixPath(name).stem) for name in names}
    else:
        wnids = validation_wnids()
        numbers = {name: VALIDATION_NAME.fullmatch(name) for name in names}
        labels = {
            name: wnids[int(number[1]) - 1] if number and 1 <= int(number[1]) <= len(wnids) else None
            for name, number in numbers.items()
        }
    labeled = {name: label for name, label in labels.items() if label}
    return labeled if len(labeled) == len(names) else None


def _solution(chain: list[Tree], path: Path) -> dict[str, str]:
    """Return Kaggle's table of the validation set, {image: WordNet ID}, from the folders or above them, or {}."""
    inside = (tree.files[SOLUTION] for tree in reversed(chain) if SOLUTION in tree.files)
    above = islice(real_path(path).parents, SOLUTION_ABOVE)
    beside = (Location(str(folder / SOLUTION)) for folder in above if (folder / SOLUTION).is_file())
    location = next(inside, None) or next(beside, None)
    if location is None:
        return {}
    rows = (line.partition(",") for line in location.read().decode(errors="replace").splitlines())
    return {name.strip(): boxes.split()[0] for name, _, boxes in rows if boxes.strip()}


def open_official(path: Path, top: Tree) -> Inventory | None:
    """Return the Inventory of ILSVRC2012's tars, or None if there are none.

    Args:
      path: a folder with the tars, or one of them.
      top: the contents of that folder or tar.
    """
    tars = {split: top.files[name] for split, name in OFFICIAL.items() if name in top.files}
    trees = {split: _inner_tar(where.path, where) for split, where in tars.items() if where.member is None}
    if not trees and any(map(WNID_TAR.fullmatch, top.files)) and path.is_file():
        trees = {"train": top}
    readers = {"train": _read_train_tar, "validation": _read_validation_tar}
    splits = {split: partial(readers[split], tree) for split, tree in trees.items()}
    if not splits:
        return None
    if path.is_file():
        return Inventory(str(path), splits)
    skipped = Skipped()
    for skip in top.listing.skips:
        skipped.add(*skip)
    for name in sorted(set(top.files) - set(OFFICIAL.values())):
        skipped.add_file(name, BESIDE)
    return Inventory(
        str(path), splits, elsewhere=tuple(tree for _, tree in sorted(top.folders.items())), skipped=skipped
    )


def _inner_tar(name: str, where: Location) -> Tree:
    """Open a tar that is a file or a member of another tar."""
    return tree_of(name, read_tar(Path(name), Path(where.path), where.offset, where.size))


def _official_part(entries: list[Entry], skipped: Skipped) -> Part:
    classes = tuple(imagenet_classes())
    return Part(entries, classes, classes, len(classes), skipped)


def _read_train_tar(tree: Tree) -> Part:
    """Read the tar of the training set, which holds a tar per class."""
    rank = {wnid: label for label, wnid in enumerate(imagenet_classes())}
    entries, skipped = [], Skipped()
    for skip in tree.listing.skips:
        skipped.add(*skip)
    for name in sorted({*tree.files, *tree.folders}):
        wnid = name.removesuffix(".tar")
        if wnid not in rank or name in tree.folders:
            raise InputError(f"{tree.path} holds {printable(name)}, which is not a class of ILSVRC2012; fetch it again")
        inner = _inner_tar(f"{tree.path}/{name}", tree.files[name])
        entries += [
            Entry(printable(PurePosixPath(path).name), rank[wnid], where) for path, where in walk(inner, skipped)
        ]
    return _official_part(entries, skipped)


def _read_validation_tar(tree: Tree) -> Part:
    """Read the tar of the validation set. Its labels are in the challenge's list."""
    rank = {wnid: label for label, wnid in enumerate(imagenet_classes())}
    wnids, skipped, entries = validation_wnids(), Skipped(), []
    for path, where in walk(tree, skipped):
        name = PurePosixPath(path).name
        number = VALIDATION_NAME.fullmatch(name)
        if not number or not 1 <= int(number[1]) <= len(wnids):
            raise InputError(
                f"{tree.path} holds {printable(name)}, which is not an image of ILSVRC2012's validation set; "
                "fetch it again"
            )
        entries.append(Entry(name, rank[wnids[int(number[1]) - 1]], where))
    return _official_part(entries, skipped)
