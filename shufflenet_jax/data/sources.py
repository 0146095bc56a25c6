"""Labelled images by position: TFDS data sets, folders and archives, the digits inside scikit-learn."""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import progress
from ..config import VAL_SHARE
from ..errors import InputError
from ..files import path_of, require_plain
from .folders import EVAL_SPLITS, open_folder
from .inventory import Note, describe_skipped
from .labels import are_numbers, spelling

KNOWN_SIZES = {"tfds:imagenet2012": 1_281_167, "tfds:cifar10": 50_000}  # Training images, where there are none yet.
KNOWN_CLASSES = {"tfds:imagenet2012": 1000, "tfds:cifar10": 10}


class Reader(NamedTuple):
    """Who reads a source, as messages call it.

    Attributes:
      split: the reader's argument for the split.
      owner: whose classes decide the labels.
      advice: what to do where the data has other classes than the owner.
    """

    split: str = "split"
    owner: str = "the model"
    advice: str = "choose a checkpoint that was trained on these classes"


MODEL = Reader()


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
    notes: tuple[Note, ...] = ()  # What was decided and ignored when it was opened, for `inventory.report_notes`.
    skipped: int = 0  # Files that were ignored.
    labels_at_hand: bool = True  # Whether `labels` reads nothing.
    # What tells these examples from any others, in order: names, sizes and labels of images, or shards. Reads nothing.
    traits: Callable[[], Iterable[object]] = tuple

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.read(index)


def open_source(
    data,
    split=None,
    *,
    data_dir=None,
    classes=None,
    num_classes=None,
    multi_label=False,
    val_share=VAL_SHARE,
    reader=MODEL,
):
    """Open a data set.

    Args:
      data: "digits", "tfds:NAME", or a folder, a zip or a tar, with `<split>/<class>/<image>`, `<class>/<image>` or
        `meta/<split>.txt`.
      split: its split; None takes the first of val, validation and test that exists.
      data_dir: where TFDS data sets lie; by default TFDS's own place.
      classes: the names that decide the labels of class folders and data sets; by default their own, in order.
      num_classes: the classes of the model that will read the data, where there is one.
      multi_label: also take data whose images have several right labels, like TFDS's imagenet2012_real (Beyer et al.,
        2020); images without any are left out.
      val_share: the share of each class that a folder without splits holds out as val.
      reader: who will read the data, for messages.
    Raises:
      InputError: nothing usable lies there, or its labels are not those of the model.
    """
    if data == "digits":
        source = _open_digits(split)
    elif str(data).startswith("tfds:"):
        source = _open_tfds(str(data).removeprefix("tfds:"), split, data_dir, classes, multi_label, reader)
    else:
        source = _open_folder(path_of(data), split, classes, val_share, reader)
    # A list names no classes: its largest label only bounds how many there are.
    exact = source.classes is not None
    if num_classes and (source.num_classes > num_classes or (exact and source.num_classes < num_classes)):
        raise InputError(
            f"the data {data} has {source.num_classes} classes, but {reader.owner} has {num_classes}; {reader.advice}"
        )
    if exact and classes is not None and tuple(classes) != source.classes:
        raise InputError(
            f"the data {data} has other classes than {reader.owner}, like {source.classes[0]} for {classes[0]}; "
            f"{reader.advice}"
        )
    if num_classes and data != "digits":
        notes = (*source.notes, *_notes_on_numbers(data, source.classes, classes, reader))
        return dataclasses.replace(source, notes=notes)
    return source


def _open_tfds(name, split, data_dir, classes, multi_label, reader):
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
    split = _choose_split(split, f"the data set {name}", info.splits, reader)
    # TFDS's own parsing makes an array of every feature, which takes as long as half the decoding of an image.
    try:
        records = builder.as_data_source(split, deserialize_method=tfds.core.decode.DeserializeMethod.RAW_BYTES)
        size = len(records)
    except Exception as error:  # ArrayRecord and TFDS raise several kinds for missing, cut and empty shards.
        raise InputError(f"split {split} of the data set {name} is damaged or empty; prepare it again") from error
    named = labels._int2str is not None  # TFDS makes up names of labels that have none: their numbers.
    own = tuple(labels.names)
    # Without names of its own, the data's numbers are the labels.
    classes = own if classes is None or not named else tuple(classes)
    rank = _rank(own if named else (), classes, f"the data set {name}", reader)
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
        return called, image, [rank[own[label]] for label in found] if named else found

    def all_labels():
        return [
            parsed(index)[2]
            for index in progress.follow(range(size), total=size, unit="image", description="reading labels")
        ]

    def read(index):
        called, image, (label,) = parsed(index)
        return Example(called, image, label)

    traits = _traits_of_shards(info, info.splits[split])
    known = {"num_classes": len(classes), "classes": classes if named else None}
    known |= {"labels_at_hand": False, "traits": lambda: traits}
    if truth == "label":
        return Source(size, read, labels=lambda: (label for (label,) in all_labels()), **known)

    return _open_judged(f"split {split} of {name}", parsed, all_labels(), known)


def _traits_of_shards(info, split):
    """Return what tells a split of a TFDS data set from another one: its name, version, size and shards."""
    shards = tuple(map(int, split.shard_lengths))
    return (info.full_name, split.name, int(split.num_bytes), shards)


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

    def traits():
        return ((f"digit{number:04d}", 64, int(label)) for number, label in zip(chosen, labels, strict=True))

    return Source(len(chosen), read, 10, tuple("0123456789"), labels.tolist, traits=traits)


def _open_folder(place, split, classes, val_share, reader):
    inventory = open_folder(place, split, val_share=val_share)
    split = _choose_split(split, str(place), inventory.splits, reader)
    part = inventory.splits[split]()
    entries, labels = part.entries, [entry.label for entry in part.entries]
    if part.classes is not None:
        classes = part.classes if classes is None else tuple(classes)
        rank = _rank(part.present, classes, f"{place}/{split}", reader)
        labels = [rank[part.classes[label]] for label in labels]

    def read(index):
        return Example(entries[index].name, entries[index].location.read(), labels[index])

    def traits():
        return ((entry.name, entry.location.length(), label) for entry, label in zip(entries, labels, strict=True))

    return Source(
        len(entries),
        read,
        part.num_classes if part.classes is None else len(classes),
        None if part.classes is None else classes,
        lambda: labels,
        notes=(*inventory.notes, *part.notes, *describe_skipped(inventory.place, inventory.skipped, part.skipped)),
        skipped=inventory.skipped.total + part.skipped.total,
        traits=traits,
    )


def _choose_split(split, what, splits, reader):
    """Return the split asked for, large and small letters alike, or the first of the usual evaluation splits."""
    if split in splits:
        return split
    alike = [name for name in splits if split is not None and name.casefold() == split.casefold()]
    found = next((name for name in EVAL_SPLITS if split is None and name in splits), None) or (alike or [None])[0]
    if found is None:
        others = f"it has {', '.join(sorted(splits))}; name another with `{reader.split}`"
        wanted = f"none of the splits {', '.join(EVAL_SPLITS)}" if split is None else f"no split {split!r}"
        raise InputError(f"{what} has {wanted}; {others if splits else 'it holds no images in a form that is known'}")
    return found


def _rank(present, classes, what, reader):
    """Return {class name: label}. Raises InputError if a class that is present is none of the classes."""
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


def _notes_on_numbers(data, own, model, reader):
    """Return a warning where the names of one side are numbers and the other side has labels without names.

    Args:
      data: what the data is called.
      own: the names of its classes, or None.
      model: those of the model that will read it, or None.
      reader: who that is.
    """
    numbers = own or model
    if not numbers or (own and model) or not are_numbers(numbers):
        return ()
    unnamed = f"{reader.owner}'s labels" if own else "the data's labels"
    pairs = ", ".join(f"{label} is class {name}" for label, name in enumerate(numbers[:3]))
    text = f"the classes of {data} are numbers, but {unnamed} have no names: taken by their order, label {pairs}"
    return (Note(logging.WARNING, f"{text}{', ...' if len(numbers) > 3 else ''}"),)
