"""Whether an exported file computes what our network does, on real images."""

import os
from typing import NamedTuple

import numpy as np

from ..evaluation.ranking import label_ranks

# A share of the largest output. float32 rounds 6e-8 an operation, some 50 layers deep: 1e-6 with trained weights, up to
# 2e-5 with random ones, which amplify it; a wrong weight or operation shows in the second digit.
TOLERANCE = 1e-4


class Agreement(NamedTuple):
    """How an exported file's outputs differ from ours."""

    images: int
    difference: float  # The largest of any number of an output: of the one that differs most, if there are several.
    largest: float  # Number of ours in that output.
    agreeing: int  # Images for which both say the same first class.
    ours: tuple  # (top-1, top-5) correct; (0, 0) without labels.
    theirs: tuple

    @property
    def share(self):
        return self.difference / (self.largest or 1.0)

    @property
    def passed(self):
        return self.share <= TOLERANCE  # NaN is not.


def measure_agreement(ours, theirs, batches):
    """Run both on the same images.

    Args:
      ours, theirs: functions of uint8 images (B, H, W, C) to lists of outputs (B, ...), as NumPy arrays. Where
        accuracy is to be counted, the first of them is the logits.
      batches: {"images", "mask"} and, where accuracy is to be counted, "labels", as `data.pipeline.eval_batches` has
        them.
    Returns:
      An Agreement.
    """
    images = agreeing = 0
    extremes = np.zeros((2, 1))  # Of each output: the largest difference, and number.
    correct = np.zeros((2, 2), int)
    for batch in batches:
        real = batch["mask"] > 0
        both = [
            [np.asarray(output, np.float64)[real] for output in function(batch["images"])]
            for function in (ours, theirs)
        ]
        with np.errstate(invalid="ignore"):  # Infinities differ by NaN, which np.maximum, unlike max, keeps.
            differences = [np.abs(our - their).max() for our, their in zip(*both, strict=True)]
        extremes = np.maximum(extremes, [differences, [np.abs(output).max() for output in both[0]]])
        images += int(real.sum())
        if "labels" in batch:
            logits = [outputs[0] for outputs in both]
            ranks = [np.asarray(label_ranks(outputs, batch["labels"][real])) for outputs in logits]
            correct += [[int((rank < most).sum()) for most in (1, 5)] for rank in ranks]
            agreeing += int((logits[0].argmax(1) == logits[1].argmax(1)).sum())
    with np.errstate(invalid="ignore"):
        worst = int(np.argmax(extremes[0] / np.where(extremes[1] > 0, extremes[1], 1)))  # NaN counts as the largest.
    return Agreement(images, *map(float, extremes[:, worst]), agreeing, *map(tuple, correct.tolist()))


def last(logits, features):
    """What weights alone are compared by: logits, or of backbones the last feature."""
    return logits if logits is not None else features.get("pooled", features["stage4"])


def nchw(images):
    """(B, H, W, C) as (B, C, H, W)."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def nhwc(outputs):
    """(B, C, H, W) as (B, H, W, C); what has no pixels stays as it is."""
    return outputs.transpose(0, 2, 3, 1) if outputs.ndim == 4 else outputs


def example_pictures():
    """The photographs inside scikit-learn: {name: uint8 (H, W, 3)}."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images()
    return dict(zip(map(os.path.basename, pictures.filenames), pictures.images, strict=True))


def photographs(model, batch_size):
    """Batches of parts of the two photographs inside scikit-learn, prepared for a Model: no labels."""
    crops = []
    for picture in example_pictures().values():
        height, width = picture.shape[:2]
        halves = [slice(None), slice(height // 2), slice(height // 2, None)]
        crops += [model.preprocess(picture[rows, : width // 2 if rows.stop else None])[0] for rows in halves]
    crops = np.stack(crops)
    for start in range(0, len(crops), batch_size):
        images = crops[start : start + batch_size]
        mask = np.arange(batch_size) < len(images)
        padding = np.zeros((batch_size - len(images), *crops.shape[1:]), np.uint8)
        yield {"images": np.concatenate([images, padding]), "mask": mask.astype(np.float32)}
