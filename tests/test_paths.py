"""Names of files and folders: what is written under any name is read back by it, or is refused before it is written."""

import os

import jax
import numpy as np
import pytest
from conftest import GREY, figures_of
from numpy.testing import assert_array_equal
from PIL import Image

from shufflenet_jax import checkpoint
from shufflenet_jax.commands import (
    evaluate,
    export,
    from_torch,
    info,
    plot,
    predict,
    prepare,
    publish,
    to_torch,
    train,
    verify,
)
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.errors import InputError
from shufflenet_jax.evaluation.predictions import read_predictions
from shufflenet_jax.files import path_of, written_aside

pytestmark = pytest.mark.usefixtures("three_units")

NO_TEXT = os.fsdecode(b"caf\xe9")  # In Latin-1, which is no UTF-8.
NAMES = [
    "run[lr=0.1]",
    "run[0:3]",
    "back\\slash",
    "st*r",
    "wh?t",
    " two words ",
    "two\nlines",
    "a@3,b#c%20",
    "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
    "cafe\N{COMBINING ACUTE ACCENT}",
    NO_TEXT,
    "x" * 240,
]

named = pytest.mark.parametrize("name", NAMES, ids=ascii)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of six images in two classes; one file's name is no UTF-8."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, names in {"kind0": ("a.png", "b.png", f"{NO_TEXT}.png"), "kind1": ("a.png", "b.png", "c.png")}.items():
        (root / "val" / label).mkdir(parents=True)
        for name in names:
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(root / "val" / label / name)
    return root


@named
def test_a_model_directory_is_read_by_the_name_that_it_was_written_under(name, variables, tmp_path):
    """Write twice, so that a model is also replaced."""
    for overwrite in (False, True):
        checkpoint.save_model(tmp_path / name, GREY, variables, overwrite=overwrite)
        read = checkpoint.load_directory(tmp_path / name)[1]
        jax.tree.map(assert_array_equal, read, variables)
    assert os.listdir(tmp_path) == [name]


@named
def test_the_checkpoints_of_a_training_are_read_by_the_name_of_its_workdir(name, variables, tmp_path):
    """Read them as a model, and to resume."""
    (tmp_path / name).mkdir()
    (tmp_path / name / checkpoint.INFO).write_text(GREY.to_json())
    with checkpoint.TrainingCheckpoints(tmp_path / name) as checkpoints:
        checkpoints.save(3, {checkpoint.VARIABLES: variables}, {"top1": 50.0})
    jax.tree.map(assert_array_equal, checkpoint.load_directory(tmp_path / name)[1], variables)
    with checkpoint.TrainingCheckpoints(tmp_path / name) as checkpoints:
        assert checkpoints.steps() == [3]
        checkpoints.restore(3, {checkpoint.VARIABLES: variables})
    assert os.listdir(tmp_path) == [name]


@named
def test_a_data_set_is_read_by_the_name_that_it_was_written_under_or_refused(name, images, tmp_path, call):
    """Refuse what ArrayRecord cannot write, before anything is written."""
    argv = ("--source", images, "--name", "pets", "--out", tmp_path / name, "--processes", 1)
    status, _, stderr = call(prepare.main, *argv)
    if name == NO_TEXT:
        assert status == 2 and "is not UTF-8" in stderr and not os.listdir(tmp_path)
        return
    assert status == 0, stderr
    source = open_source("tfds:pets", "val", data_dir=tmp_path / name)
    assert len([source[index] for index in range(len(source))]) == 6
    assert not [path for path in (tmp_path / name / "pets/1.0.0").iterdir() if path.name in ("notes", "settings.json")]


@named
def test_a_file_takes_its_place_under_any_name(name, tmp_path):
    """Write the small files of a run and of an evaluation."""
    with written_aside(tmp_path / name) as draft:
        draft.write_bytes(b"content")
    assert (tmp_path / name).read_bytes() == b"content" and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["x" * 256, "x" * 250 + "/..." * 1000], ids=["a name", "a path"])
def test_what_is_longer_than_the_system_allows_is_refused(name, tmp_path):
    """Name the limit in one line, and make nothing."""
    with pytest.raises(InputError, match="File name too long"), written_aside(tmp_path / name):
        pytest.fail("must be refused before anything is computed")
    assert not os.listdir(tmp_path)


# Buckets

BUCKET = "gs://bucket/place"
DIGITS = ("--config", "digits", "--steps", "1")


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (train.main, (*DIGITS, "--workdir", BUCKET)),
        (train.main, (*DIGITS, "--print-schedule", BUCKET)),
        (evaluate.main, ("--checkpoint", "MODEL", "--data", "IMAGES", "--report", BUCKET)),
        (evaluate.main, ("--checkpoint", "MODEL", "--data", "IMAGES", "--predictions", BUCKET)),
        (evaluate.main, ("--checkpoint", BUCKET, "--data", "IMAGES")),
        (evaluate.main, ("--checkpoint", "MODEL", "--data", BUCKET)),
        (evaluate.main, ("--checkpoint", "MODEL", "--data", "tfds:pets", "--data-dir", BUCKET)),
        (predict.main, ("IMAGES", "--checkpoint", "MODEL", "--save-picture", BUCKET)),
        (predict.main, ("IMAGES", "--checkpoint", "MODEL", "--features", BUCKET)),
        (prepare.main, ("--source", "IMAGES", "--name", "pets", "--out", BUCKET)),
        (prepare.main, ("--source", BUCKET, "--name", "pets", "--out", "OUT")),
        (export.main, ("MODEL", "--format", "safetensors", "--out", BUCKET)),
        (publish.main, ("MODEL", "--name", "pets", "--licence", "MIT", "--out", BUCKET)),
        (from_torch.main, ("MODEL.pth", "--out", BUCKET)),
        (to_torch.main, ("MODEL", "--dialect", "torchvision", "--out", BUCKET)),
        (info.main, ("--checkpoint", BUCKET)),
        (plot.main, (BUCKET,)),
        (verify.main, ("IMAGES", "--preview", BUCKET)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value.__module__.rpartition(".")[2],
)
def test_a_bucket_is_refused_in_one_line(main, argv, ten_classes, images, tmp_path, monkeypatch, call):
    """Name the bucket, and let no local folder take its place."""
    model, _ = ten_classes
    places = {"MODEL": model, "MODEL.pth": model.parent / "net.pth", "IMAGES": images, "OUT": tmp_path / "out"}
    monkeypatch.chdir(tmp_path)
    status, _, stderr = call(main, *(places.get(word, word) for word in argv))
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and BUCKET in errors[0] and "Traceback" not in stderr, stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["s3://b/c", "S3://b/c", "hdfs://host/c", "file:///tmp/c", "https://host/c"])
def test_any_address_is_refused(name):
    """Do so whatever the scheme is."""
    with pytest.raises(InputError, match=f"{name} is an address"):
        path_of(name)


@pytest.mark.parametrize("name", ["./gs:/bucket", "gs:", "a:b/c", "/gs://x", "c/d://e"])
def test_a_path_that_only_looks_like_an_address_is_a_path(name, tmp_path, monkeypatch):
    """Read what an earlier version wrote into a folder gs: by ./gs:."""
    monkeypatch.chdir(tmp_path)
    assert path_of(name)


# File names that are no text


def test_images_whose_names_are_no_text_never_end_a_run(ten_classes, images, tmp_path, call):
    """Write the report, the predictions and the rows of all images."""
    model, _ = ten_classes
    data = tmp_path / "data"
    for label in range(10):
        (data / f"val/kind{label}").mkdir(parents=True)
    for label in range(10):
        name = f"{NO_TEXT}.png" if label % 2 else "a.png"
        Image.new("RGB", (40, 50), (25 * label, 0, 0)).save(data / f"val/kind{label}" / name)
    page, kept = tmp_path / f"{NO_TEXT}.html", tmp_path / f"{NO_TEXT}.npz"
    argv = ("--checkpoint", model, "--data", data, "--report", page, "--predictions", kept)
    status, stdout, stderr = call(evaluate.main, *argv)
    assert status == 0 and figures_of(stdout)["images"] == 10, stderr
    assert "caf\\udce9" in page.read_text("utf-8") and len(read_predictions(kept).name) == 10
    for form in ((), ("--json",), ("--save-picture", tmp_path / f"{NO_TEXT}.png"), ("--features", kept)):
        status, stdout, stderr = call(predict.main, data, "--checkpoint", model, *form)
        assert status == 0 and "Traceback" not in stderr, stderr
    status, stdout, stderr = call(prepare.main, "--source", data, "--name", "p", "--out", tmp_path, "--processes", 1)
    assert status == 0, stderr
    source = open_source("tfds:p", "val", data_dir=tmp_path)
    assert sum("caf\\udce9" in source[index].name for index in range(len(source))) == 5
    status, stdout, stderr = call(to_torch.main, model, "--dialect", "mmpretrain", "--out", tmp_path / NO_TEXT)
    assert status == 0 and "caf\\udce9" in stdout and (tmp_path / NO_TEXT).is_file(), stderr
