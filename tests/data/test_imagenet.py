"""ImageNet-V2, ReaL, A, R and Sketch: small sets in the form that TFDS gives them, and what is counted on them."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
from conftest import figures_of, lively_network
from numpy.testing import assert_allclose
from PIL import Image
from preparation.test_dataset import write_tfrecords

from shufflenet_jax.commands import evaluate, from_torch, prepare, verify
from shufflenet_jax.data.sources import open_source, tfds_directory
from shufflenet_jax.evaluation.predictions import Predictions
from shufflenet_jax.evaluation.report import summarise

# TFDS's own names, versions and splits.
VERSIONS = {
    "imagenet_v2/matched-frequency": "3.0.0",
    "imagenet_sketch": "1.0.0",
    "imagenet_a": "0.1.0",
    "imagenet_r": "0.2.0",
    "imagenet2012_real": "1.0.0",
}
LABELS = [7, 7, 401, 999, 401, 3]
SEVERAL = [[7], [], [401, 12, 3], [999, 0], [], [3]]  # As ReaL has them: two images without any.


@pytest.fixture(scope="module")
def imagenet_model(tmp_path_factory):
    """A random 0.5x network of ImageNet's classes that takes small images."""
    root = tmp_path_factory.mktemp("imagenet")
    network = lively_network("torchvision", num_classes=1000)
    torch.save(network.state_dict(), root / "net.pth")
    assert from_torch.main([str(root / "net.pth"), "--out", str(root / "model"), "--no-verify"]) == 0
    info = json.loads((root / "model/model.json").read_text())
    info["preprocess"] |= {"resize": 64, "crop": 64}
    (root / "model/model.json").write_text(json.dumps(info))
    return root / "model"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Each of the sets, prepared from TFRecords with the features of TFDS's own builder."""
    root = tmp_path_factory.mktemp("sets")
    for name, version in VERSIONS.items():
        builder = tfds.builder(name, data_dir=root / "none")
        assert str(builder.version) == version
        split = "validation" if name.startswith("imagenet2012") else "test"
        rows = [labelled(i, several=split == "validation") for i in range(len(LABELS))]
        records = [builder.info.features.serialize_example(row) for row in rows]
        write_tfrecords(root / "tf", name, records, split, features=builder.info.features, version=version)
        source = root / "tf" / name / version
        argv = ["--source", source, "--name", name, "--out", root / "sets", "--processes", 1]
        assert prepare.main([str(word) for word in argv]) == 0
    return root / "sets"


def labelled(i, *, several):
    pixels = np.random.default_rng(i).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((240, 256)).save(file, "JPEG")
    truth = {"original_label": LABELS[i], "real_label": SEVERAL[i]} if several else {"label": LABELS[i]}
    file.seek(0)
    return {"image": file, "file_name": f"{i}.JPEG", **truth}


@pytest.fixture
def evaluated(imagenet_model, data_dir, call, tmp_path):
    """evaluated(name, *options) -> (figures, predictions)."""

    def evaluated(name, *options):
        argv = ("--checkpoint", imagenet_model, "--data", f"tfds:{name}", "--data-dir", data_dir)
        status, stdout, stderr = call(evaluate.main, *argv, "--predictions", tmp_path / "rows.npz", *options)
        assert status == 0, stderr
        with np.load(tmp_path / "rows.npz") as rows:
            return figures_of(stdout), dict(rows)

    return evaluated


def shares(logits):
    exponents = np.exp(logits.astype(np.float64))
    return exponents / exponents.sum(1, keepdims=True)


def test_v2_is_judged_among_all_classes(evaluated):
    figures, rows = evaluated("imagenet_v2/matched-frequency")
    # Shards hold every other record.
    assert list(rows["name"]) == [f"{i}.JPEG" for i in (0, 2, 4, 1, 3, 5)]
    assert sorted(rows["label"]) == sorted(LABELS) and np.isfinite(rows["logits"]).all()
    assert figures["images"] == 6 and "classes" not in figures


def test_a_and_r_are_judged_among_the_classes_that_occur_and_sketch_if_asked(evaluated, tmp_path):
    _, alike = evaluated("imagenet_sketch")
    present = sorted(set(LABELS))
    logits, labels = alike["logits"][:, present], alike["label"]
    found = [evaluated(*argv) for argv in (("imagenet_a",), ("imagenet_r",), ("imagenet_sketch", "--subset"))]
    for figures, rows in found:
        assert figures["classes"] == len(present)
        np.testing.assert_array_equal(rows["logits"][:, present], logits)
        assert np.isneginf(np.delete(rows["logits"], present, axis=1)).all()
        assert figures["top1_correct"] == (np.array(present)[logits.argmax(1)] == labels).sum()
        assert figures["top5_correct"] == 6, "four classes compete"
        own = shares(logits)[np.arange(6), np.searchsorted(present, labels)]
        # The loss is a sum in float32, given to six decimals.
        assert_allclose(figures["loss"], -np.log(own).mean(), rtol=1e-5)
    np.savez(tmp_path / "kept.npz", **rows)
    again, _ = evaluated("imagenet_r", "--compare", tmp_path / "kept.npz")
    assert again["compare"]["agreement"] == 100
    with_version, _ = evaluated("imagenet_a/0.1.0")
    assert with_version == found[0][0]


def test_real_counts_any_of_an_images_labels_and_leaves_out_those_without(evaluated, tmp_path, imagenet_model):
    report = tmp_path / "report.html"
    figures, rows = evaluated("imagenet2012_real", "--report", report, "--compare", imagenet_model)
    assert list(rows["name"]) == ["0.JPEG", "2.JPEG", "3.JPEG", "5.JPEG"] and figures["images"] == 4
    truths = [SEVERAL[i] for i in (0, 2, 3, 5)]
    assert [[label for label in row if label >= 0] for row in rows["label"].tolist()] == truths
    order = np.argsort(-rows["logits"], axis=1)
    for figure, best in (("top1_correct", 1), ("top5_correct", 5)):
        assert figures[figure] == sum(bool(set(o[:best]) & set(t)) for o, t in zip(order, truths, strict=True))
    own = [share[truth].sum() for share, truth in zip(shares(rows["logits"]), truths, strict=True)]
    assert_allclose(figures["loss"], -np.log(own).mean(), rtol=1e-5)
    assert figures["compare"]["agreement"] == 100 and figures["compare"]["both"] == figures["top1_correct"]
    np.savez(tmp_path / "kept.npz", **rows)
    again, _ = evaluated("imagenet2012_real", "--compare", tmp_path / "kept.npz")
    assert again["compare"] == figures["compare"]
    text = report.read_text()
    assert "<h1>model on tfds:imagenet2012_real</h1>" in text
    # It shows four decimals.
    assert_allclose(float(re.search(r'id="loss">(.*?)<', text)[1]), figures["loss"], atol=1e-4, rtol=0)


def test_a_label_that_comes_first_is_right_wherever_it_stands():
    logits = np.float32([[0, 1, 5, 2], [0, 1, 5, 2], [9, 1, 5, 2]])
    rows = Predictions(np.int32([[1, 2, -1], [3, -1, -1], [1, 3, 2]]), logits)
    summary = summarise(rows)
    assert summary.top1.right == 1 and [row.label for row in summary.classes] == [3, 2]


def test_plain_tfds_opens_what_was_prepared(data_dir):
    for name in VERSIONS:
        records = tfds.data_source(name, data_dir=data_dir)
        (split,) = records
        assert len(records[split]) == len(LABELS) and records[split][5]["file_name"] == b"5.JPEG"


def test_names_that_could_be_several_sets_are_refused(data_dir, tmp_path, refused):
    assert len(open_source("tfds:imagenet_v2", data_dir=data_dir)) == len(LABELS), "there is one"
    folder = tmp_path / "imagenet_v2"
    for config in ("matched-frequency", "topimages"):
        shutil.copytree(data_dir / "imagenet_v2/matched-frequency", folder / config)
    line = refused(verify.main, "tfds:imagenet_v2", "--data-dir", tmp_path)
    assert "matched-frequency, topimages; name one of them, like tfds:imagenet_v2/topimages" in line


def test_a_version_at_the_end_of_a_name_is_taken_if_it_is_there(data_dir, tmp_path, refused):
    for name, version in VERSIONS.items():
        assert tfds_directory(f"{name}/{version}", data_dir) == data_dir / name / version
    assert tfds_directory("imagenet_v2/3.0.0", data_dir) == data_dir / "imagenet_v2/matched-frequency/3.0.0"
    for version in ("0.9.0", "0.10.0"):
        shutil.copytree(data_dir / "imagenet_a/0.1.0", tmp_path / "imagenet_a" / version)
    assert tfds_directory("imagenet_a", tmp_path).name == "0.10.0"
    for version in ("0.9.0", "0.10.0"):
        assert tfds_directory(f"imagenet_a/{version}", tmp_path).name == version
    line = refused(verify.main, "tfds:imagenet_a/0.1.0", "--data-dir", tmp_path)
    assert f"{tmp_path / 'imagenet_a'} holds 0.10.0, 0.9.0, but no version 0.1.0" in line
    line = refused(verify.main, "tfds:imagenet_b/0.1.0", "--data-dir", tmp_path)
    assert f"no data set imagenet_b in {tmp_path}" in line and "--name imagenet_b " in line


def test_several_labels_are_for_evaluation_alone(data_dir, refused):
    assert "but no image and label" in refused(verify.main, "tfds:imagenet2012_real", "--data-dir", data_dir)
    labels = open_source("tfds:imagenet2012_real", data_dir=data_dir, multi_label=True).labels()
    assert sorted(labels) == [0, 3, 3, 7, 12, 401, 999]
