"""Whether two ways to predict the same images really differ: which images flip, and how easily chance does as much."""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from ..data.decoding import decode
from ..errors import InputError


class Flip(NamedTuple):
    """An image whose first class differs."""

    name: str
    label: int
    first: int
    second: int


class Comparison(NamedTuple):
    """Two predictions of the same images, beside each other; counts are of images whose first class is right."""

    both: int
    first_only: int
    second_only: int
    neither: int
    agreement: float  # Images with the same first class, right or wrong, in percent.
    p_value: float  # Of McNemar's exact test: how likely so uneven a split of the flips is by chance.
    flips: list[Flip]


def compare(first, second):
    """The Comparison of two predictions.

    Args:
      first, second: Predictions of the same images, with names.
    Raises:
      InputError: they are of different images.
    """
    for what in ("name", "label"):
        if not np.array_equal(getattr(first, what), getattr(second, what)):
            raise InputError(f"the predictions to compare are of other images: each {what} must be the same, in order")
    classes = [rows.logits.argmax(1) for rows in (first, second)]
    labels = first.label.reshape(len(first.name), -1)
    right = [(found[:, None] == labels).any(1) for found in classes]
    first_only, second_only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    differing = np.flatnonzero(classes[0] != classes[1])
    return Comparison(
        both=int((right[0] & right[1]).sum()),
        first_only=first_only,
        second_only=second_only,
        neither=int((~right[0] & ~right[1]).sum()),
        agreement=100 * float((classes[0] == classes[1]).mean()),
        p_value=mcnemar(first_only, second_only),
        flips=[Flip(str(first.name[i]), int(labels[i, 0]), *(int(c[i]) for c in classes)) for i in differing],
    )


def decoded_by(source, decoder, *, oriented):
    """The Source with its images decoded by "cv2" or "pillow", turned as EXIF says or not, whichever decodes."""

    def read(index):
        example = source[index]
        if not isinstance(example.image, bytes):
            return example
        return example._replace(image=decode(example.image, decoder, example.name, oriented=oriented))

    return dataclasses.replace(source, read=read)


def mcnemar(first_only, second_only):
    """The two-sided p-value of McNemar's exact test (McNemar 1947), from the images that only one of two gets right."""
    return float(binomtest(first_only, first_only + second_only).pvalue) if first_only + second_only else 1.0
