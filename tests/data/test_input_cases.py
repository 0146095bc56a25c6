"""What people bring along: folders as systems leave them, zips, unusual images and checkpoints of other projects.

An expected failure is a known fault. It is strict: whoever mends the fault takes the mark away.
"""

import dataclasses
import io
import json
import re
import struct
import warnings
import zipfile
from argparse import Namespace
from functools import partial
from pathlib import PurePosixPath

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
from conftest import lively_network
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from small_training import few_units

import shufflenet_jax as snet
from shufflenet_jax import plots
from shufflenet_jax.commands import from_torch, predict, prepare, verify
from shufflenet_jax.config import TORCHVISION_EVAL
from shufflenet_jax.errors import InputError
from shufflenet_jax.recipes import PRESETS

# Fails with an assertion: any other exception is a mistake in the test, or another fault.
fault = partial(pytest.mark.xfail, strict=True, raises=AssertionError)


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    with few_units():
        yield


def picture(seed=0, size=(40, 30)):
    """A smooth RGB image: other ways to interpolate hardly change it."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def encoded(image, form="JPEG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def put(root, files):
    """Write {path: bytes} below a folder, and return it."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def prepared(call, source, out, *options):
    """Run prepare; return the status and all that it prints."""
    argv = ("--source", source, "--name", "pets", "--out", out, "--processes", 1)
    status, stdout, stderr = call(prepare.main, *argv, *options)
    return status, stdout + stderr


def description(out):
    """What TFDS knows about the prepared data set."""
    return tfds.builder_from_directory(out / "pets/1.0.0").info


def records(out, split="val"):
    """Read {file name: (label, encoded image)} of the prepared data set with plain TFDS."""
    read = tfds.data_source("pets", split=split, data_dir=out, decoders={"image": tfds.decode.SkipDecoding()})
    return {PurePosixPath(row["file_name"].decode()).name: (int(row["label"]), row["image"]) for row in read}


def figures_in(printed):
    """The JSON object among the printed lines."""
    return next(json.loads(line) for line in printed.splitlines() if line.startswith("{"))


def counts_as_skipped(printed, number):
    """Whether the text says that so many files are skipped: `skipped: 3`, or `3 hidden files are left out`."""
    word = "(?:skipped|left out|passed over)"
    return re.search(rf'{word}"?\s*:\s*{number}\b|\b{number}\b[^\n.;:]*\b{word}', printed)


def is_error_line(stderr):
    lines = stderr.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("error: ")


# Hidden and system files

CAT, DOG = encoded(picture(0)), encoded(picture(1))
PETS = {"val/cat/0.jpg": CAT, "val/dog/1.jpg": DOG}
HIDDEN = {
    "class folder": "val/.ipynb_checkpoints/0-checkpoint.jpg",
    "copy in a class": "val/cat/.ipynb_checkpoints/0-checkpoint.jpg",
    "thumbnail": "val/cat/@eaDir/0.jpg/SYNOFILE_THUMB_M.jpg",
    "AppleDouble file": "val/cat/._0.jpg",
}
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(58)


def with_hidden(root, places):
    """A folder of two pets, with hidden files beside them."""
    return put(root, PETS | {HIDDEN[p]: APPLE_DOUBLE if p == "AppleDouble file" else CAT for p in places})


@pytest.mark.parametrize("place", ["class folder", "copy in a class", "thumbnail", "AppleDouble file"])
def test_verify_reads_no_hidden_and_system_files(place, tmp_path, call):
    """Read the two pets alone, without a complaint."""
    status, stdout, _ = call(verify.main, with_hidden(tmp_path, [place]))
    figures = figures_in(stdout)
    assert (status, figures["images"], figures["unreadable"], figures["duplicates"]) == (0, 2, 0, 0)


@pytest.mark.parametrize("place", ["class folder", "copy in a class", "thumbnail", "AppleDouble file"])
def test_prepare_stores_no_hidden_and_system_files(place, tmp_path, call):
    """Store the two pets alone, with the labels of their own folders."""
    status, printed = prepared(call, with_hidden(tmp_path / "set", [place]), tmp_path / "out")
    assert status == 0, printed
    assert description(tmp_path / "out").features["label"].names == ["cat", "dog"]
    assert {name: label for name, (label, _) in records(tmp_path / "out").items()} == {"0.jpg": 0, "1.jpg": 1}


def test_predict_names_no_hidden_and_system_files(ten_classes, tmp_path, call):
    """Look at the visible files alone. They hold no image here, so nothing has to be computed."""
    files = put(tmp_path, dict.fromkeys([*PETS, *HIDDEN.values()], b"no image"))
    status, _, stderr = call(predict.main, files, "--checkpoint", ten_classes[0])
    named = [line for line in stderr.splitlines() if line.startswith("error: image")]
    assert status == 2 and len(named) == 2, stderr


@pytest.mark.parametrize("command", ["verify", "prepare"])
def test_hidden_and_system_files_are_counted(command, tmp_path, call):
    """Say that four files are skipped."""
    source = with_hidden(tmp_path / "set", HIDDEN)
    if command == "verify":
        _, stdout, stderr = call(verify.main, source)
        printed = stdout + stderr
    else:
        _, printed = prepared(call, source, tmp_path / "out")
    assert counts_as_skipped(printed, 4), printed


def zip_of_a_mac(path):
    """A zip as macOS packs a folder: beside each image a file that describes it."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"cat/1.jpg": CAT, "dog/1.jpg": DOG}.items():
            folder = name.partition("/")[0]
            file.writestr(f"pets/train/{name}", data)
            file.writestr(f"__MACOSX/pets/train/{folder}/._1.jpg", APPLE_DOUBLE)
    return path


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="as it is"),
        pytest.param(("--skip-damaged",), id="skip damaged"),
    ],
)
def test_prepare_reads_zips_of_macos(options, tmp_path, call):
    """Store the images, know no split __MACOSX, and count what is skipped."""
    status, printed = prepared(call, zip_of_a_mac(tmp_path / "pets.zip"), tmp_path / "out", *options)
    assert status == 0, printed
    assert set(description(tmp_path / "out").splits) == {"train"}
    assert description(tmp_path / "out").splits["train"].num_examples == 2
    assert counts_as_skipped(printed, 2), printed


def test_verify_reads_zips_of_macos(tmp_path, call):
    """Find the split behind the folder that the zip has besides __MACOSX."""
    status, stdout, stderr = call(verify.main, zip_of_a_mac(tmp_path / "pets.zip"), "--split", "train")
    assert status == 0, stderr
    assert figures_in(stdout)["images"] == 2 and counts_as_skipped(stdout + stderr, 2)


# Files with other endings

ENDINGS = {
    ".jfif": CAT,
    ".JPE": CAT,
    ".avif": encoded(picture(0), "AVIF"),
    ".gif": encoded(picture(0), "GIF"),
    "": CAT,
    ".txt": b"These are cats.",
}
READ = (".jfif", ".JPE", ".avif")  # What the decoders read, and nobody means for anything but an image.


@pytest.mark.parametrize("command", ["verify", "prepare"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_files_with_other_endings_are_read_or_counted_and_named(ending, command, tmp_path, call):
    """Read what can be read; count and name what is skipped."""
    source = put(tmp_path / "set", {"val/cat/0.jpg": DOG, f"val/cat/other{ending}": ENDINGS[ending]})
    if command == "verify":
        status, stdout, stderr = call(verify.main, source)
        printed, count = stdout + stderr, figures_in(stdout)["images"]
    else:
        status, printed = prepared(call, source, tmp_path / "out")
        count = description(tmp_path / "out").splits["val"].num_examples
    assert status == 0, printed
    if ending in READ or count == 2:
        assert count == 2, printed
    else:
        assert counts_as_skipped(printed, 1) and f"other{ending}" in printed, printed


# Lists and splits without class folders


def test_prepare_takes_the_labels_of_lists(tmp_path, call):
    """Store the labels that `--data` reads on the same place."""
    source = put(tmp_path / "set", {"val/a/0.jpg": CAT, "val/b/1.jpg": DOG, "meta/val.txt": b"a/0.jpg 1\nb/1.jpg 0\n"})
    status, printed = prepared(call, source, tmp_path / "out")
    assert status == 0, printed
    assert {name: label for name, (label, _) in records(tmp_path / "out").items()} == {"0.jpg": 1, "1.jpg": 0}


# The challenge's ground truth of three validation images.
TRUTH = {1: "n01751748", 2: "n09193705", 50_000: "n02437616"}
VALIDATION = {f"ILSVRC2012_val_{number:08}": wnid for number, wnid in TRUTH.items()}


def challenge(root):
    """ILSVRC2012 as Kaggle's archive unpacks: train in class folders, val without, the labels of val in a table."""
    inside = "ILSVRC/Data/CLS-LOC"
    files = {f"{inside}/train/{wnid}/{wnid}_{i}.JPEG": CAT for i, wnid in enumerate(TRUTH.values())}
    files |= {f"{inside}/val/{name}.JPEG": DOG for name in VALIDATION}
    table = "".join(f"{name},{wnid} 1 2 30 20 \n" for name, wnid in VALIDATION.items())
    names = "".join(f"{wnid} a snake, a lake or a llama\n" for wnid in sorted(TRUTH.values()))
    files["LOC_val_solution.csv"] = f"ImageId,PredictionString\n{table}".encode()
    return put(root, files | {"LOC_synset_mapping.txt": names.encode()})


@pytest.mark.parametrize("place", ["ILSVRC/Data/CLS-LOC", "ILSVRC", "."])
def test_prepare_loses_no_split_of_imagenet(place, tmp_path, call):
    """Store train and val with the right labels, or refuse and name what cannot be stored."""
    source = challenge(tmp_path / "set") / place
    status, stdout, stderr = call(
        prepare.main, "--source", source, "--name", "pets", "--out", tmp_path / "out", "--processes", 1
    )
    if status == 2:
        line = stderr.replace(str(source), "")  # Its path holds these words as well.
        assert is_error_line(stderr) and re.search(r"\bval\b" if place.endswith("LOC") else "CLS-LOC", line), stderr
        return
    assert status == 0
    info = description(tmp_path / "out")
    splits = set(info.splits)
    assert splits in ({"train", "val"}, {"train", "validation"}), stdout
    for split, wnid_of in (("train", lambda name: name.partition("_")[0]), (max(splits), VALIDATION.__getitem__)):
        found = {name.removesuffix(".JPEG"): label for name, (label, _) in records(tmp_path / "out", split).items()}
        assert len(found) == 3
        assert all(info.features["label"].int2str(label) == wnid_of(name) for name, label in found.items())


@pytest.mark.parametrize("place", ["ILSVRC/Data/CLS-LOC", "ILSVRC", "."])
def test_verify_reads_a_split_of_imagenet_without_class_folders(place, tmp_path, call):
    """Take the labels from the table, as prepare does."""
    status, stdout, stderr = call(verify.main, challenge(tmp_path / "set") / place, "--split", "val")
    figures = figures_in(stdout)
    assert (status, figures["images"], figures["classes"]) == (0, 3, 3), stderr


@pytest.mark.parametrize("command", ["verify", "prepare"])
def test_a_split_without_class_folders_and_labels_is_refused(command, tmp_path, refused):
    """Say that the split has no class folders."""
    source = put(tmp_path / "set", {"train/cat/0.jpg": CAT, "val/0.jpg": DOG})
    if command == "verify":
        line = refused(verify.main, source, "--split", "val")
    else:
        line = refused(prepare.main, "--source", source, "--name", "pets", "--out", tmp_path / "out")
    assert f"{source}/val" in line and "class" in line


# Deep images


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_short_edge_keeps_grey_images_of_16_bits(form, tmp_path, call):
    """Store the upper eight bits, as the decoder of training and evaluation reads them."""
    grey = np.asarray(picture().convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    source = put(tmp_path / "set", {f"val/cat/0.{'pgm' if form == 'PPM' else form.lower()}": encoded(deep, form)})
    status, printed = prepared(call, source, tmp_path / "out", "--short-edge", 15)
    assert status == 0, printed
    ((_, data),) = records(tmp_path / "out").values()
    with Image.open(io.BytesIO(data)) as stored:
        pixels = np.asarray(stored.convert("L"))
    expected = Image.fromarray(grey).resize((20, 15), Image.Resampling.BILINEAR)
    assert_allclose(pixels, np.asarray(expected), rtol=0, atol=16)  # JPEG's loss.


GREY = np.asarray(picture().convert("L")) / np.float32(255)
DEEP = {"float": GREY, "integer": (GREY * 65535).astype(np.int32)}
WAYS = ("verify", "prepare", "prepare --short-edge", "OpenCV's decoder", "Pillow's decoder")


@pytest.fixture(scope="module")
def decoding(ten_classes):
    """Models that decode with OpenCV, as MMPretrain does, and with Pillow, as torchvision does."""
    model = snet.get_model(ten_classes[0])
    info = dataclasses.replace(model.info, preprocess=TORCHVISION_EVAL)
    return {"OpenCV's decoder": model, "Pillow's decoder": snet.Model(model.module, model.variables, info)}


@pytest.fixture
def refusal_of(decoding, tmp_path, call):
    """`refusal_of(way, kind)`: what a way to read images says about a TIFF of 32 bits, or "" where it takes it."""

    def refusal_of(way, kind):
        source = put(tmp_path / kind, {"val/cat/0.tif": encoded(Image.fromarray(DEEP[kind]), "TIFF")})
        if way in decoding:
            try:
                decoding[way].preprocess(source / "val/cat/0.tif")
            except InputError as error:
                return str(error)
            return ""
        if way == "verify":
            status, printed, _ = call(verify.main, source)
        else:
            options = ("--short-edge", 15) if "edge" in way else ()
            status, printed = prepared(call, source, tmp_path / f"{kind} {way}", *options)
        return next(line for line in printed.splitlines() if "0.tif" in line) if status else ""

    return refusal_of


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("way", WAYS)
def test_tiffs_of_32_bits_are_refused_clearly(way, kind, refusal_of):
    """Refuse the image, and say that its 32 bits are the reason."""
    assert re.search(r"0\.tif.*\b32[ -]bit", refusal_of(way, kind))


@pytest.mark.parametrize("kind", DEEP)
def test_tiffs_of_32_bits_are_refused_alike(kind, refusal_of):
    """Give the same reason from every command: what stands between the name and the advice."""
    said = [re.search(r"0\.tif (.+?);", refusal_of(way, kind)) for way in WAYS]
    assert all(said) and len({found[1] for found in said}) == 1


# The fast transform


def exif(tag, value):
    """A segment of a JPEG with an EXIF block of one entry."""
    body = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, tag, 3, 1, value, 0, 0)
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def behind_start(data, *segments):
    return data[:2] + b"".join(segments) + data[2:]


ORIENTATION, RESOLUTION = 0x0112, 0x011A
WIDE = picture(2, (240, 160))
TURNED = Image.Exif()
TURNED[ORIENTATION] = 6
PLAIN = encoded(WIDE)
KINDS = {
    "plain.jpg": PLAIN,
    "turned.jpg": behind_start(PLAIN, exif(ORIENTATION, 6)),
    "turned.tif": encoded(WIDE, "TIFF", tiffinfo={ORIENTATION: 6}),
    "turned.avif": encoded(WIDE, "AVIF", exif=TURNED),
    "two blocks.jpg": behind_start(PLAIN, exif(ORIENTATION, 6), exif(RESOLUTION, 1)),
    "stray bytes.jpg": PLAIN[:20] + b"\0\0" + PLAIN[20:],
}


def training_batch(root, transform):
    """The first batch that a training on a folder would see, from verify's preview of it."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "in1k", dataclasses.replace(PRESETS["in1k"], transform=transform))
        patch.setattr(plots, "plot_batch", lambda batch, *_: seen.append(batch))
        argv = ("--split", "train", "--config", "in1k", "--image-size", "32", "--preview", str(root / "preview.png"))
        assert verify.main([str(root), *argv]) == 0
    (batch,) = seen
    return batch


def training_set(root, names):
    """As many images as a preview shows, in a list, each kind with a label of its own."""
    kinds = {f"{i} {names[i % len(names)]}": i % len(names) for i in range(32)}
    put(root / "train", {name: KINDS[names[label]] for name, label in kinds.items()})
    return put(root, {"meta/train.txt": "".join(f"{name} {label}\n" for name, label in kinds.items()).encode()})


def differences_in(root):
    """Mean differences (B,) between the pixels of the two transforms from the same random numbers, and both batches."""
    exact, fast = (training_batch(root, transform) for transform in ("exact", "fast"))
    return np.abs(exact["images"].astype(int) - fast["images"]).mean((1, 2, 3)), exact, fast


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """{kind: mean difference of the pixels that both transforms give}."""
    names = [name for name in KINDS if "stray" not in name]
    far, exact, fast = differences_in(training_set(tmp_path_factory.mktemp("transforms"), names))
    assert_array_equal(exact["labels"], fast["labels"])
    return {name: far[exact["labels"] == label].mean() for label, name in enumerate(names)}


@pytest.mark.parametrize("name", [name for name in KINDS if "stray" not in name])
def test_the_fast_transform_gives_the_pixels_of_the_exact_one(name, differences):
    """Differ by interpolation alone: a few grey levels. Another part of the image differs by dozens."""
    assert differences[name] < 8


def test_the_fast_transform_reads_or_names_jpegs_with_stray_bytes(tmp_path):
    """Take the exact transform's pixels, or name the image as damaged and take another one."""
    far, exact, fast = differences_in(training_set(tmp_path, ["stray bytes.jpg", "plain.jpg"]))
    stray = exact["labels"] == 0
    named = np.char.find(fast["damaged"][stray], "stray bytes.jpg") >= 0
    assert ((far[stray] < 8) | named).all()


# Checkpoints


@pytest.fixture(scope="module")
def network():
    """A random 0.5x network with ten classes in PyTorch, under torchvision's names."""
    return lively_network("torchvision")


@pytest.fixture
def read_or_explained(tmp_path, call):
    """Asserts that convert finds the weights, or says what it found instead and how to save the weights."""

    def read_or_explained(content, bias, found, *options):
        torch.save(content, tmp_path / "net.pth")
        argv = (tmp_path / "net.pth", "--out", tmp_path / "model", "--no-verify", *options)
        status, _, stderr = call(from_torch.main, *argv)
        if status == 0:
            assert_array_equal(snet.load(tmp_path / "model")[1]["params"]["fc"]["bias"], bias.numpy())
        else:
            assert status == 2 and is_error_line(stderr) and found in stderr and "torch.save" in stderr, stderr

    return read_or_explained


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "net.",
        "model.backbone.",
        "module.module.",
    ],
)
def test_convert_reads_or_explains_the_prefixes_of_wrappers(prefix, network, read_or_explained):
    """Read what torch.compile, Lightning, nanodet and nested data-parallel training store."""
    tensors = network.state_dict()
    content = {"state_dict": {prefix + key: tensor for key, tensor in tensors.items()}}
    read_or_explained(content, tensors["fc.bias"], prefix)


@pytest.mark.parametrize(
    "key",
    ["model", "model_state_dict", "net"],
)
def test_convert_reads_or_explains_the_keys_of_training_loops(key, network, read_or_explained):
    """Read what PyTorch's tutorials and their followers store beside the epoch."""
    tensors = network.state_dict()
    read_or_explained({key: tensors, "epoch": 3}, tensors["fc.bias"], key)


def test_convert_knows_torchscript(tmp_path, refused):
    """Name the kind of file, and say how to save the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    line = refused(from_torch.main, tmp_path / "script.pt", "--out", tmp_path / "model", "--no-verify")
    assert "TorchScript" in line and "torch.save" in line and "damaged" not in line


def test_convert_reads_the_averages_of_timm(network, read_or_explained):
    """Take the averages from where timm stores them."""
    raw = network.state_dict()
    averages = raw | {"fc.bias": raw["fc.bias"] + 1}
    content = {"epoch": 1, "arch": "shufflenet", "state_dict": raw, "state_dict_ema": averages}
    read_or_explained(content, averages["fc.bias"], "state_dict_ema", "--ema")


@pytest.mark.parametrize(
    "options",
    [pytest.param((), id="raw"), pytest.param(("--ema",), id="averaged")],
)
def test_convert_reads_or_explains_what_torchvision_trains(options, network, read_or_explained):
    """Read a file with the training's options in it, or name their type."""
    raw = network.state_dict()
    averages = {f"module.{key}": tensor for key, tensor in raw.items()}
    averages |= {"n_averaged": torch.tensor(3), "module.fc.bias": raw["fc.bias"] + 1}
    content = {"model": raw, "model_ema": averages, "epoch": 1, "args": Namespace(lr=0.1)}
    bias = averages["module.fc.bias"] if options else raw["fc.bias"]
    read_or_explained(content, bias, "argparse.Namespace", *options)


@pytest.fixture
def cifar_file(network, tmp_path):
    """A file of a network that differs from torchvision's in strides alone, as chenyaofo publishes them."""
    torch.save(network.state_dict(), tmp_path / "cifar10_shufflenetv2_x0_5.pt")
    return tmp_path / "cifar10_shufflenetv2_x0_5.pt"


def test_convert_takes_the_small_stem_as_an_option(network, cifar_file, tmp_path, call):
    """Compute what the network computes whose first convolution has stride 1 and no max pool behind it."""
    status, _, stderr = call(from_torch.main, cifar_file, "--out", tmp_path / "model", "--no-verify", "--small-stem")
    assert status == 0, stderr
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conv, norm, relu = network.conv1
        x = relu(norm(torch.nn.functional.conv2d(images, conv.weight, padding=1)))
        for stage in (network.stage2, network.stage3, network.stage4, network.conv5):
            x = stage(x)
        expected = network.fc(x.mean((2, 3))).numpy()
    logits = snet.get_model(tmp_path / "model")(images.numpy().transpose(0, 2, 3, 1))
    assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_convert_warns_where_shapes_cannot_tell_the_stem(cifar_file, tmp_path, call):
    """Say that a stem with another stride would have the same shapes."""
    status, _, stderr = call(from_torch.main, cifar_file, "--out", tmp_path / "model", "--no-verify")
    assert status == 0 and re.search("^warning: .*stem", stderr, re.MULTILINE), stderr


DISHES = tuple(f"dish{i}" for i in range(1000))


@pytest.mark.parametrize(
    ("meta", "first"),
    [
        pytest.param({}, "n01440764", id="no names"),
        pytest.param({"CLASSES": DISHES}, "dish0", id="names of 0.x"),
        pytest.param({"dataset_meta": {"classes": DISHES}}, "dish0", id="names of 1.x"),
    ],
)
def test_a_thousand_classes_keep_their_own_names(meta, first, network, tmp_path, call):
    """Use the names in the file; without any, those of ImageNet."""
    tensors = network.state_dict()
    tensors |= {"fc.weight": tensors["fc.weight"].repeat(100, 1), "fc.bias": tensors["fc.bias"].repeat(100)}
    torch.save({"meta": meta, "state_dict": tensors}, tmp_path / "net.pth")
    status, _, stderr = call(from_torch.main, tmp_path / "net.pth", "--out", tmp_path / "model", "--no-verify")
    assert status == 0, stderr
    assert json.loads((tmp_path / "model/model.json").read_text())["classes"][0] == first
