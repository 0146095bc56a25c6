import io
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import figures_of, lively_network
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

from shufflenet_jax.commands import evaluate, from_torch
from shufflenet_jax.config import MMPRETRAIN_EVAL, TORCHVISION_EVAL
from shufflenet_jax.data.decoding import decode
from shufflenet_jax.data.sources import Example, Source
from shufflenet_jax.errors import InputError
from shufflenet_jax.evaluation.comparison import compare, decoded_by, mcnemar
from shufflenet_jax.evaluation.predictions import Predictions


def predictions(classes, labels, num_classes=3):
    names = np.array([f"{i}.png" for i in range(len(labels))])
    return Predictions(np.array(labels), np.eye(num_classes)[classes], names)


def test_a_comparison_counts_every_image_once_and_names_those_that_flip():
    found = compare(predictions([0, 1, 2, 0, 1], [0, 1, 0, 1, 0]), predictions([0, 2, 0, 0, 2], [0, 1, 0, 1, 0]))
    assert (found.both, found.first_only, found.second_only, found.neither) == (1, 1, 1, 2)
    assert found.agreement == 40 and found.p_value == 1
    assert found.flips == [("1.png", 1, 1, 2), ("2.png", 0, 2, 0), ("4.png", 0, 1, 2)]
    with pytest.raises(InputError, match="of other images: each label"):
        compare(predictions([0], [0]), predictions([0], [1]))


@pytest.mark.parametrize(
    ("split", "p"),
    [((0, 0), 1), ((0, 1), 1), ((5, 5), 1), ((0, 6), 2 / 2**6), ((1, 9), 2 * 11 / 2**10), ((9, 1), 2 * 11 / 2**10)],
)
def test_mcnemars_test_is_that_of_a_fair_coin(split, p):
    assert mcnemar(*split) == pytest.approx(p, rel=1e-12)


def test_eval_compares_with_a_checkpoint_or_a_file(ten_classes, tmp_path, call, refused):
    model, data = ten_classes
    argv = ("--checkpoint", model, "--data", data)
    assert call(evaluate.main, *argv, "--predictions", tmp_path / "own.npz")[0] == 0
    rows = dict(np.load(tmp_path / "own.npz"))
    rows["logits"] = np.roll(rows["logits"], 1, axis=1)
    np.savez(tmp_path / "rolled.npz", **rows)
    for other, flips in ((model, 0), (tmp_path / "own.npz", 0), (tmp_path / "rolled.npz", 12)):
        status, out, stderr = call(evaluate.main, *argv, "--compare", other)
        assert status == 0, stderr
        assert figures_of(out)["compare"]["flips"] == flips == out.count("flips: ")
    assert "no predictions" in refused(evaluate.main, *argv, "--compare", tmp_path / "none.npz")
    assert "no model at" in refused(evaluate.main, *argv, "--compare", tmp_path / "none")


def another_model(file, classes):
    """A model directory of another random network."""
    torch.save({"meta": {"CLASSES": classes}, "state_dict": lively_network("mmpretrain", seed=1).state_dict()}, file)
    model = file.with_suffix("")
    assert from_torch.main([str(file), "--out", str(model), "--no-verify"]) == 0
    return model


def test_eval_compares_with_a_second_network(ten_classes, tmp_path, call):
    model, data = ten_classes
    other = another_model(tmp_path / "other.pth", tuple(f"kind{i}" for i in range(10)))
    kept = []
    for checkpoint, options in ((model, ("--compare", other)), (other, ())):
        file = tmp_path / f"{len(kept)}.npz"
        argv = ("--checkpoint", checkpoint, "--data", data, "--predictions", file, *options)
        status, out, stderr = call(evaluate.main, *argv)
        assert status == 0, stderr
        kept.append((out, dict(np.load(file))))
    (out, mine), (_, theirs) = kept
    (first, second), labels = (rows["logits"].argmax(1) for rows in (mine, theirs)), mine["label"]
    flips = np.flatnonzero(first != second)
    assert len(flips) > 0, "the networks differ"
    found = figures_of(out)["compare"]
    assert (found["flips"], found["agreement"]) == (len(flips), round(100 * (1 - len(flips) / 12), 2))
    right = [(first == labels).tolist(), (second == labels).tolist()]
    counts = [sum(pair == both for pair in zip(*right, strict=True)) for both in ((1, 1), (1, 0), (0, 1), (0, 0))]
    assert [found[key] for key in ("both", "first_only", "second_only", "neither")] == counts
    assert [line for line in out.splitlines() if line.startswith("flips: ")] == [
        f"flips: {mine['name'][i]}: kind{first[i]} -> kind{second[i]} (kind{labels[i]})" for i in flips
    ]


def test_a_second_network_gets_its_images_prepared_in_its_own_way(ten_classes, tmp_path, call):
    model, data = ten_classes
    other = shutil.copytree(model, tmp_path / "exchanged")
    info = json.loads((other / "model.json").read_text())
    info["preprocess"]["channel_order"] = "BGR"
    (other / "model.json").write_text(json.dumps(info))
    status, out, stderr = call(evaluate.main, "--checkpoint", model, "--data", data, "--compare", other)
    assert status == 0, stderr
    assert figures_of(out)["compare"]["flips"] > 0, "the weights are the same"


def test_a_checkpoint_of_other_classes_is_not_compared(ten_classes, tmp_path, refused):
    model, data = ten_classes
    other = another_model(tmp_path / "other.pth", tuple(f"sort{i}" for i in range(10)))
    line = refused(evaluate.main, "--checkpoint", model, "--data", data, "--compare", other)
    assert f"{other} has other classes than {model}" in line


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_decoder_and_exifs_rotation_are_chosen_apart(form):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        picture.save(file, form, exif=exif)
        data = file.getvalue()
        source = Source(1, lambda index, data=data: Example("a", data, 0), 1, None, lambda: [0])
        flag = cv2.IMREAD_COLOR_RGB
        stored, seen = (
            cv2.imdecode(np.frombuffer(data, np.uint8), flag | f) for f in (cv2.IMREAD_IGNORE_ORIENTATION, 0)
        )
        opened = Image.open(file)
        wanted = {
            ("cv2", True): seen,
            ("cv2", False): stored,
            ("pillow", True): np.asarray(ImageOps.exif_transpose(opened).convert("RGB")),
            ("pillow", False): np.asarray(opened.convert("RGB")),
        }
        for (decoder, turned), pixels in wanted.items():
            assert_array_equal(decoded_by(source, decoder, oriented=turned)[0].image, pixels)
        assert (stored.shape == seen.shape) == (orientation < 5)


@pytest.mark.parametrize("own", [MMPRETRAIN_EVAL, TORCHVISION_EVAL], ids=["mmpretrain", "torchvision"])
def test_decoder_and_rotation_are_each_changed_alone(own):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    # OpenCV and Pillow make other colours of CMYK.
    Image.new("CMYK", (30, 20), (200, 100, 50, 20)).save(file, "JPEG", exif=exif)
    source = Source(1, lambda index: Example("a", file.getvalue(), 0), 1, None, lambda: [0])
    colours = {decoder: tuple(decode(file.getvalue(), decoder)[0, 0]) for decoder in ("cv2", "pillow")}
    assert colours["cv2"] != colours["pillow"]
    ways = evaluate.ways_to_prepare(own, source)
    found = {
        name: (images[0].image.shape[:2], tuple(images[0].image[0, 0]))
        for name, (way, images) in ways.items()
        if way == own
    }
    stored, turned = (20, 30), (30, 20)
    assert found == (
        {"decoded by Pillow": (turned, colours["pillow"]), "EXIF's rotation ignored": (stored, colours["cv2"])}
        if own == MMPRETRAIN_EVAL
        else {"decoded by OpenCV": (stored, colours["cv2"]), "EXIF's rotation applied": (turned, colours["pillow"])}
    )


def test_images_that_are_pixels_already_stay_as_they_are():
    pixels = np.zeros((2, 3, 3), np.uint8)
    source = Source(1, lambda index: Example("a", pixels, 0), 1, None, lambda: [0])
    assert decoded_by(source, "pillow", oriented=True)[0].image is pixels


def test_eval_under_every_preprocessing(ten_classes, call):
    model, data = ten_classes
    status, out, stderr = call(evaluate.main, "--checkpoint", model, "--data", data, "--preprocess", "all")
    assert status == 0, stderr
    *table, last = out.splitlines()
    found = json.loads(last)["preprocess"]
    assert found.pop("as stored")["top1"] == figures_of(out)["top1"]
    assert [line[:28].strip() for line in table[2:]] == list(found) and "as MMPretrain does" not in found
    # Without EXIF, MMPretrain's and torchvision's decoders are the same.
    for name in ("as torchvision does", "decoded by Pillow", "EXIF's rotation ignored"):
        assert (found[name]["flips"], found[name]["flipped"]) == (0, [])
    assert found["red and blue exchanged"]["flips"] > 3, "more than the table names"
    for line, figures in zip(table[2:], found.values(), strict=True):
        names, count = figures["flipped"], figures["flips"]
        assert len(set(names)) == len(names) == count
        assert line[44:].split() == [str(count), *", ".join(names[:3] + ["..."] * (count > 3)).split()]
    assert all(figures["images"] == 12 for figures in found.values())
