"""Labelled images by position: TFDS data sets, class folders, MMPretrain's lists, the digits inside scikit-learn."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..cli import progress
from ..errors import InputError
from ..files import path_of, read_file, require_plain

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
    """Opens what `--data` names.

    Args:
      data: "digits", "tfds:NAME" or a folder, with `<split>/<class>/<image>` or `meta/<split>.txt`.
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
            f"once: python -m shufflenet_jax prepare --source {builder.data_path} --name {name} --out DIR "
            "and give --data-dir DIR"
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
        return [parsed(index)[2] for index in progress(iterable=range(size), unit="image", desc="reading labels")]

    def read(index):
        called, image, (label,) = parsed(index)
        return Example(called, image, label)

    known = {"num_classes": len(classes), "classes": classes if labels.names else None}
    if truth == "label":
        return Source(size, read, labels=lambda: (label for (label,) in all_labels()), **known)

    truths = all_labels()
    judged, most = [index for index, found in enumerate(truths) if found], max(map(len, truths))
    if not judged:
        raise InputError(f"no image of {name}, split {split}, has a label; choose another split")

    def read_several(index):
        called, image, found = parsed(judged[index])
        return Example(called, image, np.int32(found + [-1] * (most - len(found))))

    return Source(len(judged), read_several, labels=lambda: chain(*truths), label_shape=(most,), **known)


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
            f"no data set {name} in {root.parent}; name its place with --data-dir, or make it with "
            f"python -m shufflenet_jax prepare --source S --name {name} --out {root.parent}"
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


def _open_folder(root, split, classes):
    if not root.is_dir():
        raise InputError(f"no data at {root}; give 'digits' or a folder of images")
    path_of(root / (split or ""))
    split = _choose_split(
        split, str(root), lambda name: (root / name).is_dir() or (root / "meta" / f"{name}.txt").is_file()
    )
    listing = root / "meta" / f"{split}.txt"
    return _open_list(listing, root / split) if listing.is_file() else _open_classes(root / split, classes)


def _choose_split(split, what, exists):
    """The split asked for, or the first of the usual evaluation splits that exists."""
    if split is not None:
        if not exists(split):
            raise InputError(f"{what} has no split {split!r}; name another with --split")
        return split
    found = next(filter(exists, EVAL_SPLITS), None)
    if found is None:
        raise InputError(f"{what} has none of the splits {', '.join(EVAL_SPLITS)}; name one with --split")
    return found


def _rank(present, classes, what):
    """{class name: label}. Raises InputError if a class that is present is none of the classes."""
    rank = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(present) - set(rank))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(f"{what} has classes that the model does not know: {', '.join(unknown[:3])}{more}; {ADVICE}")
    return rank


def _open_list(listing, folder):
    """MMPretrain's form: a line `file label` for each image below the split's folder."""
    names, labels = [], []
    for number, line in enumerate(_read_file(listing).decode(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal() or len(label) > 7:
            raise InputError(f"line {number} of {listing} is not 'file label' with a label from 0 to 9999999")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise InputError(f"{listing} lists no images")

    def read(index):
        return Example(names[index], _read_file(folder / names[index]), labels[index])

    return Source(len(names), read, max(labels) + 1, None, lambda: labels)


def _open_classes(folder, classes):
    """One folder a class; `classes` decides the labels, also of data that holds only some of them."""
    present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes = tuple(present) if classes is None else tuple(classes)
    rank = _rank(present, classes, str(folder))
    files = [
        (path.relative_to(folder).as_posix(), rank[name])
        for name in present
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise InputError(f"{folder} holds no images in class folders, <class>/<image>")

    def read(index):
        name, label = files[index]
        return Example(name, _read_file(folder / name), label)

    return Source(len(files), read, len(classes), classes, lambda: (label for _, label in files))


def _read_file(path):
    try:
        return read_file(path_of(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
