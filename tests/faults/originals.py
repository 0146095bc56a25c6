"""Small real inputs of every kind, each made once, when it is first asked for, by the commands themselves."""

import functools
import hashlib
import io
import os
import shutil
import stat
import threading

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds
import torch
from conftest import lively_network
from PIL import Image
from small_training import few_units

from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.preparation.records import features_for

from .mutations import tar_of

CLASSES = 10
TRAINING = ("--config", "digits", "--image-size", "16", "--batch-size", "512", "--steps", "2", "--log-every", "1")


def tree_of(folder):
    """{relative path: what is there} of a file, or of all below a folder; links are not followed."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = os.readlink(path) if stat.S_ISLNK(mode) else stat.filemode(mode)
        found[path.relative_to(folder).as_posix()] = what
    return found


def made_once(make):
    """A method that makes something below `root` on first use; returns where it lies."""

    @functools.wraps(make)
    def place(self, *words):
        key = "-".join([make.__name__, *words])
        with self.lock:
            if key not in self.made:
                make(self, self.root / key, *words)
                self.made[key] = tree_of(self.root / key)
        return self.root / key

    return place


class Originals:
    """The inputs below a folder; `command(*argv)` runs one of ours."""

    def __init__(self, root, command):
        self.root, self.command, self.made, self.lock = root, command, {}, threading.RLock()
        root.mkdir()

    def unchanged(self):
        """Whether all is as it was made."""
        return all(tree_of(self.root / key) == tree for key, tree in self.made.items())

    @made_once
    def torch_file(self, path, dialect, form):
        with few_units():
            tensors = lively_network(dialect, num_classes=CLASSES).state_dict()
        if dialect == "mmpretrain":
            names = tuple(f"kind{i}" for i in range(CLASSES))
            tensors = {"meta": {"CLASSES": names, "epoch": 300}, "state_dict": tensors}
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")

    @made_once
    def model(self, path):
        self.command("convert", self.torch_file("mmpretrain", "zip"), "--out", path, "--no-verify")

    @made_once
    def tensors(self, path):
        self.command("export", self.model(), "--format", "safetensors", "--out", path)

    @made_once
    def images(self, path):
        """Class folders, and a list of the same images in meta/."""
        rng, lines = np.random.default_rng(0), {"train": [], "val": []}
        for split, listed in lines.items():
            for number in range(12):
                name = f"kind{number % 6}/{number}" + (".png" if number % 3 == 0 else ".jpg")
                (path / split / name).parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((50, 40)).save(path / split / name)
                listed.append(f"{name} {number % 6}\n")

    @made_once
    def listed(self, path):
        shutil.copytree(self.images(), path)
        (path / "meta").mkdir()
        for split in ("train", "val"):
            files = sorted((path / split).rglob("*.*"))
            lines = [f"{file.relative_to(path / split)} {file.parent.name[4:]}\n" for file in files]
            (path / "meta" / f"{split}.txt").write_text("".join(lines))

    @made_once
    def records(self, path):
        """The same images as the data set `pets`."""
        self.command("prepare", "--source", self.images(), "--name", "pets", "--out", path, "--processes", 1)

    def members(self):
        """[(name, bytes)] of the images."""
        root = self.images()
        return [(str(file.relative_to(root)), file.read_bytes()) for file in sorted(root.rglob("*.*"))]

    def official(self):
        """{file name: [(name, bytes)]} of small tars in ILSVRC2012's form."""
        images = [content for name, content in self.members() if name.endswith("jpg")]
        wnids = list(imagenet_classes())[:3]
        inner = [(f"{w}.tar", tar_of([(f"{w}_{i}.JPEG", images[i]) for i in range(2)])) for w in wnids]
        named = [(f"ILSVRC2012_val_{i:08}.JPEG", images[i]) for i in range(1, 4)]
        return {"ILSVRC2012_img_train.tar": inner, "ILSVRC2012_img_val.tar": named}

    @made_once
    def tfrecords(self, path):
        """The images of one split as TFDS keeps them in TFRecords."""
        features = features_for(["a", "b"])
        rows = (
            {"image": io.BytesIO(content), "label": i % 2, "file_name": name}
            for i, (name, content) in enumerate(self.members()[:6])
        )
        records = [features.serialize_example(row) for row in rows]
        path.mkdir()
        template = tfds.core.ShardedFileTemplate(data_dir=path, dataset_name="mine", filetype_suffix="tfrecord")
        with open(path / "mine-train.tfrecord-00000-of-00001", "wb") as file:
            for record in records:
                for part in (len(record).to_bytes(8, "little"), record):
                    crc = google_crc32c.value(part)
                    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
                    file.write(part + masked.to_bytes(4, "little"))
        info = tfds.core.SplitInfo("train", [len(records)], sum(map(len, records)), template)
        tfds.folder_dataset.write_metadata(
            data_dir=path,
            features=features,
            split_infos=[info],
            version="1.2.3",
            filename_template=template,
            check_data=False,
        )

    @made_once
    def predictions(self, path):
        target = path.with_suffix(".npz")
        self.command("eval", "--checkpoint", self.model(), "--data", self.images(), "--predictions", target)
        target.rename(path)

    @made_once
    def figures(self, path):
        """The JSON line of an evaluation of the model on the images."""
        answer = self.command("eval", "--checkpoint", self.model(), "--data", self.images())
        path.write_text(answer.stdout.splitlines()[-1])

    @made_once
    def workdir(self, path):
        self.command("train", *TRAINING, "--workdir", path)

    @made_once
    def teacher(self, path):
        """Logits for the training digits."""
        source = open_source("digits", "train")
        labels = np.array([source[i].label for i in range(len(source))])
        names = np.array([source[i].name for i in range(len(source))])
        target = path.with_suffix(".npz")
        np.savez(target, name=names, label=labels, logits=np.eye(10, dtype=np.float32)[labels])
        # What is compiled once is not compiled again where a damaged one turns out to be usable.
        self.command("train", *TRAINING, "--workdir", self.root / "taught", "--teacher", target)
        target.rename(path)
