"""How a network fares class by class: precision, recall, F1, which classes it confuses, and intervals of shares."""

from collections import Counter
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

MEANS = ("precision", "recall", "f1", "balanced_accuracy")  # Over the classes, as `ClassScores.means` has them.


class Share(NamedTuple):
    """A part of the images, in percent, with its 95 % interval (Wilson 1927)."""

    right: int
    percent: float
    low: float
    high: float


def share_of(right: int, images: int) -> Share:
    """Return the Share of the images that are right."""
    interval = binomtest(right, images).proportion_ci(method="wilson")
    return Share(right, 100 * right / images, 100 * interval.low, 100 * interval.high)


class ClassScores:
    """Precision, recall and F1 of each class, and their means over the classes, as scikit-learn defines them.

    Attributes:
      images: int (num_classes,), images of each class.
      predicted: int (num_classes,), how often each class was predicted.
      right: int (num_classes,), how often rightly.
    """

    def __init__(self, labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> None:
        """Count.

        Args:
          labels: int (N,), the class of each image.
          predicted: int (N,), the class that each image was taken for.
          num_classes: of the network.
        """

        def counts(numbers: np.ndarray) -> np.ndarray:
            return np.bincount(numbers, minlength=num_classes)

        self.images, self.predicted = counts(labels), counts(predicted)
        self.right = counts(labels[labels == predicted])

    @cached_property
    def precision(self) -> np.ndarray:
        """Percent (num_classes,) of what was taken for a class that is of it; 0 where nothing was."""
        return 100 * self.right / np.maximum(self.predicted, 1)

    @cached_property
    def recall(self) -> np.ndarray:
        """Percent (num_classes,) of the images of a class that were taken for it; 0 where it has none."""
        return 100 * self.right / np.maximum(self.images, 1)

    @cached_property
    def f1(self) -> np.ndarray:
        """The harmonic mean (num_classes,) of precision and recall, in percent."""
        return 200 * self.right / np.maximum(self.images + self.predicted, 1)

    @cached_property
    def means(self) -> dict[str, float]:
        """Return {"precision", "recall", "f1", "balanced_accuracy"} in percent, every class counting alike.

        The first three are over the classes that occur as labels or predictions; balanced accuracy is the mean recall
        of those that occur as labels.
        """
        occurs = self.images + self.predicted > 0
        means = {name: float(getattr(self, name)[occurs].mean()) for name in ("precision", "recall", "f1")}
        return {**means, "balanced_accuracy": float(self.recall[self.images > 0].mean())}


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return int (num_classes, num_classes): how often images of each class (rows) were taken for each (columns)."""
    places = np.int64(labels) * num_classes + predicted
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def confused_pairs(labels: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (label, predicted, images) of all pairs of classes that are confused, the most frequent first."""
    wrong = labels != predicted
    counts = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    return [(*pair, count) for pair, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


class ClassRow(NamedTuple):
    """How a class fares."""

    label: int
    images: int
    right: int
    taken_for: int | None  # The wrong class that its images are taken for most often.
    precision: float  # Percent, as recall and F1.
    recall: float
    f1: float


def class_rows(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> list[ClassRow]:
    """Return a ClassRow for each class that has images, the worst first."""
    scores = ClassScores(labels, predicted, num_classes)
    mistakes: dict[int, int] = {}
    for label, other, _ in confused_pairs(labels, predicted):
        mistakes.setdefault(label, other)
    rows = [
        ClassRow(
            label,
            int(scores.images[label]),
            int(scores.right[label]),
            mistakes.get(label),
            *(float(values[label]) for values in (scores.precision, scores.recall, scores.f1)),
        )
        for label in np.flatnonzero(scores.images).tolist()
    ]
    return sorted(rows, key=lambda row: (row.right / row.images, -row.images, row.label))
