import json

import numpy as np
import pytest
from conftest import figures_of
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn import metrics

from shufflenet_jax.commands import evaluate
from shufflenet_jax.evaluation.classes import ClassScores, class_rows, confused_pairs, confusion_matrix, share_of
from shufflenet_jax.evaluation.predictions import read_predictions
from shufflenet_jax.plots import plot_confusion


@pytest.mark.parametrize("classes", [2, 5, 60])
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_classes_are_those_of_scikit_learn(classes, seed):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, classes, 50), rng.integers(0, classes, 50)
    scores, present = ClassScores(labels, predicted, classes), np.unique(labels)
    theirs = metrics.precision_recall_fscore_support(labels, predicted, labels=range(classes), zero_division=0)
    for ours, wanted in zip((scores.precision, scores.recall, scores.f1), theirs, strict=False):
        assert_allclose(ours, 100 * wanted, rtol=1e-12)
    assert_array_equal(scores.images, theirs[3])
    means = metrics.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)[:3]
    recall = metrics.recall_score(labels, predicted, labels=present, average="macro")
    wanted = [*means, recall]  # balanced_accuracy_score warns of classes without images.
    assert_allclose(list(scores.means.values()), np.multiply(100, wanted), rtol=1e-12)
    assert list(scores.means) == ["precision", "recall", "f1", "balanced_accuracy"]
    matrix = confusion_matrix(labels, predicted, classes)
    assert_array_equal(matrix, metrics.confusion_matrix(labels, predicted, labels=range(classes)))
    for label, other, count in confused_pairs(labels, predicted):
        assert label != other and matrix[label, other] == count
    rows = class_rows(labels, predicted, classes)
    assert [row.recall for row in rows] == sorted(row.recall for row in rows) and len(rows) == len(present)


def test_a_share_has_wilsons_interval():
    # Newcombe (Statistics in Medicine 1998), table I, method 3.
    found = share_of(81, 263)
    assert_allclose((found.low, found.high), (25.53, 36.62), atol=0.005)


def test_eval_gives_each_class_and_a_picture_of_what_is_taken_for_what(ten_classes, tmp_path, call):
    model, data = ten_classes
    files = ("--predictions", tmp_path / "p.npz", "--confusion", tmp_path / "confusion.png")
    status, out, _ = call(evaluate.main, "--checkpoint", model, "--data", data, "--per-class", *files)
    figures, kept = figures_of(out), read_predictions(tmp_path / "p.npz")
    assert status == 0 and figures["images"] == 12
    matrix = confusion_matrix(kept.label, kept.logits.argmax(1), 10)
    assert figures["confusion"] == matrix.tolist()
    assert [row["class"] for row in figures["per_class"]] == [f"kind{i}" for i in range(6)]
    for row in figures["per_class"]:
        label = row["label"]
        assert (row["images"], row["right"]) == (2, matrix[label, label])
        assert row["recall"] == pytest.approx(50 * matrix[label, label])
        assert row["precision"] == pytest.approx(100 * matrix[label, label] / max(matrix[:, label].sum(), 1), abs=0.01)
    assert figures["balanced_accuracy"] == pytest.approx(100 * np.trace(matrix) / 12, abs=0.01)
    assert out.splitlines()[0].split() == ["class", "images", "precision", "recall", "F1"]
    assert len(out.splitlines()) == 8 and json.loads(out.splitlines()[-1])
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_a_confusion_matrix_of_many_classes_is_a_picture_of_bounded_size(tmp_path):
    plot_confusion(np.eye(1000, dtype=int), [str(number) for number in range(1000)], tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as picture:
        assert max(picture.size) < 2000
