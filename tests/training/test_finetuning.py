import csv
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from conftest import figures_of, lively_network
from numpy.testing import assert_array_equal
from PIL import Image
from sklearn.linear_model import LogisticRegression

import shufflenet_jax as snet
from shufflenet_jax import __main__, published
from shufflenet_jax.architecture import Table
from shufflenet_jax.commands import evaluate, from_torch, predict, train
from shufflenet_jax.config import TrainConfig
from shufflenet_jax.data.sources import Example, Source
from shufflenet_jax.errors import InputError
from shufflenet_jax.loading import load_model
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.training import rule
from shufflenet_jax.training.patience import Patience
from shufflenet_jax.training.probe import fit_classifier
from shufflenet_jax.training.supervision import balanced_weights, class_weights

COLORS = {"blue": (30, 60, 200), "green": (40, 190, 60), "red": (200, 40, 30)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A flat folder of uneven classes that colors tell apart: 20 blue, 15 green and 10 red pictures."""
    root, rng = tmp_path_factory.mktemp("pictures") / "colors", np.random.default_rng(0)
    for (name, color), count in zip(COLORS.items(), (20, 15, 10), strict=True):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(rng.normal(color, 25, (12, 15, 3)), 0, 255)
            Image.fromarray(np.uint8(pixels)).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model directory of a small random network of ten classes."""
    import torch

    root = tmp_path_factory.mktemp("weights")
    torch.save(lively_network("torchvision", Table((8, 16, 16, 16, 32), (2, 1, 1))).state_dict(), root / "net.pth")
    assert from_torch.main([str(root / "net.pth"), "--out", str(root / "model"), "--no-verify"]) == 0
    return root / "model"


def options(pictures, weights, *more):
    return ("--config", "finetune", "--data", pictures, "--init-from", weights, "--lowering", "reference", *more)


@pytest.fixture(scope="module")
def tuned(pictures, weights, tmp_path_factory):
    """The workdir of the plain command but for its length, and its arguments."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    argv = options(pictures, weights, "--epochs", 12, "--eval-every", 6, "--workdir", workdir)
    assert train.main([str(word) for word in argv]) == 0
    return workdir, argv


def test_the_plain_command_chooses_what_is_open_and_ends_with_a_summary(tuned, pictures, call):
    workdir, argv = tuned
    record = json.loads((workdir / "config.json").read_text())
    chosen = record["rule"]["settings"]
    assert (record["rule"]["images"], record["rule"]["side"]) == (36, 12)
    assert set(chosen) == {"eval_size", "image_size", "batch_size", "learning_rate"}  # The length was given.
    assert chosen.items() <= record["settings"].items() and record["settings"]["width"] is None
    assert record["settings"]["channels"] == [8, 16, 16, 16, 32] and record["settings"]["repeats"] == [2, 1, 1]

    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["images"] == 9 and summary["last"]["right"] >= 7  # Colors are easy to tell apart.
    status, out, err = call(train.main, *argv)  # Nothing is left to do, and the summary is shown again.
    assert status == 0 and "continuing after step" in err and "chosen for" not in err
    last = summary["last"]
    assert f"top-1 {last['percent']:.2f} % ({last['right']} of 9 images), 95 % interval {last['low']:.1f}" in out
    assert "worst classes:" in out and "most confused:" in out and "balanced accuracy" in out
    commands = re.findall(r"^  python -m shufflenet_jax (.*)$", out, re.M)
    assert [words.split()[0] for words in commands] == ["eval", "predict", "export"]


def test_the_commands_at_the_end_do_what_they_say(tuned, pictures, call, tmp_path, monkeypatch):
    workdir, argv = tuned
    monkeypatch.chdir(tmp_path)
    evaluating, predicting, _ = re.findall(r"^  python -m shufflenet_jax (.*)$", call(train.main, *argv)[1], re.M)
    status, out, _ = call(__main__.main, *evaluating.split())
    best = json.loads((workdir / "summary.json").read_text())["best"]
    assert status == 0 and figures_of(out)["top1_correct"] == best["right"]
    assert "Which class is taken for which" in (workdir / "report.html").read_text()
    assert call(__main__.main, *predicting.split())[0] == 0
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 45 and {row["class_1"] for row in rows} <= set(COLORS)


def test_finetune_returns_the_model_of_the_same_run(tuned, pictures, weights):
    model = snet.finetune(pictures, init_from=str(weights), lowering="reference", epochs=12, eval_every=6)
    jax.tree.map(assert_array_equal, model.variables, load_model(tuned[0])[1])
    assert model.info.classes == tuple(COLORS) and model.info.metrics["top1"] > 70
    assert model.class_name(int(model(model.preprocess(pictures / "red/0.png")).argmax())) in COLORS


def test_a_linear_probe_is_an_ordinary_workdir(pictures, weights, tmp_path, call):
    argv = options(pictures, weights, "--linear-probe", "--workdir", tmp_path / "run")
    status, out, err = call(train.main, *argv)
    assert status == 0 and "features of 36 images" in err and "last: step 1" in out
    (_, before, _), (_, after, info) = load_model(weights), load_model(tmp_path / "run")
    for tree in (before, after):
        tree["params"].pop("fc")
    jax.tree.map(assert_array_equal, before, after)
    assert info.classes == tuple(COLORS)
    status, out, _ = call(evaluate.main, "--checkpoint", tmp_path / "run", "--data", pictures)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert status == 0 and [row["split"] for row in rows] == ["eval"]
    assert figures_of(out)["top1"] == pytest.approx(rows[0]["top1"], abs=0.01) and rows[0]["top1"] > 80
    state = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert call(train.main, *argv)[0] == 0
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == state[tmp_path / "run/metrics.jsonl"]


def test_without_a_published_file_and_a_network_one_line_says_what_to_do(pictures, tmp_path, monkeypatch, call):
    monkeypatch.setenv(published.MIRROR, (tmp_path / "nowhere").as_uri())
    argv = ("--config", "finetune", "--data", pictures, "--workdir", tmp_path / "run")
    status, _, err = call(train.main, *argv)
    (message,) = (line for line in err.splitlines() if not line.startswith(("no splits in", "downloading")))
    assert status == 2 and re.fullmatch(
        "error: .* cannot be downloaded .*; download it elsewhere and put it at .*", message
    )
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_is_refused_before_anything_is_written(pictures, weights, tmp_path, refused):
    cases = {
        ("--config", "finetune"): "no images are named; give a folder",
        ("--config", "digits", "--linear-probe"): "name one with --init-from",
        ("--config", "digits", "--width", "none"): "width",
        options(pictures, weights, "--nesterov"): "nesterov is a form of SGD's momentum",
        options(pictures, weights, "--rand-magnitude", 31): "rand_magnitude is 31",
        options(pictures, weights, "--patience", 2, "--recalibrate", 5): "patience ends a run before the steps",
        options(pictures, weights, "--image-size", "32x32x3"): "--image-size",
        options(pictures, weights, "--image-size", "0x32"): "image_size is (0, 32)",
        options(pictures, weights, "--optimizer", "lion"): "--optimizer",
    }
    for words, reason in cases.items():
        assert reason in refused(train.main, *words, "--workdir", tmp_path / "run"), words
        assert not (tmp_path / "run").exists()


# The rule


def source_of(images, side):
    image = np.zeros((side, side + 7, 3), np.uint8)
    return Source(images, lambda index: Example(f"{index}", image, 0), 2, ("a", "b"), lambda: [0] * images)


@pytest.mark.parametrize(
    ("images", "side", "sizes"),
    [(2022, 256, (176, 224)), (60, 1000, (176, 224)), (1600, 32, (144, 192)), (500, 64, (176, 224)), (9, 8, (48, 64))],
)
def test_the_rule_goes_by_number_and_size(images, side, sizes, monkeypatch):
    monkeypatch.setattr(rule, "usual_side", lambda source: side)
    config = dataclasses.replace(PRESETS["finetune"], width=1.0, init_from=None, data="x")
    settled, chosen = rule.settle(config, source_of(images, side), {})
    assert (settled.image_size, settled.eval_size) == sizes
    assert settled.batch_size % jax.device_count() == 0 and 8 <= settled.batch_size <= 40
    assert rule.FEWEST_EPOCHS <= settled.epochs <= rule.MOST_EPOCHS and 0 < settled.learning_rate < 1
    told = f"chosen for {images:,} training images with a short side of {side} pixels: eval_size"
    assert chosen.text.startswith(told)
    again, nothing = rule.settle(config, source_of(images + 50, side), dataclasses.asdict(settled))
    assert again == settled and nothing is None


@pytest.mark.parametrize(("images", "batch"), [(2022, 40), (1618, 32), (2400, 32), (96, 16), (101, 17), (5, 5)])
def test_the_last_batch_of_an_epoch_is_as_full_as_can_be(images, batch, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = dataclasses.replace(PRESETS["finetune"], width=1.0, init_from=None, data="x", image_size=32)
    assert rule.settle(config, source_of(images, 40), {})[0].batch_size == batch


def test_the_batch_suits_the_devices_of_a_slice_that_is_not_here():
    config = dataclasses.replace(PRESETS["finetune"], width=1.0, init_from=None, data="x", image_size=32)
    settled, chosen = rule.settle(config, source_of(2022, 40), {}, devices=7)
    assert settled.batch_size % 7 == 0 and chosen.devices == 7


def test_the_schedule_of_a_rule_is_printed_and_needs_the_images(call, refused, pictures, weights):
    options = ("--config", "finetune", "--init-from", weights, "--print-schedule")
    status, out, _ = call(train.main, *options, "--data", pictures)
    assert status == 0 and "chosen for 36 training images" in out and "36 images, 60 epochs of 3 steps" in out
    assert "cifar10" in refused(train.main, *options, "--data", "tfds:cifar10", "--data-dir", pictures)


def test_what_is_given_is_kept():
    settings = {"image_size": (64, 96), "batch_size": 8, "steps": 5, "learning_rate": 0.1}
    config = dataclasses.replace(PRESETS["finetune"], width=1.0, init_from=None, data="x", **settings)
    settled, chosen = rule.settle(config, source_of(40, 100), {})
    assert settled == config and chosen is None and config.preprocess.size == (64, 96)


# Its parts


def test_a_run_may_begin_with_the_classifier_of_a_linear_probe(pictures, weights, tmp_path, call):
    rows = []
    for name, words in {"probe": ("--linear-probe",), "run": ("--probe-first", "--steps", 1)}.items():
        argv = options(pictures, weights, "--learning-rate", 1e-12, "--image-size", 64, *words)
        status, _, err = call(train.main, *argv, "--workdir", tmp_path / name)
        assert status == 0 and "features of 36 images" in err
        rows.append(load_model(tmp_path / name)[1]["params"]["fc"])
    np.testing.assert_allclose(rows[0]["kernel"], rows[1]["kernel"], rtol=1e-4, atol=1e-6)  # A step at a rate of 0.


def test_a_run_ends_early_after_evaluations_without_a_higher_top1():
    patience = Patience(2, before=[50.0, 60.0, 60.0])
    assert not patience.over
    patience.add(59.0)
    assert patience.over
    assert not Patience(0, before=[1.0] * 9).over


def test_early_stopping_ends_a_run_which_then_is_finished(pictures, weights, tmp_path, call):
    argv = options(pictures, weights, "--epochs", 9, "--eval-every", 1, "--patience", 1, "--learning-rate", 1e-9)
    status, out, err = call(train.main, *argv, "--workdir", tmp_path / "run")
    assert status == 0 and "ends early: 1 evaluations without a higher top-1" in err and "last: step" in out
    log = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert (tmp_path / "run/finished").exists() and log.count(b'"eval"') == 2
    status, _, err = call(train.main, *argv, "--workdir", tmp_path / "run")
    assert status == 0 and (tmp_path / "run/metrics.jsonl").read_bytes() == log


def test_balanced_weights_are_scikit_learns_and_leave_classes_without_images_out():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 3], [5, 50, 20])
    read = lambda index: Example(str(index), b"", int(labels[index]))  # noqa: E731
    ours = class_weights("balanced", Source(75, read, 4, None, labels.tolist))
    theirs = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    np.testing.assert_allclose(ours[[0, 1, 3]], theirs, rtol=1e-6)
    assert np.isfinite(ours).all() and balanced_weights(np.array([7, 7])).tolist() == [1, 1]


@pytest.mark.parametrize("present", [[0, 1, 2], [0, 2], [1, 3]])
def test_a_fitted_classifier_predicts_as_scikit_learns_on_standardized_features(present):
    rng = np.random.default_rng(0)
    labels = rng.choice(present, 80)
    features = rng.normal(size=(80, 6)) * [1, 10, 0.1, 1, 1, 0] + labels[:, None]
    kernel, bias = fit_classifier(features, labels, 4, np.ones(80))
    found = (features @ kernel + bias).argmax(1)
    scaled = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
    theirs = LogisticRegression(C=1 / (0.03 * 80), max_iter=1000).fit(scaled, labels).predict(scaled)
    assert_array_equal(found, theirs)
    with pytest.raises(InputError, match="all training images are of one class"):
        fit_classifier(features, np.zeros(80, int), 4, np.ones(80))


def test_predictions_as_json_lines_and_csv_hold_the_same(ten_classes, tmp_path, call, refused):
    model, data = ten_classes
    words = (data, "--checkpoint", model, "--topk", 3)
    for name in ("rows.csv", "rows.jsonl"):
        assert call(predict.main, *words, "--out", tmp_path / name)[0] == 0
    objects = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(objects) == 12
    for row, told in zip(rows, objects, strict=True):
        assert row["image"] == told["image"]
        for number, entry in enumerate(told["topk"], start=1):
            found = {name: row[f"{name}_{number}"] for name in ("label", "class", "score")}
            assert found == {name: str(value) for name, value in entry.items()}
    out = call(predict.main, *words, "--json")[1]
    assert [json.loads(line) for line in out.splitlines()] == objects
    assert "use .csv or .jsonl" in refused(predict.main, *words, "--out", tmp_path / "rows.txt")


def test_a_network_learns_and_is_evaluated_on_rectangles(pictures, weights, tmp_path, call):
    argv = options(pictures, weights, "--image-size", "64x96", "--epochs", 1, "--workdir", tmp_path / "run")
    status, _, err = call(train.main, *argv)
    assert status == 0, err
    _, _, info = load_model(tmp_path / "run")
    assert info.preprocess.crop == (64, 96) and json.loads((tmp_path / "run/model.json").read_text())
    status, out, _ = call(evaluate.main, "--checkpoint", tmp_path / "run", "--data", pictures)
    assert status == 0 and figures_of(out)["images"] == 9
    assert snet.get_model(tmp_path / "run").preprocess(pictures / "red/0.png").shape == (1, 64, 96, 3)
    assert TrainConfig(data="x", image_size=(64, 64)) == TrainConfig(data="x", image_size=64)
