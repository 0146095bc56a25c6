"""Comparison of two predictions of the same images: the images that change, and whether chance explains them."""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from ..data.decoding import decode
from ..data.sources import Example, Source
from ..errors import InputError
from .predictions import Predictions


class Flip(NamedTuple):
    """An image whose predicted class differs.

    Attributes:
      name: of the image.
      label: of the image.
      first: class of the first prediction.
      second: class of the second prediction.
    """

    name: str
    label: int
    first: int
    second: int


class Comparison(NamedTuple):
    """Two predictions of the same images, compared.

    Attributes:
      both: number of images that both predict correctly.
      first_only: number of images that only the first one predicts correctly.
      second_only: number of images that only the second one predicts correctly.
      neither: number of images that neither predicts correctly.
      agreement: images with the same class in both, right or wrong, in percent.
      p_value: of McNemar's exact test: the probability of a split this uneven by chance.
      flips: images with different classes.
    """

    both: int
    first_only: int
    second_only: int
    neither: int
    agreement: float
    p_value: float
    flips: list[Flip]


def compare(first: Predictions, second: Predictions) -> Comparison:
    """Compare two predictions of the same images.

    Args:
      first: with names.
      second: with names.

    Raises:
      InputError: they are of different images.
    """
    if first.name is None or second.name is None:
        raise InputError("the predictions to compare have no names of images")
    for what in ("name", "label"):
        if not np.array_equal(getattr(first, what), getattr(second, what)):
            raise InputError(f"the predictions to compare are of other images: each {what} must be the same, in order")
    classes = [rows.logits.argmax(1) for rows in (first, second)]
    labels = first.label.reshape(len(first.name), -1)
    right = [(predicted[:, None] == labels).any(1) for predicted in classes]
    first_only, second_only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    differing = np.flatnonzero(classes[0] != classes[1])
    return Comparison(
        both=int((right[0] & right[1]).sum()),
        first_only=first_only,
        second_only=second_only,
        neither=int((~right[0] & ~right[1]).sum()),
        agreement=100 * float((classes[0] == classes[1]).mean()),
        p_value=mcnemar(first_only, second_only),
        flips=[Flip(str(first.name[i]), int(labels[i, 0]), int(classes[0][i]), int(classes[1][i])) for i in differing],
    )


def decoded_by(source: Source, decoder: str, *, oriented: bool) -> Source:
    """Return a Source with its images decoded in one way.

    Args:
      source: of encoded images or pixels; pixels stay as they are.
      decoder: "cv2" or "pillow".
      oriented: whether to rotate images as EXIF says, with either decoder.
    """

    def read(index: int) -> Example:
        example = source[index]
        if not isinstance(example.image, bytes):
            return example
        return example._replace(image=decode(example.image, decoder, example.name, oriented=oriented))

    return dataclasses.replace(source, read=read)


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947).

    Args:
      first_only: number of images that only the first one predicts correctly.
      second_only: number of images that only the second one predicts correctly.
    """
    return float(binomtest(first_only, first_only + second_only).pvalue) if first_only + second_only else 1.0
