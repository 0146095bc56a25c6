"""Figures per class: precision, recall, F1, confused classes, and intervals of shares."""

from collections import Counter
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest

Labels = Int[np.ndarray, " images"]
Counts = Int[np.ndarray, " classes"]
Percents = Float[np.ndarray, " classes"]

MEANS = ("precision", "recall", "f1", "balanced_accuracy")  # Over the classes, as `ClassScores.means` has them.


class Share(NamedTuple):
    """A share of the images with its 95 % interval (Wilson 1927).

    Attributes:
      right: number of images in it.
      percent: of all images.
      low: lower end of the interval, in percent.
      high: upper end of the interval, in percent.
    """

    right: int
    percent: float
    low: float
    high: float


def share_of(right: int, images: int) -> Share:
    """Return a share of the images, with its interval.

    Args:
      right: number of images in it.
      images: number of all images.
    """
    interval = binomtest(right, images).proportion_ci(method="wilson")
    return Share(right, 100 * right / images, 100 * interval.low, 100 * interval.high)


class ClassScores:
    """Precision, recall and F1 of each class, and their means over the classes, as scikit-learn defines them.

    Attributes:
      images: int (num_classes,), images of each class.
      predicted: int (num_classes,), how often each class was predicted.
      right: int (num_classes,), how often each class was predicted correctly.
    """

    def __init__(self, labels: Labels, predicted: Labels, num_classes: int) -> None:
        """Count.

        Args:
          labels: int (N,), the class of each image.
          predicted: int (N,), the predicted class of each image.
          num_classes: of the network.
        """

        def counts(numbers: np.ndarray) -> Counts:
            return np.bincount(numbers, minlength=num_classes)

        self.images, self.predicted = counts(labels), counts(predicted)
        self.right = counts(labels[labels == predicted])

    @cached_property
    def precision(self) -> Percents:
        """Correct predictions as percent (num_classes,) of all predictions of a class; 0 if there are none."""
        return 100 * self.right / np.maximum(self.predicted, 1)

    @cached_property
    def recall(self) -> Percents:
        """Correct predictions as percent (num_classes,) of all images of a class; 0 if there are none."""
        return 100 * self.right / np.maximum(self.images, 1)

    @cached_property
    def f1(self) -> Percents:
        """Harmonic mean (num_classes,) of precision and recall, in percent."""
        return 200 * self.right / np.maximum(self.images + self.predicted, 1)

    @cached_property
    def means(self) -> dict[str, float]:
        """Means {"precision", "recall", "f1", "balanced_accuracy"} over the classes, in percent.

        The first three are over the classes that occur as labels or predictions. Balanced accuracy is the mean recall
        of those that occur as labels.
        """
        occurs = self.images + self.predicted > 0
        means = {name: float(getattr(self, name)[occurs].mean()) for name in ("precision", "recall", "f1")}
        return {**means, "balanced_accuracy": float(self.recall[self.images > 0].mean())}


def confusion_matrix(labels: Labels, predicted: Labels, num_classes: int) -> Int[np.ndarray, "classes classes"]:
    """Count how often images of each class (rows) were predicted as each class (columns).

    Args:
      labels: int (N,), the class of each image.
      predicted: int (N,), the predicted class of each image.
      num_classes: of the network.

    Returns:
      int (num_classes, num_classes).
    """
    places = np.int64(labels) * num_classes + predicted
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def confused_pairs(labels: Labels, predicted: Labels) -> list[tuple[int, int, int]]:
    """Return (label, predicted, images) of all pairs of confused classes, the most frequent first.

    Args:
      labels: int (N,), the class of each image.
      predicted: int (N,), the predicted class of each image.
    """
    wrong = labels != predicted
    counts = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    return [(*pair, count) for pair, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


class ClassRow(NamedTuple):
    """The figures of a class.

    Attributes:
      label: of the class.
      images: of the class.
      right: number of images with a correct prediction.
      taken_for: the most frequent wrong prediction for its images, or None.
      precision: in percent.
      recall: in percent.
      f1: in percent.
    """

    label: int
    images: int
    right: int
    taken_for: int | None
    precision: float
    recall: float
    f1: float


def class_rows(labels: Labels, predicted: Labels, num_classes: int) -> list[ClassRow]:
    """Return a ClassRow for each class that has images, the worst first.

    Args:
      labels: int (N,), the class of each image.
      predicted: int (N,), the predicted class of each image.
      num_classes: of the network.
    """
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
