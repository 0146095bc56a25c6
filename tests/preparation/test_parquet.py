"""ImageNet's Parquet shards as the Hugging Face Hub has them, which `prepare` reads."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from preparation.test_dataset import files_of, jpeg, read_all, result_of
from pyarrow import parquet

from shufflenet_jax.commands import prepare
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.data.rows import read_image
from shufflenet_jax.preparation.contents import read_contents

WNIDS = list(imagenet_classes())
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# As `datasets` writes it beside the columns. The Hub has more synonyms than we have.
NAMES = [f"{name}, a synonym" for name in imagenet_classes().values()]


def save_shard(path, rows, *, names=NAMES, group=2, page=1024, **changes):
    """Write (bytes, path, label) rows as a shard of the Hub; `changes` replace whole columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": data, "path": name} if data or name else None for data, name, _ in rows]
    columns = {"image": pa.array(images, IMAGE), "label": pa.array([label for *_, label in rows], pa.int64())} | changes
    table = pa.table({name: column for name, column in columns.items() if column is not None})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=group, write_batch_size=page)
    return path


def row(seed, label):
    """A row of the train split."""
    return jpeg(seed), f"{WNIDS[label]}_{seed}_{WNIDS[label]}.JPEG", label


@pytest.fixture
def prepared(tmp_path, call):
    """Runs `prepare` on sources; returns its figures and what it wrote on stderr."""

    def prepared(*sources, name="mine"):
        argv = ("--name", name, "--out", tmp_path / "out", "--processes", 1, "--source", *sources)
        status, out, stderr = call(prepare.main, *argv)
        assert status == 0, stderr
        return result_of(out), stderr

    return prepared


@pytest.mark.parametrize("form", ["folder", "repository", "files"])
def test_shards_become_imagenet2012_under_the_official_names(form, tmp_path, prepared):
    place = tmp_path / "imagenet-1k" / ("data" if form == "repository" else "")
    # Labels are ranks; the order is that of the shards, not of the classes.
    save_shard(place / "train-00000-of-00002.parquet", [row(0, 999), row(1, 0), row(2, 7)])
    save_shard(place / "train-00001-of-00002-b42a775f407cee45.parquet", [row(3, 7)])
    validation = (jpeg(4), f"ILSVRC2012_val_00000001_{WNIDS[65]}.JPEG", 65)
    save_shard(place / "validation-00000-of-00001.parquet", [validation])
    save_shard(place / "test-00000-of-00001.parquet", [(jpeg(5), f"ILSVRC2012_test_0000000{i}.JPEG", -1) for i in "12"])
    (place / "README.md").write_text("a data set")
    sources = sorted(place.glob("*.parquet")) if form == "files" else [tmp_path / "imagenet-1k"]
    figures, stderr = prepared(*sources, name="imagenet2012")
    assert (figures["train"], figures["validation"]) == (4, 1) and "test" not in figures
    assert "split test of" in stderr and "the labels of its 2 images were never published" in stderr
    assert ("1 without the suffix of an image (README.md)" in stderr) == (form != "files")
    # TFDS's own data set of this name has the same features, class names included.
    train = [(f"{WNIDS[label]}_{i}.JPEG", label, jpeg(i)) for i, label in enumerate((999, 0, 7, 7))]
    assert read_all("imagenet2012", "train", tmp_path / "out") == train
    rows = read_all("imagenet2012", "validation", tmp_path / "out")
    assert rows == [("ILSVRC2012_val_00000001.JPEG", 65, jpeg(4))]


@pytest.mark.parametrize(
    ("names", "paths", "guessed"),
    [(NAMES, None, False), (None, None, True), (None, "official", False)],
    ids=["names of classes", "neither", "names of images"],
)
def test_labels_are_taken_for_ranks_with_a_warning_where_nothing_says_so(names, paths, guessed, tmp_path, prepared):
    rows = [row(i, i) if paths else (jpeg(i), None, i) for i in range(3)]
    path = save_shard(tmp_path / "train-00000-of-00001.parquet", rows, names=names)
    _, stderr = prepared(path)
    assert ("label k is taken for the k-th of ImageNet's sorted WordNet IDs" in stderr) == guessed
    assert [label for _, label, _ in read_all("mine", "train", tmp_path / "out")] == [0, 1, 2]


def test_missing_shards_are_reported(tmp_path, prepared):
    for number in (0, 3):
        save_shard(tmp_path / f"in/train-{number:05}-of-00005.parquet", [row(number, number)])
    figures, stderr = prepared(tmp_path / "in")
    assert figures["train"] == 2
    assert f"warning: train in {tmp_path / 'in'} lacks shards: 3 (00001, 00002, 00004);" in stderr


def test_null_images_are_named_or_left_out(tmp_path, refused, call):
    path = save_shard(tmp_path / "train-00000-of-00001.parquet", [row(0, 1), (None, None, 2), (None, "a", 3)])
    argv = ("--name", "mine", "--out", tmp_path / "out", "--processes", 1, "--source", path)
    assert f"row 1 of row group 0 of {path} holds no image; repair or remove it, or set --skip" in refused(
        prepare.main, *argv
    )
    status, out, stderr = call(prepare.main, *argv[:2], "--out", tmp_path / "other", *argv[4:], "--skip-damaged")
    assert status == 0 and (result_of(out)["train"], result_of(out)["left_out"]) == (1, 2), stderr


STRINGS = pa.array(["a", "b"])
SOUND = [row(0, 1), row(1, 2)]


@pytest.mark.parametrize(
    ("name", "rows", "options", "message"),
    [
        ("train.parquet", SOUND, {}, "is not called like train-00000-of-00294.parquet"),
        ("train-0-of-1.parquet", SOUND, {"image": None}, "has the columns label, but needs an image with bytes"),
        ("train-0-of-1.parquet", SOUND, {"image": STRINGS}, "has the columns image, label, but needs an image"),
        ("train-0-of-1.parquet", SOUND, {"label": None}, "needs a column label of whole numbers, but has none"),
        ("train-0-of-1.parquet", SOUND, {"label": STRINGS}, "needs a column label of whole numbers, but has string"),
        ("train-0-of-1.parquet", [(*row(0, 1)[:2], 1000)], {"names": None}, "has the label 1000, but ImageNet has 0"),
        ("train-0-of-1.parquet", [(*row(0, 1)[:2], None)], {}, "has the label None, but ImageNet has 0 to 999"),
        ("train-0-of-1.parquet", [row(0, 1), (*row(1, 2)[:2], -1)], {}, "row 1 of row group 0 of"),
        ("train-0-of-1.parquet", [(*row(0, 1)[:2], 7)], {}, f"has the label 7, {WNIDS[7]}, but is called {WNIDS[1]}"),
        ("train-0-of-1.parquet", SOUND, {"names": ["cat", "dog"]}, "has 2 classes, like cat, but not ImageNet's"),
        ("test-0-of-1.parquet", [(jpeg(0), "a", -1)], {}, "test: the labels of its 1 image were never published"),
    ],
)
def test_other_files_are_refused(name, rows, options, message, tmp_path, refused):
    path = save_shard(tmp_path / "in" / name, rows, **options)
    before = files_of(tmp_path)
    assert message in refused(prepare.main, "--source", path, "--name", "mine", "--out", tmp_path / "out")
    assert files_of(tmp_path) == before


def test_several_sources_must_be_shards_and_each_only_once(tmp_path, refused):
    first = save_shard(tmp_path / "a/train-00000-of-00001.parquet", SOUND)
    second = save_shard(tmp_path / "b/train-00000-of-00001.parquet", SOUND)
    argv = ("--name", "mine", "--out", tmp_path / "out", "--source", first)
    assert "several copies of the split train" in refused(prepare.main, *argv, second)
    assert "are not both Parquet shards; give one --source" in refused(prepare.main, *argv, tmp_path / "b")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "footer", "pages"])
def test_a_damaged_shard_is_one_line(damage, tmp_path, refused):
    path = save_shard(tmp_path / "train-00000-of-00001.parquet", SOUND)
    data = bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    damaged = {
        "empty": b"",
        "text": b"label,image\n",
        "cut": data[: len(data) // 2],
        "footer": data[: footer + 4] + bytes(40) + data[footer + 44 :],
        "pages": data[:4] + b"\xff" * 60 + data[64:],
    }
    path.write_bytes(damaged[damage])
    line = refused(prepare.main, "--source", path, "--name", "mine", "--out", tmp_path / "out", "--processes", 1)
    assert f"{path} is damaged or no Parquet file" in line and "fetch it again" in line
    assert not (tmp_path / "out/mine/1.0.0").exists()


def test_images_are_read_in_any_order(tmp_path):
    rows = [(bytes([i]) * (i + 1), str(i), 0) for i in range(50)]
    path = str(save_shard(tmp_path / "train-00000-of-00001.parquet", rows, group=40))
    for place in np.random.default_rng(0).permutation(50):
        assert read_image(path, *divmod(int(place), 40)) == rows[place][0]


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    """A page is decoded as a whole. pyarrow writes pages of up to 1024 values, here of 4 MB."""
    rng = np.random.default_rng(0)
    data = [(rng.bytes(400_000), str(i), 0) for i in range(200)]
    path = save_shard(tmp_path / "train-00000-of-00001.parquet", data, group=200, page=10)
    script = """
import sys, pyarrow
from shufflenet_jax.data.rows import list_rows, read_image
assert [len(read_image(sys.argv[1], row.group, row.position)) for row in list_rows(sys.argv[1])] == [400_000] * 200
print(pyarrow.default_memory_pool().max_memory())
"""
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000_000  # Of 80 MB: a page, 16 decoded images, and buffers that grow by doubling.


@pytest.mark.real_data
def test_the_201_images_through_parquet_are_those_of_the_folder(shared, tmp_path, prepared):
    images = sorted((shared / "imagenet-original/val").glob("*/*.JPEG"))
    rows = [
        (path.read_bytes(), f"{path.stem}_{path.parent.name}.JPEG", WNIDS.index(path.parent.name)) for path in images
    ]
    for number, part in enumerate((rows[:130], rows[130:])):
        save_shard(tmp_path / f"in/validation-{number:05}-of-00002.parquet", part, group=100)
    figures, stderr = prepared(tmp_path / "in")
    assert figures["validation"] == len(images) == 201 and stderr == ""
    folder = read_contents(shared / "imagenet-original")
    expected = {
        entry.location.path.rpartition("/")[2]: (folder.classes[entry.label], entry.location.read())
        for entry in folder.splits["val"]
    }
    through = read_all("mine", "validation", tmp_path / "out")
    assert {name: (WNIDS[label], data) for name, label, data in through} == expected
