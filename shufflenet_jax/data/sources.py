"""Labeled images by position: TFDS data sets, folders and archives, and the digits inside scikit-learn."""

import dataclasses
import logging
import operator
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from .. import progress
from ..config import VAL_SHARE
from ..errors import InputError
from ..files import path_of, require_plain
from .folders import EVAL_SPLITS, open_folder
from .inventory import Note, describe_skipped
from .labels import are_numbers, spelling

# What is known of data sets before they are on disk, to plan a training: {name: number of training images, of classes}.
KNOWN_SIZES = {"tfds:imagenet2012": 1_281_167, "tfds:cifar10": 50_000}
KNOWN_CLASSES = {"tfds:imagenet2012": 1000, "tfds:cifar10": 10}
TfdsObject = Any  # An object of TFDS, whose type cannot be named here: importing TFDS takes half a second.
Record = tuple[str, bytes, list[int]]  # (file name, encoded image, labels).


class Reader(NamedTuple):
    """The reader of a source, as messages describe it.

    Attributes:
      split: name of the reader's argument for the split.
      owner: whose classes decide the labels, like "the model".
      advice: what to do if the data has other classes than the owner.
    """

    split: str = "split"
    owner: str = "the model"
    advice: str = "choose a checkpoint that was trained on these classes"


MODEL = Reader()


class Example(NamedTuple):
    """A labeled image.

    Attributes:
      name: its name.
      image: encoded bytes, or uint8 pixels: (H, W, 3) in RGB or (H, W) in grey.
      label: its label; for data with several right labels per image int32 (K,), padded with -1.
    """

    name: str
    image: bytes | np.ndarray
    label: int | np.ndarray


@dataclass(frozen=True)
class Source:
    """A random-access list of examples: `source[i]` reads the i-th, from any thread or process.

    Attributes:
      size: number of examples.
      read: reads an example.
      num_classes: number of classes.
      classes: name of each label; None if the data has no names.
      labels: returns all labels, without decoding an image.
      label_shape: () for one label per image, (K,) for up to K labels.
      notes: decisions and ignored files, for `inventory.report_notes`.
      skipped: number of ignored files.
      labels_at_hand: whether `labels` reads no files.
      traits: returns what distinguishes these examples from any others, in order: names, sizes and labels of images, or
        shards. It reads no images.
    """

    size: int
    read: Callable[[int], Example]
    num_classes: int
    classes: tuple[str, ...] | None
    labels: Callable[[], Iterable[int]]
    label_shape: tuple[int, ...] = ()
    notes: tuple[Note, ...] = ()
    skipped: int = 0
    labels_at_hand: bool = True
    traits: Callable[[], Iterable[object]] = tuple

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self.read(operator.index(index))


def open_source(
    data: str | Path,
    split: str | None = None,
    *,
    data_dir: str | Path | None = None,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    multi_label: bool = False,
    val_share: float = VAL_SHARE,
    reader: Reader = MODEL,
) -> Source:
    """Open a data set.

    Args:
      data: "digits", "tfds:NAME", or a folder, a zip or a tar, with `<split>/<class>/<image>`, `<class>/<image>` or
        `meta/<split>.txt`.
      split: name of the split; None takes the first of val, validation and test that exists.
      data_dir: folder of TFDS data sets; None is TFDS's default.
      classes: name of each label, for data with class names; None takes the data's own names in order.
      num_classes: number of classes of the model that will read the data; None if there is no model.
      multi_label: accept data with several right labels per image, like TFDS's imagenet2012_real (Beyer et al., 2020),
        and skip images without a label.
      val_share: share of each class that a folder without splits holds out as val.
      reader: the reader of the data, for messages.

    Raises:
      InputError: there is no usable data set, or its classes do not fit `classes` or `num_classes`.
    """
    if not data:
        raise InputError("no images are named; give a folder or an archive of them, or tfds:NAME, with `data`")
    if data == "digits":
        source = _open_digits(split)
    elif str(data).startswith("tfds:"):
        source = _open_tfds(str(data).removeprefix("tfds:"), split, data_dir, classes, multi_label, reader)
    else:
        source = _open_folder(path_of(data), split, classes, val_share, reader)
    # The labels of a list have no names, and its largest label is only a lower bound of the number of classes.
    own = source.classes
    exact = own is not None
    if num_classes and (source.num_classes > num_classes or (exact and source.num_classes < num_classes)):
        raise InputError(
            f"the data {data} has {source.num_classes} classes, but {reader.owner} has {num_classes}; {reader.advice}"
        )
    if own is not None and classes is not None and tuple(classes) != own:
        raise InputError(
            f"the data {data} has other classes than {reader.owner}, like {own[0]} for {classes[0]}; {reader.advice}"
        )
    if num_classes and data != "digits":
        notes = (*source.notes, *_notes_on_numbers(data, own, classes, reader))
        return dataclasses.replace(source, notes=notes)
    return source


def _open_tfds(
    name: str,
    split: str | None,
    data_dir: str | Path | None,
    classes: Sequence[str] | None,
    multi_label: bool,
    reader: Reader,
) -> Source:
    """Open a TFDS data set on disk in ArrayRecord form. Never download it; do not use TensorFlow."""
    import tensorflow_datasets as tfds  # Importing it takes half a second.
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
    truth, labels = _label_feature(info, name, multi_label=multi_label)
    split = _choose_split(split, f"the data set {name}", info.splits, reader)
    # TFDS's own parsing converts every feature to an array, which takes half as long as decoding the image.
    try:
        records = builder.as_data_source(split, deserialize_method=tfds.core.decode.DeserializeMethod.RAW_BYTES)
        size = len(records)
    except Exception as error:  # ArrayRecord and TFDS raise several exceptions for bad shards.
        raise InputError(f"split {split} of the data set {name} is damaged or empty; prepare it again") from error
    named = labels._int2str is not None  # TFDS names labels without names by their numbers.
    own = tuple(labels.names)
    # If the data has no names, its numbers are the labels.
    classes = own if classes is None or not named else tuple(classes)
    rank = _rank(own if named else (), classes, f"the data set {name}", reader)
    naming = next((key for key in ("file_name", "id") if key in info.features), None)

    def parsed(index: int) -> Record:
        """Read a record."""
        try:
            record = tf_example_pb2.Example.FromString(records[index]).features.feature
            image, found = record["image"].bytes_list.value[0], list(record[truth].int64_list.value)
            called = record[naming].bytes_list.value[0].decode() if naming else f"{split}/{index}"
        except Exception as error:  # ArrayRecord and TFDS raise several exceptions.
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(
                f"record {index} of {name}, split {split}, is damaged ({reason}); prepare it again"
            ) from error
        if not all(0 <= label < len(own) for label in found) or (truth == "label" and len(found) != 1):
            numbers = ", ".join(map(str, found))
            raise InputError(f"record {index} of {name}, split {split}, has no label ({numbers}); choose another split")
        return called, image, [rank[own[label]] for label in found] if named else found

    def all_labels() -> list[list[int]]:
        return [
            parsed(index)[2]
            for index in progress.follow(range(size), total=size, unit="image", description="reading labels")
        ]

    def read(index: int) -> Example:
        called, image, (label,) = parsed(index)
        return Example(called, image, label)

    traits = _traits_of_shards(info, info.splits[split])
    known: dict[str, Any] = {"num_classes": len(classes), "classes": classes if named else None}
    known |= {"labels_at_hand": False, "traits": lambda: traits}
    if truth == "label":
        return Source(size, read, labels=lambda: (label for (label,) in all_labels()), **known)

    return _open_judged(f"split {split} of {name}", parsed, all_labels(), known)


def _label_feature(info: TfdsObject, name: str, *, multi_label: bool) -> tuple[str, TfdsObject]:
    """Return the name of the feature with the labels, and the ClassLabel. Raise InputError if there is none."""
    import tensorflow_datasets as tfds

    truth = "real_label" if multi_label and "label" not in info.features else "label"
    labels = dict(info.features.items()).get(truth)
    labels = getattr(labels, "feature", labels)  # The feature inside a sequence.
    if "image" not in info.features or not isinstance(labels, tfds.features.ClassLabel):
        raise InputError(f"the data set {name} holds {', '.join(info.features)}, but no image and label of a class")
    return truth, labels


def _traits_of_shards(info: TfdsObject, split: TfdsObject) -> tuple[object, ...]:
    """Return what distinguishes a split of a TFDS data set from others: its name, version, size and shards."""
    shards = tuple(map(int, split.shard_lengths))
    return (info.full_name, split.name, int(split.num_bytes), shards)


def _open_judged(what: str, parsed: Callable[[int], Record], truths: list[list[int]], known: dict[str, Any]) -> Source:
    """Return the Source of the images with one or more labels.

    Args:
      what: name of the split and data set, for errors.
      parsed: reads a record.
      truths: the labels of each record.
      known: other arguments of the Source.
    """
    judged, most = [index for index, labels in enumerate(truths) if labels], max(map(len, truths))
    if not judged:
        raise InputError(f"no image of {what} has a label; choose another split")

    def read(index: int) -> Example:
        name, image, labels = parsed(judged[index])
        return Example(name, image, np.array(labels + [-1] * (most - len(labels)), np.int32))

    return Source(len(judged), read, labels=lambda: chain(*truths), label_shape=(most,), **known)


def open_tfds(folder: Path) -> TfdsObject:
    """Return TFDS's builder of a data set.

    Args:
      folder: the folder of the data set's version.

    Raises:
      InputError: the folder holds no TFDS data set, or a damaged one.
    """
    import tensorflow_datasets as tfds

    require_plain(folder)
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS and protobuf raise many exceptions for damaged descriptions.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{folder} is no TFDS data set, or a damaged one ({reason}); prepare it again") from error


def split_version(name: str) -> tuple[str, str | None]:
    """Split the name of a TFDS data set, like imagenet_a/0.1.0, into name and version; the version may be missing."""
    match = re.fullmatch(r"(.+)/(\d+\.\d+\.\d+)", name)
    return (match[1], match[2]) if match else (name, None)


def tfds_directory(name: str, data_dir: str | Path | None = None) -> Path:
    """Return the folder of a TFDS data set's version.

    Args:
      name: name of the data set, without version for the newest one.
      data_dir: folder of TFDS data sets; None is TFDS's default.

    Raises:
      InputError: there is no such data set or version.
    """
    from tensorflow_datasets.core import constants, utils

    if not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", name):
        raise InputError(f"{name!r} is not a valid name of a data set; give one like tfds:imagenet2012")
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
            others = ", ".join(sorted(path.name for path in versions))
            raise InputError(f"{versions[0].parent} holds {others}, but no version {wanted}; name one of these")
        return chosen[0]
    return max(versions, key=lambda path: utils.Version(path.name))


def _open_digits(split: str | None) -> Source:
    """Open scikit-learn's 1,797 grey 8x8 digits: a fixed random fifth, 359, is the split "test", the rest "train"."""
    from sklearn.datasets import load_digits  # Importing it takes a second.

    if split not in (None, "train", *EVAL_SPLITS):
        raise InputError(f"the digits have no split {split!r}; use train or test")
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    held_out = len(order) // 5
    chosen = order[held_out:] if split == "train" else order[:held_out]
    images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
    labels = digits.target[chosen]

    def read(index: int) -> Example:
        return Example(f"digit{chosen[index]:04d}", images[index], int(labels[index]))

    def traits() -> Iterable[object]:
        return ((f"digit{number:04d}", 64, int(label)) for number, label in zip(chosen, labels, strict=True))

    return Source(len(chosen), read, 10, tuple("0123456789"), labels.tolist, traits=traits)


def _open_folder(
    place: Path, split: str | None, classes: Sequence[str] | None, val_share: float, reader: Reader
) -> Source:
    inventory = open_folder(place, split, val_share=val_share)
    split = _choose_split(split, str(place), inventory.splits, reader)
    part = inventory.splits[split]()
    entries, labels = part.entries, [entry.label for entry in part.entries]
    names: tuple[str, ...] | None = None
    if part.classes is not None:
        names = part.classes if classes is None else tuple(classes)
        rank = _rank(part.present, names, f"{place}/{split}", reader)
        labels = [rank[part.classes[label]] for label in labels]

    def read(index: int) -> Example:
        return Example(entries[index].name, entries[index].location.read(), labels[index])

    def traits() -> Iterable[object]:
        return ((entry.name, entry.location.length(), label) for entry, label in zip(entries, labels, strict=True))

    return Source(
        len(entries),
        read,
        part.num_classes if names is None else len(names),
        names,
        lambda: labels,
        notes=(*inventory.notes, *part.notes, *describe_skipped(inventory.place, inventory.skipped, part.skipped)),
        skipped=inventory.skipped.total + part.skipped.total,
        traits=traits,
    )


def _choose_split(split: str | None, what: str, splits: Collection[str], reader: Reader) -> str:
    """Return the split of this name in any case, or for None the first usual evaluation split.

    Raises:
      InputError: there is no such split; the message calls the data `what`.
    """
    if split is None:
        chosen = next((name for name in EVAL_SPLITS if name in splits), None)
    elif split in splits:
        chosen = split
    else:
        chosen = next((name for name in splits if name.casefold() == split.casefold()), None)
    if chosen is None:
        others = f"it has {', '.join(sorted(splits))}; name another with `{reader.split}`"
        wanted = f"none of the splits {', '.join(EVAL_SPLITS)}" if split is None else f"no split {split!r}"
        raise InputError(f"{what} has {wanted}; {others if splits else 'it holds no images in a supported form'}")
    return chosen


def _rank(present: Iterable[str], classes: Iterable[str], what: str, reader: Reader) -> dict[str, int]:
    """Return {class name: label}. Raise InputError if a class that is present has no label."""
    rank = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(present) - set(rank))
    if unknown:
        alike = next((name for name in classes if spelling(name) == spelling(unknown[0])), None)
        if alike is not None:
            raise InputError(
                f"{what} has a class {unknown[0]!a} where {reader.owner} has {alike!a}, which differ only in case, "
                "spaces or Unicode form; rename the folder"
            )
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(
            f"{what} has classes that {reader.owner} does not have: {', '.join(unknown[:3])}{more}; {reader.advice}"
        )
    return rank


def _notes_on_numbers(
    data: str | Path, own: Sequence[str] | None, model: Sequence[str] | None, reader: Reader
) -> tuple[Note, ...]:
    """Return a warning if the class names of data or model are numbers, and the other has labels without names.

    Args:
      data: name of the data.
      own: names of its classes, if any.
      model: names of the model's classes, if any.
      reader: the reader of the data, for messages.
    """
    numbers = own or model
    if not numbers or (own and model) or not are_numbers(numbers):
        return ()
    unnamed = f"{reader.owner}'s labels" if own else "the data's labels"
    pairs = ", ".join(f"{label} is class {name}" for label, name in enumerate(numbers[:3]))
    text = f"the classes of {data} are numbers, but {unnamed} have no names: assumed in this order, label {pairs}"
    return (Note(logging.WARNING, f"{text}{', ...' if len(numbers) > 3 else ''}"),)
