"""Cases of inputs as people have them: folders, archives, images, checkpoints of other programs, and what shapes cannot
show. Most are odd but sound, and then the result must be the right one; the others are damaged besides."""

import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
import unicodedata
import warnings
import zipfile
from collections import defaultdict, deque

import numpy as np
import torch
from conftest import lively_network
from image_files import random_file
from small_training import few_units

from shufflenet_jax.config import PREPROCESSING
from shufflenet_jax.data.labels import validation_wnids
from shufflenet_jax.data.trees import IMAGE_SUFFIXES
from shufflenet_jax.porting import dialects

from . import mutations
from .cases import figures_are, json_of, predicted, same_tensors, tensors_in
from .originals import CLASSES, TRAINING

IGNORED = (
    *(".DS_Store", "._0.jpg", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/0.jpg", "@eaDir/0.jpg/SYNOFILE.jpg"),
    *("__MACOSX/._0.jpg", ".git/objects/0.png", "notes.txt", "README", "0.jpg.xml", "labels.csv", "0.jpg~", "a.mp4"),
)
TOPS = ("pets", "a b", "größe", "猫と犬", "x/y/z", "data.v1", "[1]", "-", "50%", "e\u0301te\u0301")
PLACES = ("", "val", "train", "val/kind0", "val/kind3", "train/kind5")


# Folders


def ignored_files(scene, root):
    """Hidden, system and other files beside the images."""
    name = f"{scene.rng.choice(PLACES)}/{scene.rng.choice(IGNORED)}".lstrip("/")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(scene.rng.choice((b"", b"no image", (root / "val/kind0/6.png").read_bytes())))
    return name


def loops(scene, root):
    """A link to a folder around it."""
    place = root / scene.rng.choice(PLACES)
    link = place / f"loop{scene.rng.randrange(100)}"
    if not os.path.lexists(link):
        link.symlink_to(scene.rng.choice((".", place.resolve(), root.parent.resolve())))
    return f"a loop in {place.name}"


def broken_links(scene, root):
    """A link that leads nowhere, or in a circle."""
    link = root / scene.rng.choice(PLACES) / f"gone{scene.rng.randrange(100)}.jpg"
    if not os.path.lexists(link):
        link.symlink_to(scene.rng.choice(("nowhere.jpg", link.name, "/no/such/place.png")))
    return f"a broken link {link.name}"


def moved_images(scene, root):
    """An image that lies elsewhere, with a link in its place."""
    image = scene.rng.choice(sorted(root.glob("*/kind*/*.*")))
    if image.is_symlink() or not image.is_file():
        return "nothing moved"
    _leave_a_link(scene, image)
    return f"{image.name} is a link"


def moved_folders(scene, root):
    """A class that lies elsewhere, with a link in its place."""
    folder = root / f"val/kind{scene.rng.randrange(6)}"
    if folder.is_symlink() or not folder.is_dir():
        return "nothing moved"
    _leave_a_link(scene, folder)
    return f"{folder.name} is a link"


def _leave_a_link(scene, path):
    aside = scene.inputs / f"aside{len(list(scene.inputs.iterdir()))}"
    path.rename(aside)
    path.symlink_to(aside)


def empty_folders(scene, root):
    """A class without images."""
    (root / f"val/kind{scene.rng.randrange(6, CLASSES)}").mkdir(exist_ok=True)
    return "an empty class"


HARMLESS = (
    ignored_files,
    ignored_files,
    ignored_files,
    loops,
    broken_links,
    moved_images,
    moved_folders,
    empty_folders,
)


def lists(scene, root):
    """Lists of the images, in many ways to write and to mistake them."""
    names = sorted(str(path.relative_to(root / "val")) for path in (root / "val").glob("kind*/*.*"))
    lines = [f"{name} {name[4]}" for name in names]
    place = scene.rng.randrange(len(lines))
    kinds = {
        "with a mark and CRLF": lambda: "\ufeff" + "\r\n".join(lines),
        "with tabs": lambda: "\n".join(line.replace(" ", "\t") for line in lines),
        "of other labels": lambda: "\n".join(f"{name} {5 - int(name[4])}" for name in names),
        "of some images": lambda: "\n".join(lines[: place + 1]),
        "with a line twice": lambda: "\n".join([*lines, lines[place]]),
        "with two labels of an image": lambda: "\n".join([*lines, f"{names[place]} 7"]),
        "with an image that is not there": lambda: "\n".join([*lines, "kind0/none.jpg 0"]),
        "with the split in its names": lambda: "\n".join(f"val/{line}" for line in lines),
        "with absolute names": lambda: "\n".join(f"{root / 'val'}/{line}" for line in lines),
        "without labels": lambda: "\n".join(names),
        "with names as labels": lambda: "\n".join(f"{name} kind{name[4]}" for name in names),
        "with commas": lambda: "\n".join(line.replace(" ", ",") for line in lines),
        "with a label of millions": lambda: "\n".join([*lines[1:], f"{names[0]} 9999999"]),
        "in UTF-16": lambda: "\n".join(lines),
        "of nothing": lambda: "\n \n",
    }
    kind = scene.rng.choice(list(kinds))
    (root / "meta").mkdir(exist_ok=True)
    (root / "meta/val.txt").write_text(kinds[kind](), encoding="utf-16" if "UTF-16" in kind else "utf-8")
    return f"a list {kind}"


def odd_classes(scene, root):
    """A class folder with an odd name, or one that another class has but for case, spaces or Unicode form."""
    name = scene.rng.choice(
        (" kind0", "KIND1", "kind1 ", "kin\u017f", " ", "a\nb", "x" * 250, "-", "--split", os.fsdecode(b"kind\xff"),
         "é", "\u202egnp", "con", "meta", "val", "train", "0", "01", "kind0.jpg", "~", "*", "$HOME", "\ufeffkind0")
    )  # fmt: skip
    target = root / "val" / name
    if not os.path.lexists(target):
        (root / "val/kind5").rename(target)
    return f"a class {name[:20]!r}"


def equal_but_for_form(scene, root):
    """Two classes whose names differ in their Unicode form alone."""
    for split, form in (("train", "NFC"), (scene.rng.choice(("train", "val")), "NFD")):
        (root / split / unicodedata.normalize(form, "café")).mkdir(exist_ok=True)
    return "café in two forms"


def flat(scene, root):
    """<class>/<image> without splits."""
    shutil.rmtree(root / "train")
    for path in sorted((root / "val").iterdir()):
        if not os.path.lexists(root / path.name):
            path.rename(root / path.name)
    shutil.rmtree(root / "val")
    return "no splits"


def flat_split(scene, root):
    """A split without class folders; ImageNet's has labels."""
    names = sorted((root / "val").glob("*/*.jpg"))
    known = scene.rng.random() < 0.5
    for number, path in enumerate(names, start=1):
        path.rename(root / "val" / (f"ILSVRC2012_val_{number:08}.JPEG" if known else path.name))
    for folder in [path for path in (root / "val").iterdir() if path.is_dir()]:
        mutations.remove(folder)
    if known and scene.rng.random() < 0.5:
        rows = [f"ILSVRC2012_val_{i:08},{validation_wnids()[i - 1]} 1 2 3 4" for i in range(1, len(names) + 1)]
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))
        if scene.rng.random() < 0.5:
            scene.say(mutations.damage_file(scene.rng, root / "LOC_val_solution.csv"))
    return f"val without classes{', named as ImageNet' if known else ''}"


def other_splits(scene, root):
    """Splits of other names, or several of one."""
    name = scene.rng.choice(("valid", "Val", "VALIDATION", "test", "fold1", "dev", "train2", "val.old", "kind0", "a b"))
    (root / "val").rename(root / name)
    return f"val is called {name}"


def kaggles(scene, root):
    """The tree of Kaggle's ImageNet, or a part of it."""
    inside = root / scene.rng.choice(("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data", "CLS-LOC"))
    inside.mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).rename(inside / split)
    (root / "ILSVRC/ImageSets").mkdir(parents=True, exist_ok=True)
    return f"all in {inside.relative_to(root)}"


def entries(scene, root):
    """Something else in the place of a file or folder."""
    return mutations.damage_entry(scene.rng, scene.rng.choice(sorted(p for p in root.rglob("*") if not p.is_symlink())))


def pipes(scene, root):
    """What is neither file nor folder, called like an image."""
    link = root / "val/kind0/pipe.jpg"
    scene.rng.choice((lambda: os.mkfifo(link), lambda: link.symlink_to("/dev/zero"), lambda: link.symlink_to("/dev")))()
    return "a pipe or a device"


def deep(scene, root):
    """Folders far down."""
    folder = root / "val/kind0" / "/".join(["d"] * 150)
    folder.mkdir(parents=True)
    (root / "val/kind1/7.jpg").rename(folder / "7.jpg")
    return "an image far down"


PACKED = (
    lists,
    lists,
    lists,
    odd_classes,
    odd_classes,
    equal_but_for_form,
    flat,
    flat_split,
    other_splits,
    kaggles,
    deep,
)
ODD = (*PACKED, entries, entries, pipes)


def odd_folder(scene, chance, harmless=HARMLESS, odd=ODD):
    """(A folder of images, whether it must give the figures of the images as they are)."""
    root = scene.copy(scene.originals.images(), "set")
    for _ in range(scene.rng.choice((1, 2, 3, 5))):
        scene.say(scene.rng.choice(harmless)(scene, root))
    sound = scene.rng.random() < chance
    if not sound:
        scene.say(scene.rng.choice(odd)(scene, root))
    if scene.rng.random() < 0.3:
        top = scene.inputs / "outer" / scene.rng.choice(TOPS)
        top.parent.mkdir(parents=True)
        root.rename(top)
        scene.say(f"in {top.relative_to(scene.inputs / 'outer')}")
        root = scene.inputs / "outer"
    return root, sound


def folder_used(scene):
    root, sound = odd_folder(scene, 0.4)
    if scene.rng.random() < 0.15:
        return scene.case(
            "predict", root, "--checkpoint", scene.originals.model(), "--json", right=predicted, images=50
        )
    return data_used(scene, root, sound)


def data_used(scene, place, sound):
    """A command on a folder or archive; where it is sound, the right figures are those of the images as they were."""
    command = scene.rng.choice(("eval", "eval", "verify", "prepare", "train"))
    statuses = (0,) if sound else (0, 2)
    if command == "eval":
        expected = json.loads(scene.originals.figures().read_text()) if sound else None

        def right(answer, again):
            return figures_are(expected, json_of(answer)["images"])(answer, again)

        words = ("eval", "--checkpoint", scene.originals.model(), "--data", place)
        return scene.case(*words, right=right, statuses=statuses)
    if command == "verify":
        split = ("--split", scene.rng.choice(("train", "val"))) if scene.rng.random() < 0.3 else ()
        statuses = (0,) if sound else (0, 1, 2)
        return scene.case("verify", place, *split, statuses=statuses, right=read_alike(scene, place, split))
    if command == "train":
        words = ("train", *TRAINING, "--data", place, "--workdir", scene.out / "run", "--print-schedule")
        return scene.case(*words, talks=True, may_change=("run.*",), statuses=statuses)
    options = ["--skip-damaged"] if scene.rng.random() < 0.4 else []
    words = ("prepare", "--source", place, "--name", "pets", "--out", scene.out, "--processes", 1, *options)
    may_change = ("pets", r"pets/1\.\d\.\d\.incomplete.*")
    return scene.case(*words, right=stored_alike(scene, place), may_change=may_change, statuses=statuses)


def read_alike(scene, place, split):
    """Evaluation must see as many images as verify does, or refuse the classes."""

    def right(answer, again):
        other = again("eval", "--checkpoint", scene.originals.model(), "--data", place, *split)
        counts = json_of(answer)["images"], json_of(other)["images"] if other.status == 0 else None
        return [] if counts[1] in (counts[0], None) else [f"verify sees {counts[0]} images, eval {counts[1]}"]

    return right


def stored_alike(scene, place):
    """The data set that prepare makes must give each split as the source does."""

    def right(answer, again):
        made = {k: v for k, v in json_of(answer).items() if k not in ("name", "folder")}
        left_out = made.pop("left_out")
        for split, count in made.items():
            stored = again("verify", "tfds:pets", "--data-dir", scene.out, "--split", split)
            source = again("verify", place, "--split", split)
            if stored.status or json_of(stored)["images"] != count:
                return [f"what was prepared is not whole: {stored.stdout} {stored.stderr}"]
            if source.status == 2 or not 0 <= json_of(source)["images"] - count <= left_out:
                return [f"split {split} has {count} images, but the source {source.stdout} {source.stderr}"]
            if not left_out and json_of(source)["classes"] != json_of(stored)["classes"]:
                return [f"other classes: {source.stdout} {stored.stdout}"]
        return []

    return right


# Archives


def members_of(root):
    """[(name, bytes, or None of a folder)] of a folder, links followed."""
    found = []
    for place, folders, files in os.walk(root, followlinks=True):
        inside = os.path.relpath(place, root)
        prefix = "" if inside == "." else f"{inside}/"
        found += [(f"{prefix}{name}/", None) for name in sorted(folders)]
        for name in sorted(files):
            with open(os.path.join(place, name), "rb") as file:
                found.append((prefix + name, file.read()))
    return sorted(found)


def zip_as_people_pack(scene, members):
    """A zip's bytes. Names are written byte by byte, in one of their code pages."""
    rng = scene.rng
    method = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    form = rng.choice(("UTF-8", "UTF-8 without its flag", "cp437", "cp932", "gbk", "backslashes", "dots"))
    scene.say(f"zip, method {method}, {form}")
    renamed, buffer = [], io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo()
            name = {"backslashes": name.replace("/", "\\"), "dots": f"./{name}"}.get(form, name)
            raw = name.encode({"cp437": "cp437", "cp932": "cp932", "gbk": "gbk"}.get(form, "utf-8"), "replace")
            info.filename = raw.decode() if form == "UTF-8" or raw.isascii() else ""
            if not info.filename:
                # zipfile would say that it is UTF-8: a stand-in of the same length gives way to the bytes.
                info.filename = f"{len(renamed):03x}".ljust(len(raw), "~")
                renamed.append((info.filename.encode(), raw))
            info.compress_type = method
            archive.writestr(info, b"" if content is None else content)
    data = buffer.getvalue()
    for stand_in, raw in renamed:
        data = data.replace(stand_in, raw)
    return data


def tar_as_people_pack(scene, members):
    """A tar's bytes."""
    rng = scene.rng
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    if max(len(os.fsencode(name)) for name, _ in members) > 90:
        form = tarfile.PAX_FORMAT  # The oldest form has no place for them.
    prefix = rng.choice(("", "", "./"))
    squeeze = rng.choice((None, gzip.compress, bz2.compress, lzma.compress))
    scene.say(f"tar, format {form}, {squeeze.__module__ if squeeze else 'plain'}")
    buffer, linked = io.BytesIO(), None
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(prefix + name.rstrip("/"))
            if content is None:
                info.type = tarfile.DIRTYPE
            elif linked and content == linked[1]:  # As GNU tar stores further names of one file.
                info.type, info.linkname = tarfile.LNKTYPE, linked[0]
            else:
                info.size, linked = len(content), (info.name, content)
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return squeeze(buffer.getvalue()) if squeeze else buffer.getvalue()


def damage_archive(scene, data):
    """(Other bytes, words for them)."""
    kinds = {
        "twice in a row": lambda: data + data,
        "junk before it": lambda: b"#!/bin/sh\n" + data,
        "junk behind it": lambda: data + b"<html>" + bytes(30),
        "cut in half": lambda: data[: len(data) // 2],
        "compressed once more": lambda: gzip.compress(data),
        "a zip of it": lambda: mutations.zip_of([("inner.zip", data)]),
        "a page instead": lambda: b"<!DOCTYPE html><html><body>Sign in</body></html>",
    }
    if scene.rng.random() < 0.6:
        return mutations.damage_bytes(scene.rng, data)
    kind = scene.rng.choice(list(kinds))
    return kinds[kind](), kind


def archive_used(scene):
    """A folder, packed as people pack, and perhaps damaged; its name says little."""
    whole = [change for change in HARMLESS if change not in (loops, broken_links)]
    root, sound = odd_folder(scene, 0.75, whole, PACKED)
    members = members_of(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of names that come twice.
        data = scene.rng.choice((zip_as_people_pack, tar_as_people_pack))(scene, members)
    if scene.rng.random() < 0.4:
        data, told = damage_archive(scene, data)
        scene.say(told)
        sound = False
    place = scene.inputs / scene.rng.choice(("pets.zip", "pets.tar", "pets.tar.gz", "pets", "größe.zip", "a b.tgz"))
    place.write_bytes(data)
    return data_used(scene, place, sound)


# Images


def image_used(scene):
    """An image in any format, mode, depth and orientation that Pillow writes, and perhaps damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = random_file(scene.rng.randrange(2**32))
    scene.say(str(file))
    folder = scene.inputs / "set"
    path = folder / f"val/kind0/0{scene.rng.choice(sorted(IMAGE_SUFFIXES))}"
    path.parent.mkdir(parents=True)
    path.write_bytes(file.data)
    if scene.rng.random() < 0.45:
        scene.say(mutations.damage_file(scene.rng, path))
    model = scene.originals.model()
    command = scene.rng.choice(("predict", "predict", "verify", "prepare", "eval"))

    def read_elsewhere(answer, again):
        """All commands must take an image that one of them takes."""
        others = again("verify", folder), again("predict", path, "--checkpoint", model, "--json")
        return [f"others refuse it: {other.stdout}{other.stderr}" for other in others if other.status]

    if command == "predict":
        return scene.case("predict", path, "--checkpoint", model, "--json", right=read_elsewhere)
    if command == "verify":
        return scene.case("verify", folder, statuses=(0, 1), right=read_elsewhere)
    if command == "eval":
        return scene.case("eval", "--checkpoint", model, "--data", folder, right=read_elsewhere)
    options = ["--short-edge", scene.rng.choice((1, 20, 100))] if scene.rng.random() < 0.7 else []
    words = ("prepare", "--source", folder, "--name", "pets", "--out", scene.out, "--processes", 1, *options)
    return scene.case(*words, right=read_elsewhere, may_change=("pets", r"pets/1\.\d\.\d\.incomplete.*"))


# Checkpoints

PREFIXES = ("", "", "module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "a.b.c.", "learner.encoder.0.")
KEYS = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "student", "params", "0")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_state", "averaged_model")


class AttributeDict(dict):
    """A dict of its own class, as Lightning keeps its settings."""


def beside(scene):
    """What trainings keep beside the weights, without names of weights or averages."""
    rng = scene.rng
    given = {
        "epoch": rng.randrange(300),
        "args": argparse.Namespace(lr=0.1, data="/data"),
        "hyper_parameters": AttributeDict(lr=0.1),
        "log": defaultdict(list, loss=[1.0, 0.5]),
        "last": deque([1, 2], maxlen=5),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "best": np.float64(71.5),
        "meta": {"CLASSES": [f"kind{i}" for i in range(CLASSES)], "time": "today"},
        "class_to_idx": {f"kind{i}": i for i in range(CLASSES)},
        "rng": torch.get_rng_state(),
        "nothing": None,
    }
    return {key: given[key] for key in rng.sample(list(given), rng.randrange(5))}


def changed(tensors):
    """Averages: near the weights, but other numbers."""
    return {key: tensor + 0.25 if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def wrapped(scene, tensors, averages):
    """(What a training saves around tensors, whether the averages are to be taken)."""
    rng = scene.rng
    prefix, key = rng.choice(PREFIXES), rng.choice(KEYS)
    inside = {prefix + name: tensor for name, tensor in tensors.items()}
    if rng.random() < 0.2:
        inside |= {f"{prefix}total_ops": torch.zeros(1), f"{prefix}total_params": torch.zeros(1)}
    words, content = [f"prefix {prefix!r}"], inside
    if rng.random() < 0.8:
        content = {key: inside, **beside(scene)}
        words.append(f"in {key}")
    ema = False
    if rng.random() < 0.35 and content is not inside:
        name = rng.choice(AVERAGES)
        counter = {"n_averaged": torch.tensor(3)} if rng.random() < 0.5 else {}
        content[name] = counter | {f"module.{k}": v for k, v in averages.items()}
        ema = rng.random() < 0.5
        words.append(f"{name}{' wanted' if ema else ''}")
    if rng.random() < 0.15:
        content = rng.choice(({"checkpoint": content}, (3, content), [content]))
        words.append("in another container")
    scene.say(", ".join(words))
    return content, ema


def whole_module(scene, dialect):
    """A pickled network, alone or in a dict."""
    with few_units():
        network = lively_network(dialect, num_classes=CLASSES)
    module = scene.rng.choice((network, torch.nn.DataParallel(network)))
    scene.say(f"a whole {type(module).__name__}")
    return scene.rng.choice((module, {"model": module, "epoch": 3}))


def wild_checkpoint(scene):
    """A checkpoint as other programs save it, and perhaps damaged."""
    rng = scene.rng
    dialect = rng.choice(list(dialects.DIALECTS))
    tensors = torch.load(scene.originals.torch_file(dialect, "zip"), weights_only=True)
    tensors = tensors.get("state_dict", tensors)
    averages, ema = changed(tensors), False
    path = scene.inputs / rng.choice(("net.pth", "last.ckpt", "checkpoint.pth.tar", "model_best.pt", "weights"))
    chance, sound = rng.random(), True
    scene.say(dialect)
    if chance < 0.12:
        content = whole_module(scene, dialect)
    elif chance < 0.25:  # One fault in the tensors, or something else in their place.
        damaged, told = mutations.damage_tensors(rng, tensors, scene.canary)
        scene.say(told)
        content = {rng.choice(KEYS): damaged, **beside(scene)}
        sound = False
    else:
        content, ema = wrapped(scene, tensors, averages)
    zipped = rng.random() < 0.75
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if rng.random() < 0.25:
        scene.say(mutations.damage_file(rng, path))
        sound = False
    elif zipped and rng.random() < 0.08:
        data, told = mutations.damage_torch_zip(rng, path.read_bytes(), scene.canary)
        path.write_bytes(data)
        scene.say(told)
        sound = False
    model, back = scene.out / "model", scene.out / "back.pth"

    def right(answer, again):
        if not sound:
            return []
        returned = again("convert-back", model, "--dialect", dialect, "--out", back)
        if returned.status:
            return [f"what was written cannot be read: {returned.stderr}"]
        expected = {dialects.bare(key): tensor for key, tensor in (averages if ema else tensors).items()}
        return [] if same_tensors(expected, tensors_in(back)) else ["other tensors than the file's"]

    # A module whose pickle needs more than its weights is refused; all else that is sound has them.
    statuses = (0,) if sound and (zipped or chance >= 0.12) else (0, 2)
    options = ["--no-verify", *(["--ema"] if ema else [])]
    return scene.case("convert", path, "--out", model, *options, right=right, statuses=statuses, talks=True)


# What shapes cannot show


def stated(scene):
    """A conversion with statements about the network, of which some cannot be."""
    rng = scene.rng
    dialect = rng.choice(("torchvision", "torchvision", "mmpretrain", "megvii"))
    path = scene.copy(scene.originals.torch_file(dialect, "zip"), "net.pth")
    scene.say(dialect)
    words, expected = [], {}
    if rng.random() < 0.5:
        expected["small_stem"] = rng.random() < 0.6
        words.append("--small-stem" if expected["small_stem"] else "--no-small-stem")
    if rng.random() < 0.5:
        words += ["--preprocessing", rng.choice([*PREPROCESSING, "timm", ""])]
    if rng.random() < 0.5:
        side = rng.choice((1, 7, 32, 33, 64, 160, 224, 10_000, 0, -3, 10_001, 2**31, "224x224", "", "1e2"))
        words += ["--image-size", side]
        expected["resolution"] = [side, side]
    if rng.random() < 0.5:
        words += ["--classes", scene.inputs / "names.txt"]
        names = [f"{rng.choice(('kind', 'größe', 'a b', '猫'))}{i}" for i in range(rng.choice((10, 10, 10, 9, 11, 0)))]
        text = rng.choice(("\n", "\r\n")).join(names) + rng.choice(("", "\n"))
        (scene.inputs / "names.txt").write_bytes(rng.choice(("", "\ufeff")).encode() + text.encode())
        if rng.random() < 0.4:
            scene.say(mutations.damage_file(rng, scene.inputs / "names.txt"))
    scene.say(" ".join(str(word) for word in words).replace(str(scene.inputs), ""))
    model = scene.out / "model"

    def right(answer, again):
        told = again("info", "--checkpoint", model, "--json")
        if told.status:
            return [f"what was written cannot be read: {told.stderr}"]
        found = json_of(told)
        wrong = {key: found[key] for key, value in expected.items() if found[key] != value}
        return [f"stated {expected}, but it is {wrong}"] if wrong else []

    return scene.case("convert", path, "--out", model, "--no-verify", *words, right=right, talks=True)


def held_out(scene):
    """Shares to hold out of a folder without splits, of which some cannot be."""
    root = scene.copy(scene.originals.images(), "set")
    scene.say(flat(scene, root))
    share = scene.rng.choice((0.2, 0.5, 0.01, 0.99, 0, 1, -1, "nan", "inf", "", "20%", "1e-300", "0.3"))
    scene.say(f"a share of {share!r}")
    command = scene.rng.choice(("verify", "prepare", "eval", "train"))
    argv = {
        "verify": ("verify", root),
        "prepare": ("prepare", "--source", root, "--name", "pets", "--out", scene.out, "--processes", 1),
        "eval": ("eval", "--checkpoint", scene.originals.model(), "--data", root),
        "train": ("train", *TRAINING, "--data", root, "--workdir", scene.out / "run", "--print-schedule"),
    }[command]
    talks = command == "train"

    def right(answer, again):
        if command == "train":
            return []
        found = json_of(answer)
        count = found["val"] if command == "prepare" else found["images"]
        return [] if count == 6 else [f"{count} images instead of one of each class"]

    return scene.case(*argv, "--val-share", share, right=right, talks=talks, may_change=("run.*",))


WILD = {  # name: (how often, what makes it)
    "folder used": (9, folder_used),
    "archive used": (9, archive_used),
    "image used": (8, image_used),
    "wild checkpoint": (8, wild_checkpoint),
    "stated": (4, stated),
    "held out": (2, held_out),
}
