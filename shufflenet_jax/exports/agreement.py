"""Comparison of an exported file's outputs with our network's, on real images."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from ..errors import Unchecked
from ..evaluation.ranking import label_ranks
from ..shapes import Array

Output = TypeVar("Output")  # An array of JAX, NumPy or PyTorch.
Outputs = Sequence[Array]


@runtime_checkable
class Preparing(Protocol):
    """A network that prepares images: inference.Model, which depends on this module."""

    def preprocess(self, image: Unchecked) -> np.ndarray:
        """Return a uint8 crop (1, H, W, C) of an image."""


# A share of the largest output. float32 rounds 6e-8 per operation, some 50 layers deep: 1e-6 with trained weights, up
# to 2e-5 with random ones, which amplify it; a wrong weight or operation shows in the second digit.
TOLERANCE = 1e-4


class Agreement(NamedTuple):
    """The difference of an exported file's outputs from ours.

    Attributes:
      images: number of images.
      difference: the largest one of any number, in the output that differs most.
      largest: our largest number in that output.
      agreeing: number of images for which both predict the same class.
      ours: our correct predictions (top-1, top-5); (0, 0) without labels.
      theirs: those of the file.
    """

    images: int
    difference: float
    largest: float
    agreeing: int
    ours: tuple[int, int]
    theirs: tuple[int, int]

    @property
    def share(self) -> float:
        """The difference as a share of the largest number."""
        return self.difference / (self.largest or 1.0)

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.share <= TOLERANCE


def measure_agreement(
    ours: Callable[[np.ndarray], Outputs],
    theirs: Callable[[np.ndarray], Outputs],
    batches: Iterable[Mapping[str, np.ndarray]],
) -> Agreement:
    """Run our network and an exported file on the same images.

    Args:
      ours: function of uint8 images (B, H, W, C) to outputs (B, ...). With labels, the first of them is the logits.
      theirs: the same for the file.
      batches: {"images", "mask"} and, to count correct predictions, "labels", as from `data.pipeline.eval_batches`.
    """
    images = agreeing = 0
    extremes = np.zeros((2, 1))  # For each output the largest difference, and our largest number.
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
    (our_top1, our_top5), (their_top1, their_top5) = correct.tolist()
    difference, largest = extremes[:, worst].tolist()
    return Agreement(images, difference, largest, agreeing, (our_top1, our_top5), (their_top1, their_top5))


def last(logits: Output | None, features: Mapping[str, Output]) -> Output:
    """Return the output by which weights are compared: logits, or the last feature of a backbone.

    Args:
      logits: (B, num_classes), or None.
      features: of the network.
    """
    return logits if logits is not None else features.get("pooled", features["stage4"])


def nchw(images: Float[Array, "batch height width channels"]) -> Float[np.ndarray, "batch channels height width"]:
    """Transpose (B, H, W, C) to (B, C, H, W).

    Args:
      images: (B, H, W, C).
    """
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def nhwc(outputs: Array) -> Array:
    """Transpose (B, C, H, W) to (B, H, W, C); return arrays without pixels as they are.

    Args:
      outputs: (B, C, H, W) or (B, C).
    """
    return outputs.transpose(0, 2, 3, 1) if outputs.ndim == 4 else outputs


def example_pictures() -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
    """Return the photographs inside scikit-learn: {name: uint8 (H, W, 3)}."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images()
    return dict(zip(map(os.path.basename, pictures.filenames), pictures.images, strict=True))


def photographs(model: Preparing, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of parts of the two photographs inside scikit-learn, without labels.

    Args:
      model: prepares the images.
      batch_size: images of each batch; the last one is padded.

    Yields:
      {"images": uint8 (B, H, W, C), "mask": (B,), 0 for padding}.
    """
    parts = []
    for picture in example_pictures().values():
        height, width = picture.shape[:2]
        halves = [slice(None), slice(height // 2), slice(height // 2, None)]
        parts += [model.preprocess(picture[rows, : width // 2 if rows.stop else None])[0] for rows in halves]
    crops = np.stack(parts)
    for start in range(0, len(crops), batch_size):
        images = crops[start : start + batch_size]
        mask = np.arange(batch_size) < len(images)
        padding = np.zeros((batch_size - len(images), *crops.shape[1:]), np.uint8)
        yield {"images": np.concatenate([images, padding]), "mask": mask.astype(np.float32)}
