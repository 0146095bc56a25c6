"""Labelled images by position: TFDS data sets, class folders, MMPretrain's lists, the digits inside scikit-learn."""

import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from .. import progress
from ..errors import InputError
from ..files import DAMAGED_ZIP, path_of, require_plain
from .locations import Location, zip_files

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
EVAL_SPLITS = ("val", "validation", "test")
KNOWN_SIZES = {"tfds:imagenet2012": 1_281_167, "tfds:cifar10": 50_000}  # Training images, where there are none yet.
ADVICE = "choose a checkpoint that was trained on these classes"


class Example(NamedTuple):
    name: str
    image: bytes | np.ndarray  # Encoded, or uint8 (H, W, 3) RGB or (H, W) grey.
    label: int | np.ndarray  # Or int32 (K,): all that are right, filled up with -1.


@dataclass(frozen=True)
class Source:
    """A random-access list of examples: `source[i]` reads the i-th, from any thread or process."""

    size: int
    read: Callable[[int], Example]
    num_classes: int
    classes: tuple[str, ...] | None  # Name of each label, where the data knows them.
    labels: Callable[[], Iterable[int]]  # All that occur, without decoding an image.
    label_shape: tuple[int, ...] = ()  # (K,) where an image may have several labels.

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.read(index)


def open_source(data, split=None, *, data_dir=None, classes=None, num_classes=None, multi_label=False):
    """Open a data set.

    Args:
      data: "digits", "tfds:NAME", or a folder or a zip of one, with `<split>/<class>/<image>` or `meta/<split>.txt`.
      split: its split; None takes the first of val, validation and test that exists.
      data_dir: where TFDS data sets lie; by default TFDS's own place.
      classes: the names that decide the labels of class folders and data sets; by default their own, in order.
      num_classes: the classes of the model that will read the data, where there is one.
      multi_label: also take data whose images have several right labels, like TFDS's imagenet2012_real (Beyer et al.,
        2020); images without any are left out.
    Raises:
      InputError: nothing usable lies there, or its labels are not those of the model.
    """
    if data == "digits":
        source = _open_digits(split)
    elif str(data).startswith("tfds:"):
        source = _open_tfds(str(data).removeprefix("tfds:"), split, data_dir, classes, multi_label)
    else:
        source = _open_folder(path_of(data), split, classes)
    # A list names no classes: its largest label only bounds how many there are.
    exact = source.classes is not None
    if num_classes and (source.num_classes > num_classes or (exact and source.num_classes < num_classes)):
        raise InputError(f"the data {data} has {source.num_classes} classes, but the model has {num_classes}; {ADVICE}")
    if exact and classes is not None and tuple(classes) != source.classes:
        raise InputError(
            f"the data {data} has other classes than the model, like {source.classes[0]} for {classes[0]}; {ADVICE}"
        )
    return source


def _open_tfds(name, split, data_dir, classes, multi_label):
    """A data set on disk in ArrayRecord form; nothing is ever downloaded, and no TensorFlow is needed."""
    import tensorflow_datasets as tfds  # Costs half a second to import.
    from tensorflow_datasets.proto import tf_example_pb2

    builder = open_tfds(tfds_directory(name, data_dir))
    name, _ = split_version(name)
    info = builder.info
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise InputError(
            f"the data set {name} is stored as {info.file_format.value}, which cannot be read at random; convert it "
            "once, and name the new place with `data_dir`",
            command=("prepare", {"source": builder.data_path, "name": name, "out": "DIR"}),
        )
    truth = "real_label" if multi_label and "label" not in info.features else "label"
    labels = dict(info.features.items()).get(truth)
    labels = getattr(labels, "feature", labels)  # That of a sequence.
    if "image" not in info.features or not isinstance(labels, tfds.features.ClassLabel):
        raise InputError(f"the data set {name} holds {', '.join(info.features)}, but no image and label of a class")
    split = _choose_split(split, f"the data set {name}", set(info.splits).__contains__)
    # TFDS's own parsing makes an array of every feature, which takes as long as half the decoding of an image.
    try:
        records = builder.as_data_source(split, deserialize_method=tfds.core.decode.DeserializeMethod.RAW_BYTES)
        size = len(records)
    except Exception as error:  # ArrayRecord and TFDS raise several kinds for missing, cut and empty shards.
        raise InputError(f"split {split} of the data set {name} is damaged or empty; prepare it again") from error
    own = tuple(labels.names or map(str, range(labels.num_classes)))
    # Without names of its own, the data's numbers are the labels.
    classes = own if classes is None or not labels.names else tuple(classes)
    rank = _rank(own if labels.names else (), classes, f"the data set {name}")
    naming = next((key for key in ("file_name", "id") if key in info.features), None)

    def parsed(index):
        """(file name, encoded image, its labels) of a record."""
        try:
            record = tf_example_pb2.Example.FromString(records[index]).features.feature
            image, found = record["image"].bytes_list.value[0], list(record[truth].int64_list.value)
            called = record[naming].bytes_list.value[0].decode() if naming else f"{split}/{index}"
        except Exception as error:  # ArrayRecord and TFDS raise several kinds for damaged records.
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(
                f"record {index} of {name}, split {split}, is damaged ({reason}); prepare it again"
            ) from error
        if not all(0 <= label < len(own) for label in found) or (truth == "label" and len(found) != 1):
            told = ", ".join(map(str, found))
            raise InputError(f"record {index} of {name}, split {split}, has no label ({told}); choose another split")
        return called, image, [rank[own[label]] for label in found] if labels.names else found

    def all_labels():
        return [
            parsed(index)[2]
            for index in progress.follow(range(size), total=size, unit="image", description="reading labels")
        ]

    def read(index):
        called, image, (label,) = parsed(index)
        return Example(called, image, label)

    known = {"num_classes": len(classes), "classes": classes if labels.names else None}
    if truth == "label":
        return Source(size, read, labels=lambda: (label for (label,) in all_labels()), **known)

    return _open_judged(f"split {split} of {name}", parsed, all_labels(), known)


def _open_judged(what, parsed, truths, known):
    """Return the Source of the images that have a label, or several; the others are left out."""
    judged, most = [index for index, labels in enumerate(truths) if labels], max(map(len, truths))
    if not judged:
        raise InputError(f"no image of {what} has a label; choose another split")

    def read(index):
        name, image, labels = parsed(judged[index])
        return Example(name, image, np.int32(labels + [-1] * (most - len(labels))))

    return Source(len(judged), read, labels=lambda: chain(*truths), label_shape=(most,), **known)


def open_tfds(folder):
    """TFDS's builder of a data set's folder. Raises InputError if it is none, or a damaged one."""
    import tensorflow_datasets as tfds

    require_plain(folder)
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS and protobuf raise a dozen kinds for damaged descriptions.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{folder} is no TFDS data set, or a damaged one ({reason}); prepare it again") from error


def split_version(name):
    """(name, version or None) of a TFDS data set's name, which may end in a version, like imagenet_a/0.1.0."""
    found = re.fullmatch(r"(.+)/(\d+\.\d+\.\d+)", name)
    return found.groups() if found else (name, None)


def tfds_directory(name, data_dir=None):
    """The folder of a TFDS data set's version: the one named, or the newest. Raises InputError where there is none."""
    from tensorflow_datasets.core import constants, utils

    if not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", name):
        raise InputError(f"{name!r} is no name of a data set; give tfds: and one like imagenet2012")
    name, wanted = split_version(name)
    root = path_of(Path(data_dir or constants.DATA_DIR) / name)
    versions = [path.parent for path in root.glob("**/dataset_info.json") if utils.Version.is_valid(path.parent.name)]
    if not versions:
        raise InputError(
            f"no data set {name} in {root.parent}; name its place with `data_dir`, or prepare it",
            command=("prepare", {"source": "S", "name": name, "out": root.parent}),
        )
    configs = sorted({path.parent.relative_to(root).as_posix() for path in versions})
    if len(configs) > 1:
        raise InputError(f"{root} holds {', '.join(configs)}; name one of them, like tfds:{name}/{configs[-1]}")
    if wanted:
        chosen = [path for path in versions if path.name == wanted]
        if not chosen:
            known = ", ".join(sorted(path.name for path in versions))
            raise InputError(f"{versions[0].parent} holds {known}, but no version {wanted}; name one that is there")
        return chosen[0]
    return max(versions, key=lambda path: utils.Version(path.name))


def _open_digits(split):
    """1,797 grey 8x8 digits: a fifth, drawn with seed 0, is split "test" (359), the rest "train"."""
    from sklearn.datasets import load_digits  # Costs a second to import.

    if split not in (None, "train", *EVAL_SPLITS):
        raise InputError(f"the digits have no split {split!r}; use train or test")
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    held_out = len(order) // 5
    chosen = order[held_out:] if split == "train" else order[:held_out]
    images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
    labels = digits.target[chosen]

    def read(index):
        return Example(f"digit{chosen[index]:04d}", images[index], int(labels[index]))

    return Source(len(chosen), read, 10, tuple("0123456789"), labels.tolist)


class _Tree(NamedTuple):
    """A folder of images, or a zip of one."""

    path: Path
    has_split: Callable[[str], bool]
    listing: Callable[[str], Location | None]  # The list of a split, meta/<split>.txt.
    classes: Callable[[str], Iterable[str]]  # The class folders of a split.
    files: Callable[[str], Iterable[tuple[tuple[str, ...], Location]]]  # In those: parts of their paths in the split.
    locate: Callable[[str], Location]  # A file, by its path.


def _open_folder(root, split, classes):
    if root.is_file() and zipfile.is_zipfile(root):
        tree = _zip_tree(root)
    elif root.is_dir():
        path_of(root / (split or ""))
        tree = _folder_tree(root)
    else:
        raise InputError(f"no data at {root}; give 'digits', or a folder or a zip of images")
    split = _choose_split(split, str(root), lambda name: tree.has_split(name) or tree.listing(name) is not None)
    return _open_list(tree, split) if tree.listing(split) is not None else _open_classes(tree, split, classes)


def _folder_tree(root):
    def listing(split):
        path = root / "meta" / f"{split}.txt"
        return Location(str(path)) if path.is_file() else None

    def classes(split):
        return (entry.name for entry in (root / split).iterdir() if entry.is_dir() and not entry.name.startswith("."))

    def files(split):
        for name in sorted(classes(split)):
            for path in sorted((root / split / name).rglob("*")):
                yield path.relative_to(root / split).parts, Location(str(path))

    def locate(name):
        return Location(str(path_of(root / name)))

    return _Tree(root, lambda name: (root / name).is_dir(), listing, classes, files, locate)


def _zip_tree(path):
    try:
        stored = zip_files(path, splits=("train", *EVAL_SPLITS))
    except (OSError, ValueError, *DAMAGED_ZIP) as error:
        raise InputError(f"{path} is damaged: {error}; fetch it again") from error

    def files(split):
        for (first, *parts), location in stored.items():
            if first == split and len(parts) > 1 and not parts[0].startswith("."):
                yield tuple(parts), location

    splits = {parts[0] for parts in stored if len(parts) > 1} - {"meta"}
    return _Tree(
        path,
        splits.__contains__,
        lambda split: stored.get(("meta", f"{split}.txt")),
        lambda split: {parts[0] for parts, _ in files(split)},
        files,
        lambda name: stored.get(PurePosixPath(name).parts, Location(str(path), member=name)),
    )


def _choose_split(split, what, exists):
    """The split asked for, or the first of the usual evaluation splits that exists."""
    if split is not None:
        if not exists(split):
            raise InputError(f"{what} has no split {split!r}; name another with `split`")
        return split
    found = next(filter(exists, EVAL_SPLITS), None)
    if found is None:
        raise InputError(f"{what} has none of the splits {', '.join(EVAL_SPLITS)}; name one with `split`")
    return found


def _rank(present, classes, what):
    """{class name: label}. Raises InputError if a class that is present is none of the classes."""
    rank = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(present) - set(rank))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(f"{what} has classes that the model does not know: {', '.join(unknown[:3])}{more}; {ADVICE}")
    return rank


def _open_list(tree, split):
    """MMPretrain's form: a line `file label` for each image below the split's folder."""
    names, labels, listing = [], [], f"{tree.path}/meta/{split}.txt"
    for number, line in enumerate(tree.listing(split).read().decode(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal() or len(label) > 7:
            raise InputError(f"line {number} of {listing} is not 'file label' with a label from 0 to 9999999")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise InputError(f"{listing} lists no images")
    locations = [tree.locate(f"{split}/{name}") for name in names]

    def read(index):
        return Example(names[index], locations[index].read(), labels[index])

    return Source(len(names), read, max(labels) + 1, None, lambda: labels)


def _open_classes(tree, split, classes):
    """One folder a class; `classes` decides the labels, also of data that holds only some of them."""
    what = f"{tree.path}/{split}"
    present = sorted(tree.classes(split))
    classes = tuple(present) if classes is None else tuple(classes)
    rank = _rank(present, classes, what)
    images = [
        ("/".join(parts), rank[parts[0]], location)
        for parts, location in tree.files(split)
        if Path(parts[-1]).suffix.lower() in IMAGE_SUFFIXES
    ]
    if not images:
        raise InputError(f"{what} holds no images in class folders, <class>/<image>")

    def read(index):
        name, label, location = images[index]
        return Example(name, location.read(), label)

    return Source(len(images), read, len(classes), classes, lambda: (label for _, label, _ in images))
