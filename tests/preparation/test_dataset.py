import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import google_crc32c
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from conftest import ROOT
from PIL import Image

from shufflenet_jax.commands import evaluate, from_torch, prepare, verify
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.errors import InputError
from shufflenet_jax.preparation.records import features_for


def jpeg(seed, size=(20, 16), **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def class_folder(root, counts):
    """{"train/cat": 3} and so on, as files."""
    for number, (place, count) in enumerate(counts.items()):
        (root / place).mkdir(parents=True)
        for i in range(count):
            (root / place / f"{i:03}.jpg").write_bytes(jpeg(1000 * number + i))
    return root


SMALL = {"train/cat": 5, "train/dog": 7, "val/cat": 3}


def read_all(name, split, data_dir):
    """What plain TFDS reads: [(file name, label, bytes)]."""
    records = tfds.data_source(name, split=split, data_dir=data_dir, decoders={"image": tfds.decode.SkipDecoding()})
    return [(row["file_name"].decode(), int(row["label"]), row["image"]) for row in records]


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def result_of(stdout):
    return json.loads(stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["folder", "zip", "zip with a folder of its own"])
def test_class_folders_and_zips_become_data_sets_that_plain_tfds_opens(form, tmp_path, call):
    source = class_folder(tmp_path / "source", SMALL)
    if form != "folder":
        with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
            for path in source.rglob("*.jpg"):
                archive.write(path, ("pets/" if "own" in form else "") + path.relative_to(source).as_posix())
        shutil.rmtree(source)
        class_folder(source, SMALL)
    given = source if form == "folder" else tmp_path / "source.zip"
    argv = ("--source", given, "--name", "pets", "--out", tmp_path / "out", "--shard-size", 5, "--processes", 1)
    status, out, stderr = call(prepare.main, *argv)
    assert status == 0, stderr
    assert result_of(out) | {"folder": ""} == {"name": "pets", "folder": "", "train": 12, "val": 3, "left_out": 0}
    rows = read_all("pets", "train", tmp_path / "out")
    expected = [
        (f"{name}/{i:03}.jpg", label, (source / f"train/{name}/{i:03}.jpg").read_bytes())
        for label, (name, count) in enumerate([("cat", 5), ("dog", 7)])
        for i in range(count)
    ]
    assert rows == expected
    builder = tfds.builder_from_directory(tmp_path / "out/pets/1.0.0")
    assert builder.info.features["label"].names == ["cat", "dog"]
    assert builder.info.splits["train"].shard_lengths == [5, 5, 2]
    assert [path.name for path in (tmp_path / "out/pets").iterdir()] == ["1.0.0"]


def tar_of(files, path):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_the_official_tars_become_imagenet2012_in_tfds_own_version(tmp_path, call):
    wnids = list(imagenet_classes())
    inner = []
    for wnid in (wnids[7], wnids[3]):
        tar_of([(f"{wnid}_{i}.JPEG", jpeg(i)) for i in (12, 4)], tmp_path / "inner.tar")
        inner.append((f"{wnid}.tar", (tmp_path / "inner.tar").read_bytes()))
    (tmp_path / "source").mkdir()
    tar_of(inner, tmp_path / "source/ILSVRC2012_img_train.tar")
    numbers = (1, 2, 50_000)
    tar_of(
        [(f"ILSVRC2012_val_{number:08}.JPEG", jpeg(number)) for number in numbers],
        tmp_path / "source/ILSVRC2012_img_val.tar",
    )
    argv = ("--source", tmp_path / "source", "--name", "imagenet2012", "--out", tmp_path / "out", "--processes", 1)
    status, _, stderr = call(prepare.main, *argv)
    assert status == 0, stderr
    assert [path.name for path in (tmp_path / "out/imagenet2012").iterdir()] == ["5.1.0"]
    train = read_all("imagenet2012", "train", tmp_path / "out")
    assert train == [(f"{wnids[k]}_{i}.JPEG", k, jpeg(i)) for k in (3, 7) for i in (12, 4)]
    labels = {name: label for name, label, _ in read_all("imagenet2012", "validation", tmp_path / "out")}
    # The first, second and last label of the challenge's ground truth, by WNID.
    first, second, last = "n01751748", "n09193705", "n02437616"
    assert labels == {
        f"ILSVRC2012_val_{number:08}.JPEG": wnids.index(wnid)
        for number, wnid in zip(numbers, (first, second, last), strict=True)
    }


def write_tfrecords(root, name, records, split="train", shards=2, *, features=None, version="1.2.3"):
    """A TFDS data set in TFRecord form, as TFDS itself writes it."""
    folder = root / name / version
    name = name.partition("/")[0]
    folder.mkdir(parents=True)

    def masked(data):
        crc = google_crc32c.value(data)
        return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, filetype_suffix="tfrecord")
    parts = [records[i::shards] for i in range(shards)]
    for i, part in enumerate(parts):
        with open(folder / f"{name}-{split}.tfrecord-{i:05}-of-{shards:05}", "wb") as file:
            for record in part:
                size = len(record).to_bytes(8, "little")
                file.write(size + masked(size) + record + masked(record))
    split_info = tfds.core.SplitInfo(
        name=split, shard_lengths=list(map(len, parts)), num_bytes=sum(map(len, records)), filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features or features_for(["a", "b"]), split_infos=[split_info], version=version,
        filename_template=template, check_data=False,
    )  # fmt: skip
    return folder, parts


def serialized(count):
    features = features_for(["a", "b"])
    rows = ({"image": io.BytesIO(jpeg(i)), "label": i % 2, "file_name": f"{i}.jpg"} for i in range(count))
    return [features.serialize_example(row) for row in rows]


def test_tfrecords_are_copied_record_by_record(tmp_path, call):
    folder, parts = write_tfrecords(tmp_path / "in", "mine", serialized(7))
    argv = ("--source", folder, "--name", "mine", "--out", tmp_path / "out", "--processes", 1)
    status, out, stderr = call(prepare.main, *argv)
    assert status == 0, stderr
    assert result_of(out)["train"] == 7
    written = tmp_path / "out/mine/1.2.3"
    for i, part in enumerate(parts):
        reader = ArrayRecordReader(str(written / f"mine-train.array_record-{i:05}-of-00002"))
        assert reader.read_all() == part
        reader.close()
    names = [row[0] for row in read_all("mine", "train", tmp_path / "out")]
    assert names == [f"{i}.jpg" for i in (0, 2, 4, 6, 1, 3, 5)]


def test_reading_tfrecords_directly_names_the_command_that_converts_them(tmp_path, refused):
    folder, _ = write_tfrecords(tmp_path, "mine", serialized(2))
    line = refused(verify.main, "tfds:mine", "--data-dir", tmp_path, "--split", "train")
    command = f"python -m shufflenet_jax prepare --source {folder} --name mine --out DIR"
    assert "stored as tfrecord" in line and line.endswith(f"name the new place with --data-dir: {command}")
    with pytest.raises(InputError, match=r"name the new place with `data_dir`$"):  # Python speaks of the argument.
        open_source("tfds:mine", "train", data_dir=tmp_path)


@pytest.mark.parametrize("where", ["header", "data", "end"])
def test_a_damaged_tfrecord_is_refused(where, tmp_path, refused):
    folder, _ = write_tfrecords(tmp_path / "in", "mine", serialized(4))
    path = folder / "mine-train.tfrecord-00001-of-00002"
    data = bytearray(path.read_bytes())
    if where == "end":
        del data[-2:]
    else:
        data[2 if where == "header" else 200] ^= 1
    path.write_bytes(data)
    argv = ("--source", folder, "--name", "mine", "--out", tmp_path / "out", "--processes", 1)
    assert "mine-train.tfrecord-00001-of-00002 is damaged" in refused(prepare.main, *argv)
    assert not (tmp_path / "out/mine/1.2.3").exists()


def test_damaged_images_are_named_or_left_out(tmp_path, call, refused):
    source = class_folder(tmp_path / "source", SMALL)
    (source / "train/dog/003.jpg").write_bytes(b"damaged")
    argv = ("--source", source, "--name", "pets", "--out", tmp_path / "out", "--processes", 1)
    line = refused(prepare.main, *argv)
    assert "dog/003.jpg is damaged" in line and "--skip-damaged" in line
    assert "another source, other images or options" in refused(prepare.main, *argv, "--skip-damaged")
    shutil.rmtree(tmp_path / "out")
    status, out, stderr = call(prepare.main, *argv, "--skip-damaged")
    assert status == 0 and result_of(out)["left_out"] == 1 and result_of(out)["train"] == 11
    assert "warning: image dog/003.jpg is damaged" in stderr
    assert "dog/003.jpg" not in [row[0] for row in read_all("pets", "train", tmp_path / "out")]


def test_short_edge_stores_smaller_images_and_keeps_their_orientation(tmp_path, call):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "source/train/a").mkdir(parents=True)
    wide, small = jpeg(0, (90, 60), exif=exif), jpeg(1, (30, 50))
    (tmp_path / "source/train/a/0.jpg").write_bytes(wide)
    (tmp_path / "source/train/a/1.jpg").write_bytes(small)
    argv = ("--source", tmp_path / "source", "--name", "a", "--out", tmp_path / "out", "--short-edge", 40)
    assert call(prepare.main, *argv, "--processes", 1)[0] == 0
    rows = read_all("a", "train", tmp_path / "out")
    with Image.open(io.BytesIO(rows[0][2])) as image:
        assert image.size == (60, 40) and image.getexif()[0x0112] == 6
    assert rows[1][2] == small


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cifar10", "other features or classes"),
        ("imagenet2012", "other features or classes"),
        ("imagenet_resized", "name it imagenet_resized/CONFIG, where CONFIG is one of 8x8, 16x16"),
        ("imagenet_resized/9x9", "name it imagenet_resized/CONFIG"),
        ("imagenet_a/small", "name it imagenet_a, or"),
        ("pets/small", "has no configuration small"),
        ("../up", "not a valid name for a data set"),
        ("Pets", "not a valid name for a data set"),
    ],
)
def test_names_of_tfds_own_data_sets_are_refused_where_they_would_not_fit(name, told, tmp_path, refused):
    source = class_folder(tmp_path / "source", SMALL)
    line = refused(prepare.main, "--source", source, "--name", name, "--out", tmp_path / "out")
    assert told in line and not (tmp_path / "out").exists()


def test_sources_that_are_none_and_sets_that_exist_are_refused(tmp_path, call, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    tar_of([("a.txt", b"hello")], tmp_path / "odd.tar")
    for source, told in [
        ("none", "no folder, zip or tar"),
        ("empty", "holds no images"),
        ("text", "no folder, zip or tar"),
        ("odd.tar", "holds no images"),
    ]:
        assert told in refused(prepare.main, "--source", tmp_path / source, "--name", "a", "--out", tmp_path / "out")
    source = class_folder(tmp_path / "source", SMALL)
    argv = ("--source", source, "--name", "pets", "--out", tmp_path / "out", "--processes", 1)
    assert call(prepare.main, *argv)[0] == 0
    before = files_of(tmp_path / "out")
    assert "exists already" in refused(prepare.main, *argv)
    assert files_of(tmp_path / "out") == before


def start(argv, env=None, *, script=("-m", "shufflenet_jax")):
    words = [sys.executable, *map(str, script), *map(str, argv)]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **(env or {})}, start_new_session=True)


def test_killed_and_started_again_it_gives_the_same_files(tmp_path, call):
    source = class_folder(tmp_path / "source", {"train/a": 120, "train/b": 120, "val/a": 40})
    argv = ["prepare", "--source", source, "--name", "pets", "--shard-size", 4, "--processes", 2, "--out"]
    killed = start([*argv, tmp_path / "killed"])
    draft = tmp_path / "killed/pets/1.0.0.incomplete"
    deadline = time.monotonic() + 60
    while len(list(draft.glob("*train.array_record-?????-of-00060"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(killed.pid, 9)
    killed.wait()
    assert draft.is_dir() and not (tmp_path / "killed/pets/1.0.0").exists(), "it was killed in the middle"
    finished = {path.name: path.stat().st_mtime_ns for path in draft.glob("*of-00060")}
    assert call(prepare.main, *argv[1:], tmp_path / "killed")[0] == 0
    assert call(prepare.main, *argv[1:], tmp_path / "whole")[0] == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    for name, written in finished.items():
        assert (tmp_path / "killed/pets/1.0.0" / name).stat().st_mtime_ns == written, "finished shards are kept"


def test_neither_tensorflow_nor_pytorch_is_imported(tmp_path):
    """Packages of that name and of PyTorch's, which note their import, stand where real ones would."""
    for name in ("tensorflow", "torch"):
        (tmp_path / "path" / name).mkdir(parents=True)
        (tmp_path / "path" / name / "__init__.py").write_text(
            f"open({str(tmp_path / 'trace')!r}, 'a').write({name!r})\nraise ImportError\n"
        )
    source = class_folder(tmp_path / "source", {f"{split}/{i}": 2 for split in ("train", "val") for i in range(10)})
    env = {"PYTHONPATH": str(tmp_path / "path")}
    prepared = start(["prepare", "--source", source, "--name", "ten", "--out", tmp_path / "out", "--processes", 1], env)
    assert prepared.wait() == 0
    argv = ["--config", "digits", "--data", "tfds:ten", "--data-dir", tmp_path / "out", "--preprocessing", "cifar10"]
    argv += ["--image-size", 16, "--batch-size", 8, "--steps", 1, "--lowering", "reference", "--workers", 1]
    argv += ["--workdir", tmp_path / "run"]
    assert start(argv, env, script=[ROOT / "tests/small_training.py"]).wait() == 0
    assert not (tmp_path / "trace").exists(), (tmp_path / "trace").read_text()
    for name in ("tensorflow", "torch"):
        noted = subprocess.run([sys.executable, "-c", f"import {name}"], env={**os.environ, **env}, capture_output=True)
        assert noted.returncode == 1 and (tmp_path / "trace").read_text().endswith(name), "the trap works"


# Reading them


def test_data_sets_keep_their_classes_or_take_the_models(tmp_path, call):
    source = class_folder(tmp_path / "source", SMALL)
    assert call(prepare.main, "--source", source, "--name", "pets", "--out", tmp_path, "--processes", 1)[0] == 0
    own = open_source("tfds:pets", "train", data_dir=tmp_path)
    assert own.classes == ("cat", "dog") and (own[5].name, own[5].label) == ("dog/000.jpg", 1)
    wide = open_source("tfds:pets", data_dir=tmp_path, classes=["ant", "bee", "cat", "dog"], num_classes=4)
    assert len(wide) == 3 and wide[0].label == 2
    with pytest.raises(InputError, match="does not have: dog"):
        open_source("tfds:pets", data_dir=tmp_path, classes=["cat", "cow"], num_classes=2)
    with pytest.raises(InputError, match="no split 'test'"):
        open_source("tfds:pets", "test", data_dir=tmp_path)
    with pytest.raises(InputError, match="no data set cats in"):
        open_source("tfds:cats", data_dir=tmp_path)


def test_a_damaged_record_is_named(tmp_path, call):
    source = class_folder(tmp_path / "source", {"train/a": 6})
    assert call(prepare.main, "--source", source, "--name", "pets", "--out", tmp_path, "--processes", 1)[0] == 0
    path = tmp_path / "pets/1.0.0/pets-train.array_record-00000-of-00001"
    data = path.read_bytes()
    position = data.index((source / "train/a/003.jpg").read_bytes()) + 100
    path.write_bytes(data[:position] + bytes(50) + data[position + 50 :])
    records = open_source("tfds:pets", "train", data_dir=tmp_path)
    assert records[2].name == "a/002.jpg"
    with pytest.raises(InputError, match="record 3 of pets, split train, is damaged"):
        records[3]


# Real data


@pytest.mark.real_data
def test_real_images_give_the_same_counts_as_a_data_set(shared, card_at_hand, tmp_path, call):
    """tests/slow has the 650 validation images, as the official tar."""
    source = shared / "imagenet-original"
    status, _, stderr = call(
        prepare.main, "--source", source, "--name", "original", "--out", tmp_path, "--processes", 1
    )
    assert status == 0, stderr
    model = tmp_path / "model"
    assert call(from_torch.main, card_at_hand, "--out", model, "--no-verify")[0] == 0
    status, out, stderr = call(evaluate.main, "--checkpoint", model, "--data", "tfds:original", "--data-dir", tmp_path)
    assert status == 0, stderr
    assert [result_of(out)[key] for key in ("images", "top1_correct", "top5_correct")] == [201, 161, 189]


@pytest.mark.real_data
def test_cifar10_is_50000_and_10000_images(shared, tmp_path, call):
    argv = ("--source", shared / "cifar10/cifar10.zip", "--name", "cifar10_jpeg", "--out", tmp_path)
    status, out, stderr = call(prepare.main, *argv)
    assert status == 0, stderr
    assert (result_of(out)["train"], result_of(out)["test"]) == (50_000, 10_000)
    assert len(open_source("tfds:cifar10_jpeg", "train", data_dir=tmp_path)) == 50_000
