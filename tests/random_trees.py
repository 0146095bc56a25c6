"""Random folders of images as people have them, what each holds, and a check that every reader sees just that."""

import io
import os
import random
import shutil
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from shufflenet_jax.data.folders import find_images
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.preparation import dataset
from shufflenet_jax.preparation.contents import read_contents
from shufflenet_jax.preparation.records import StoreOptions

WORDS = (
    "cat",
    "Dog",
    "a b",
    "größe",
    "猫",
    "n01440764",
    "x.y",
    "50%",
    "it's",
    "#1",
    "[x]",
    "-",
    "🐈",
    "train_2",
    "meta2",
)
NUMBERS = ("0", "1", "2", "9", "10", "11", "100", "-3", "2.5")
FILES = (
    "0.jpg",
    "10.jpg",
    "9.JPG",
    "ö.jpeg",
    "a b.JpEg",
    "#.png",
    "x.tar.jpg",
    "[1].webp",
    "deep/1.jpg",
    "deep/er/1.bmp",
    "1.jfif",
)
DISK_FILES = ("back\\slash.jpg", "line\nbreak.jpg", os.fsdecode(b"bytes\xff.jpg"))
HIDDEN = (
    ".DS_Store",
    "._0.jpg",
    ".git/a.jpg",
    "@eaDir/0.jpg/THUMB.jpg",
    "Thumbs.db",
    "desktop.ini",
    ".ipynb_checkpoints/0.jpg",
)
OTHERS = ("notes.txt", "README", "labels.csv", "0.jpg.xml", "sound.wav")
FORMS = ("folder", "folder", "folder", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz")


def _encoded():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _encoded()


def image(number):
    """A JPEG that differs from that of any other number."""
    text = str(number).encode()
    return JPEG[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + JPEG[2:]


@dataclass
class Sample:
    """A random folder or archive, and what it holds."""

    place: Path
    splits: dict = field(default_factory=dict)  # {split: [(name, label, bytes)]}; of a flat folder all is in "".
    files: dict = field(default_factory=dict)  # {path: bytes}
    folders: set = field(default_factory=set)  # Empty ones.
    ignored: int = 0

    def add(self, path, data):
        self.files[path] = data
        return data


def make(seed, root):
    """Write a random Sample below a new folder."""
    rng = random.Random(seed)
    form = rng.choice(FORMS)
    sample = Sample(root / ("set" if form == "folder" else f"set.{form}"))
    names = FILES + (DISK_FILES if form == "folder" else ())
    words = rng.choice((WORDS, WORDS, NUMBERS))
    classes = rng.sample(words, rng.randint(2, 5))
    top = rng.choice(("", "", "pets/", "a/b/"))
    if rng.random() < 0.35:
        _add_classes(rng, sample, top, "", classes, names, fewest=2)
    else:
        _add_splits(rng, sample, top, classes, names)
    _add_ignored(rng, sample, top)
    _write(rng, sample, root, form, top)
    return sample


def ranked(classes):
    """The classes in the order of labels, decided in another way than by the library."""
    if all(name in NUMBERS for name in classes):
        return sorted(classes, key=float)
    return sorted(classes)


def _add_classes(rng, sample, top, split, classes, names, *, fewest=0, labels=None):
    """Add class folders; returns the paths of their images."""
    labels = labels or ranked(classes)
    rows = []
    for name in ranked(classes):
        count = max(rng.randint(fewest, 6), int(not rows))
        chosen = sorted(rng.sample(names, count), key=lambda path: tuple(path.split("/")))
        if not chosen:
            sample.folders.add(f"{top}{split}{name}")
        for path in chosen:
            data = sample.add(f"{top}{split}{name}/{path}", image(len(sample.files)))
            rows.append((f"{name}/{path}", labels.index(name), data))
    sample.splits[split.rstrip("/")] = rows


def _add_splits(rng, sample, top, classes, names):
    splits = rng.sample(("train", "val", "test", "validation"), rng.randint(1, 3))
    listed = [split for split in splits if rng.random() < 0.3]
    folders = [split for split in splits if split not in listed]
    if folders:
        # In whose folders all classes are, so that the order does not depend on the others.
        full = "train" if "train" in folders else next(s for s in ("val", "validation", "test") if s in folders)
        for split in folders:
            some = classes if split == full else rng.sample(classes, rng.randint(1, len(classes)))
            _add_classes(rng, sample, top, f"{split}/", some, names, labels=ranked(classes))
    for split in listed:
        _add_list(rng, sample, top, split, [name for name in names if "\n" not in name])


def _add_list(rng, sample, top, split, names):
    rows, lines = [], []
    for path in rng.sample(names, rng.randint(1, len(names))):
        name = f"{rng.choice(('x/', '', 'y z/'))}{path}"
        data = sample.add(f"{top}{split}/{name}", image(len(sample.files)))
        if rng.random() < 0.8 or not rows:
            rows.append((name, rng.randrange(2), data))
            lines.append(
                os.fsencode(f"{name} {rows[-1][1]}{rng.choice(('', ' '))}{rng.choice((chr(10), chr(13) + chr(10)))}")
            )
        else:
            sample.ignored += 1
    sample.files[f"{top}meta/{split}.txt"] = rng.choice((b"", b"\xef\xbb\xbf")) + b"".join(lines)
    sample.splits[split] = rows


def _add_ignored(rng, sample, top):
    """Put hidden and other files beside the images, also where there are none."""
    places = sorted(
        {str(PurePosixPath(path).parent) for path in sample.files if "/meta/" not in f"/{path}"} | {top or "."}
    )
    for _ in range(rng.randint(0, 6)):
        path = f"{rng.choice(places)}/{rng.choice(HIDDEN + OTHERS)}".removeprefix("./")
        if path not in sample.files:
            sample.files[path] = b"no image"
            sample.ignored += 1
    if rng.random() < 0.2:
        sample.files[f"{top}tables/labels.csv"] = b"no image"
        sample.ignored += 1
    if rng.random() < 0.3:
        sample.files["__MACOSX/._set"] = b"no image"
        sample.ignored += 1


def _write(rng, sample, root, form, top):
    target = root / "set"
    for path in sample.folders:
        (target / path).mkdir(parents=True)
    for path, data in sample.files.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(data)
    if form in ("folder", "zip", "tar"):
        _add_links(rng, sample, root, target, form, top)
    if form == "zip":
        _zip(target, sample.place)
    elif form != "folder":
        with tarfile.open(sample.place, f"w:{form.partition('.')[2]}") as file:
            file.add(target, rng.choice((".", "")))
    if form != "folder":
        shutil.rmtree(target)


def _add_links(rng, sample, root, target, form, top):
    """Put links in the places of some files and folders, and links that lead nowhere or in circles beside them."""
    images = [path for path, data in sample.files.items() if data != b"no image" and "meta/" not in path]
    if form == "folder" and rng.random() < 0.5:  # What lies outside an archive cannot be in it.
        for number, path in enumerate(rng.sample(images, len(images) // 2)):
            aside = root / f"aside{number}"
            (target / path).rename(aside)
            (target / path).symlink_to(aside)
    if form == "folder" and rng.random() < 0.3:
        folder = target / rng.choice([str(PurePosixPath(path).parent) for path in images])
        folder.rename(root / "moved")
        folder.symlink_to(root / "moved")
    if rng.random() < 0.3 and form != "zip":
        folder = (target / rng.choice(images)).parent
        (folder / "loop").symlink_to(rng.choice((".", "..")) if form != "folder" else folder.parent)
    if rng.random() < 0.2:
        ((target / rng.choice(images)).parent / "broken.jpg").symlink_to("nowhere.jpg")
        sample.ignored += 1


def _zip(folder, target):
    """Zip a folder as it is, links and empty folders included."""
    with zipfile.ZipFile(target, "w") as file:
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o120777 << 16
                file.writestr(info, os.readlink(path))
            else:
                file.write(path, name)


def printable(name):
    return name.encode(errors="backslashreplace").decode()


def rows_of(source):
    return [(source[i].name, source[i].label, source[i].image) for i in range(len(source))]


def check(seed, root):
    """Assert that `--data` reads what a random folder holds, and that a prepared data set gives the same.

    Args:
      seed: draws the folder.
      root: a new folder to work in.
    """
    root.mkdir()
    sample = make(seed, root)
    expected = {s: [(printable(n), label, data) for n, label, data in rows] for s, rows in sample.splits.items()}
    contents = read_contents(sample.place)
    if "" in expected:
        assert set(contents.splits) == {"train", "val"}, seed
        found = {split: rows_of(open_source(sample.place, split)) for split in contents.splits}
        assert sorted(found["train"] + found["val"]) == sorted(expected[""]), seed
        for label in {label for _, label, _ in expected[""]}:
            count = sum(row[1] == label for row in expected[""])
            held_out = sum(row[1] == label for row in found["val"])
            assert held_out == max(1, min(count - 1, int(count * 0.2 + 0.5))), seed
            assert found["val"] == [row for row in expected[""] if row in found["val"]], seed
    else:
        found = {split: rows_of(open_source(sample.place, split)) for split in expected}
        assert found == expected, seed
    plan = dataset.plan_images(contents, "pets", root / "out", StoreOptions())
    dataset.write(plan, processes=1)
    for split, rows in found.items():
        assert rows_of(open_source("tfds:pets", split, data_dir=root / "out")) == rows, (seed, split)
    assert contents.skipped == sample.ignored, (seed, contents.notes)
    if sample.place.is_dir():
        seen = [Path(path).read_bytes() for path in find_images(sample.place)[0]]
        assert {data for rows in found.values() for _, _, data in rows} <= set(seen), seed
