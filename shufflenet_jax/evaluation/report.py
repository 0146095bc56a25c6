"""`eval.py --report`: what a model gets right and wrong on a data set, as one self-contained page of HTML."""

import base64
import io
from collections import Counter, defaultdict
from typing import NamedTuple

import jinja2
import numpy as np
from matplotlib import colormaps
from PIL import Image
from scipy.special import logsumexp
from scipy.stats import binomtest, norm

from ..data.labels import class_name
from .ranking import likeliest

BINS = 15  # Of confidence, as Guo et al. (ICML 2017) have them.
CONFUSED, SUREST = 20, 12
THUMBNAIL = 168  # Pixels a side.


class Share(NamedTuple):
    """A part of the images, in percent, with its 95 % interval (Wilson 1927)."""

    right: int
    percent: float
    low: float
    high: float


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


class ClassRow(NamedTuple):
    """How a class fares."""

    label: int
    images: int
    right: int
    taken_for: int | None  # The wrong class that its images are taken for most often.


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
    classes: list[ClassRow]  # Those with images, the worst first.
    confused: list[tuple[int, int, int]]  # (label, predicted, images), the most frequent first.
    pairs: int  # All that are confused.
    surest: list[Mistake]  # The surest first.


def summarise(rows):
    """Return the Summary of Predictions; of several labels the likeliest counts."""
    labels, logits = np.asarray(likeliest(rows.logits, rows.label)), np.asarray(rows.logits, np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    predicted, right = order[:, 0], order[:, 0] == labels
    normalizers = logsumexp(logits, axis=1)
    confidence = np.exp(logits.max(1) - normalizers)
    bins = _bins(confidence, right)
    wrong = np.flatnonzero(~right)
    confused = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    return Summary(
        images=len(labels),
        top1=_share(int(right.sum()), len(labels)),
        top5=_share(int((order == labels[:, None]).any(1).sum()), len(labels)),
        loss=_mean(normalizers - _of_labels(logits, np.asarray(rows.label).reshape(len(labels), -1))),
        calibration_error=100 * sum(b.images * abs(b.accuracy - b.confidence) for b in bins) / len(labels),
        bins=bins,
        classes=_classes(labels, predicted),
        confused=[(*pair, n) for pair, n in sorted(confused.items(), key=lambda item: (-item[1], item[0]))[:CONFUSED]],
        pairs=len(confused),
        surest=[
            Mistake(int(i), int(labels[i]), int(predicted[i]), float(confidence[i]))
            for i in wrong[np.argsort(-confidence[wrong], kind="stable")][:SUREST]
        ],
    )


def _share(right, images):
    interval = binomtest(right, images).proportion_ci(method="wilson")
    return Share(right, 100 * right / images, 100 * interval.low, 100 * interval.high)


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


def _classes(labels, predicted):
    taken = defaultdict(Counter)
    for label, found in zip(labels.tolist(), predicted.tolist(), strict=True):
        taken[label][found] += 1
    rows = []
    for label, counts in taken.items():
        wrong = [(found, count) for found, count in counts.most_common() if found != label]
        rows.append(ClassRow(label, counts.total(), counts[label], wrong[0][0] if wrong else None))
    return sorted(rows, key=lambda row: (row.right / row.images, -row.images, row.label))


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
        preparation=in_words(model.info.preprocess),
        mistakes=[(mistake, rows.name[mistake.place], *pictures(model, source, mistake)) for mistake in summary.surest],
    )


def pictures(model, source, mistake):
    """(the image as the network sees it, the same with its class-activation map), as data URLs."""
    example = source[mistake.place]
    crop = model.preprocess(example.image, name=example.name)
    conv5 = np.asarray(model.extract_feat(crop)["conv5"])[0]
    plain = Image.fromarray(crop[0].squeeze()).convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
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
        f"the central {preprocess.crop} x {preprocess.crop}; "
        f"{preprocess.channel_order}{scaled}, minus ({mean}), over ({std})"
    )
