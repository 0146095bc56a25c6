"""`eval.py --report`: what a model gets right and wrong on a data set, as one self-contained page of HTML."""

import base64
import io
from typing import NamedTuple

import jinja2
import numpy as np
from matplotlib import colormaps
from PIL import Image
from scipy.special import logsumexp
from scipy.stats import norm

from ..data.labels import class_name
from .classes import ClassRow, ClassScores, Share, class_rows, confused_pairs, confusion_matrix, share_of

BINS = 15  # Of confidence, as Guo et al. (ICML 2017) have them.
CONFUSED, SUREST = 20, 12
THUMBNAIL = 168  # Pixels a side.
MOST_DRAWN = 40  # Classes of a confusion matrix on the page.


class Mean(NamedTuple):
    """A mean loss, with its 95 % interval by the normal distribution; None for a single image."""

    value: float
    low: float | None
    high: float | None


class Bin(NamedTuple):
    """Images whose first class has a probability from `low` up to `high`."""

    low: float
    high: float
    images: int
    confidence: float  # Mean probability of the first class, 0 to 1; 0 for an empty bin.
    accuracy: float  # Share that is right, 0 to 1; 0 for an empty bin.


class Mistake(NamedTuple):
    """An image whose first class is wrong."""

    place: int  # In the data.
    label: int
    predicted: int
    probability: float


class Summary(NamedTuple):
    """All figures of a report."""

    images: int
    top1: Share
    top5: Share
    loss: Mean  # Cross-entropy, in nats; of several labels, that of the probability of any.
    # ECE: the mean distance of accuracy from confidence over the bins, in percent. It has no interval: chance alone
    # makes it larger, and makes that of a resample larger again, so that a bootstrap's interval lies too high.
    calibration_error: float
    bins: list[Bin]
    means: dict[str, float]  # Precision, recall and F1 over the classes, and balanced accuracy, in percent.
    confusion: np.ndarray | None  # As `confusion_matrix` has it; None for more than MOST_DRAWN classes.
    classes: list[ClassRow]  # Those with images, the worst first.
    confused: list[tuple[int, int, int]]  # (label, predicted, images), the most frequent first.
    pairs: int  # All that are confused.
    surest: list[Mistake]  # The surest first.


def summarise(rows):
    """Return the Summary of Predictions; of several labels the likeliest counts."""
    (labels, _), logits = rows.first_classes(), np.asarray(rows.logits, np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    predicted, right = order[:, 0], order[:, 0] == labels
    normalizers = logsumexp(logits, axis=1)
    confidence = np.exp(logits.max(1) - normalizers)
    bins = _bins(confidence, right)
    wrong = np.flatnonzero(~right)
    num_classes = logits.shape[1]
    confused = confused_pairs(labels, predicted)
    return Summary(
        images=len(labels),
        top1=share_of(int(right.sum()), len(labels)),
        top5=share_of(int((order == labels[:, None]).any(1).sum()), len(labels)),
        loss=_mean(normalizers - _of_labels(logits, np.asarray(rows.label).reshape(len(labels), -1))),
        calibration_error=100 * sum(b.images * abs(b.accuracy - b.confidence) for b in bins) / len(labels),
        bins=bins,
        means=ClassScores(labels, predicted, num_classes).means,
        confusion=confusion_matrix(labels, predicted, num_classes) if num_classes <= MOST_DRAWN else None,
        classes=class_rows(labels, predicted, num_classes),
        confused=confused[:CONFUSED],
        pairs=len(confused),
        surest=[
            Mistake(int(i), int(labels[i]), int(predicted[i]), float(confidence[i]))
            for i in wrong[np.argsort(-confidence[wrong], kind="stable")][:SUREST]
        ],
    )


def _of_labels(logits, labels):
    """(N,): the logarithm of the sum of the exponentials at labels (N, K), where -1 is none."""
    own = np.where(labels >= 0, np.take_along_axis(logits, np.maximum(labels, 0), axis=1), -np.inf)
    return logsumexp(own, axis=1)


def _mean(losses):
    mean = float(losses.mean())
    if len(losses) == 1:
        return Mean(mean, None, None)
    half = norm.ppf(0.975) * float(losses.std(ddof=1)) / len(losses) ** 0.5
    return Mean(mean, max(0.0, mean - half), mean + half)  # No loss is negative.


def _bins(confidence, right):
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    found = []
    for number in range(BINS):
        here = places == number
        means = (float(confidence[here].mean()), float(right[here].mean())) if here.any() else (0.0, 0.0)
        found.append(Bin(number / BINS, (number + 1) / BINS, int(here.sum()), *means))
    return found


def make_report(rows, model, source, *, title, command):
    """The page, as text.

    Args:
      rows: the Predictions for all images, in the order of the source.
      model: a Model, for the class-activation maps of the surest mistakes.
      source: the Source that was evaluated.
      title: what was evaluated on what.
      command: what was typed.
    """
    summary = summarise(rows)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        summary=summary,
        title=title,
        command=command,
        named=lambda label: class_name(model.info.classes, label),
        range=range,
        preparation=in_words(model.info.preprocess),
        mistakes=[(mistake, rows.name[mistake.place], *pictures(model, source, mistake)) for mistake in summary.surest],
    )


def pictures(model, source, mistake):
    """(the image as the network sees it, the same with its class-activation map), as data URLs."""
    example = source[mistake.place]
    crop = model.preprocess(example.image, name=example.name)
    conv5 = np.asarray(model.extract_feat(crop)["conv5"])[0]
    longest = max(model.info.preprocess.size)
    size = tuple(round(side * THUMBNAIL / longest) for side in model.info.preprocess.size[::-1])
    plain = Image.fromarray(crop[0].squeeze()).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    seen = Image.fromarray(np.uint8(255 * model.class_activation_map(conv5, mistake.predicted)))
    seen = np.asarray(seen.resize(plain.size, Image.Resampling.BICUBIC)) / 255
    alpha = (0.15 + 0.5 * seen)[..., None]
    mixed = np.asarray(plain) * (1 - alpha) + 255 * colormaps["inferno"](seen)[..., :3] * alpha
    return as_url(plain), as_url(Image.fromarray(np.uint8(mixed)))


def as_url(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def in_words(preprocess):
    """How images are prepared, in a sentence."""
    exif = "applied" if preprocess.decoder == "cv2" else "ignored"
    backend = "OpenCV's bilinear" if preprocess.backend == "cv2" else "Pillow's antialiased bilinear"
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (preprocess.mean, preprocess.std))
    scaled = "" if preprocess.scale == 1 else f" times {preprocess.scale:.6g}"
    return (
        f"decoded with EXIF's rotation {exif}; short side to {preprocess.resize} pixels by {backend}; "
        f"the central {preprocess.size[0]} x {preprocess.size[1]}; "
        f"{preprocess.channel_order}{scaled}, minus ({mean}), over ({std})"
    )
