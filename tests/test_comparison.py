import json

import numpy as np
import pytest
from conftest import figures_of

from shufflenet_jax.commands import evaluate
from shufflenet_jax.comparison import compare, mcnemar
from shufflenet_jax.errors import InputError


def predictions(classes, labels, num_classes=3):
    names = np.array([f"{i}.png" for i in range(len(labels))])
    return {"name": names, "label": np.array(labels), "logits": np.eye(num_classes)[classes]}


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


def test_eval_under_every_preprocessing(ten_classes, call):
    model, data = ten_classes
    status, out, stderr = call(evaluate.main, "--checkpoint", model, "--data", data, "--preprocess", "all")
    assert status == 0, stderr
    *table, last = out.splitlines()
    found = json.loads(last)["preprocess"]
    assert found.pop("as stored")["top1"] == figures_of(out)["top1"]
    assert [line[:28].strip() for line in table[2:]] == list(found) and "as MMPretrain does" not in found
    # What has no EXIF is the same for MMPretrain's and torchvision's decoders.
    assert found["as torchvision does"]["flips"] == found["EXIF's rotation ignored"]["flips"] == 0
    assert all(figures["images"] == 12 for figures in found.values())


@pytest.mark.real_data
def test_one_image_with_exif_separates_torchvision_from_mmpretrain(shared, call):
    argv = ("--checkpoint", shared / "weights/shufflenet_v2_x1_0_mmpretrain.pth", "--preprocess", "all")
    status, out, stderr = call(evaluate.main, *argv, "--data", shared / "imagenet-original")
    assert status == 0, stderr
    assert (figures_of(out)["top1_correct"], figures_of(out)["top5_correct"]) == (161, 189)
    theirs = figures_of(out)["preprocess"]["as torchvision does"]
    assert (theirs["top1_correct"], theirs["top5_correct"], theirs["flips"]) == (162, 189, 1)
    (told,) = (line for line in out.splitlines() if line.startswith("as torchvision does"))
    assert told.endswith("n02951585/n02951585_can_opener.JPEG")
