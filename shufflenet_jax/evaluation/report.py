"""The report of an evaluation as one self-contained page of HTML: figures, confusions, calibration, mistakes."""

import base64
import io
from typing import NamedTuple

import jinja2
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib import colormaps
from PIL import Image
from scipy.special import logsumexp
from scipy.stats import norm

from ..config import Preprocess
from ..data.labels import class_name
from ..data.sources import Source
from ..inference import Model
from .classes import ClassRow, ClassScores, Share, class_rows, confused_pairs, confusion_matrix, share_of
from .predictions import Predictions

Column = Float[np.ndarray, " images"]

BINS = 15  # Of confidence, as in Guo et al. (ICML 2017).
CONFUSED, SUREST = 20, 12
THUMBNAIL = 168  # Side in pixels.
MOST_DRAWN = 40  # Classes of a confusion matrix on the page.


class Mean(NamedTuple):
    """A mean loss, with its 95 % interval by the normal distribution.

    Attributes:
      value: the mean.
      low: lower end of the interval; None for a single image.
      high: upper end of the interval; None for a single image.
    """

    value: float
    low: float | None
    high: float | None


class Bin(NamedTuple):
    """The images whose predicted class has a probability in a range.

    Attributes:
      low: lower end of the range.
      high: upper end of the range.
      images: their number.
      confidence: mean probability of the predicted class, 0 to 1; 0 for an empty bin.
      accuracy: share of correct predictions, 0 to 1; 0 for an empty bin.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


class Mistake(NamedTuple):
    """An image with a wrong prediction.

    Attributes:
      place: of the image in the data.
      label: of the image.
      predicted: its predicted class.
      probability: of that class, 0 to 1.
    """

    place: int
    label: int
    predicted: int
    probability: float


class Summary(NamedTuple):
    """All figures of a report.

    Attributes:
      images: number of images.
      top1: share of images whose predicted class is right.
      top5: share of images with the label among the five likeliest classes.
      loss: cross-entropy in nats; of several labels, that of the probability of any.
      calibration_error: ECE: the mean distance of accuracy from confidence over the bins, in percent. It has no
        interval: chance alone makes it larger, and makes that of a resample larger again, so a bootstrap's interval
        would be too high.
      bins: images by their confidence.
      means: precision, recall and F1 over the classes, and balanced accuracy, in percent.
      confusion: from `confusion_matrix`; None for more than MOST_DRAWN classes.
      classes: figures of the classes with images, the worst first.
      confused: (label, predicted, images), the most frequent first.
      pairs: number of all pairs of confused classes.
      surest: the mistakes with the highest confidence, in its order.
    """

    images: int
    top1: Share
    top5: Share
    loss: Mean
    calibration_error: float
    bins: list[Bin]
    means: dict[str, float]
    confusion: np.ndarray | None
    classes: list[ClassRow]
    confused: list[tuple[int, int, int]]
    pairs: int
    surest: list[Mistake]


def summarise(rows: Predictions) -> Summary:
    """Return the Summary of predictions; of several labels the likeliest one counts.

    Args:
      rows: the predictions of all images.
    """
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


def _of_labels(logits: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, "images labels"]) -> Column:
    """Return the logarithm of the sum of the exponentials at labels (N, K), of which -1 is none."""
    own = np.where(labels >= 0, np.take_along_axis(logits, np.maximum(labels, 0), axis=1), -np.inf)
    return logsumexp(own, axis=1)


def _mean(losses: Column) -> Mean:
    mean = float(losses.mean())
    if len(losses) == 1:
        return Mean(mean, None, None)
    half = norm.ppf(0.975) * float(losses.std(ddof=1)) / len(losses) ** 0.5
    return Mean(mean, max(0.0, mean - half), mean + half)  # No loss is negative.


def _bins(confidence: Column, right: Bool[np.ndarray, " images"]) -> list[Bin]:
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = []
    for number in range(BINS):
        here = places == number
        means = (float(confidence[here].mean()), float(right[here].mean())) if here.any() else (0.0, 0.0)
        bins.append(Bin(number / BINS, (number + 1) / BINS, int(here.sum()), *means))
    return bins


def make_report(rows: Predictions, model: Model, source: Source, *, title: str, command: str) -> str:
    """Return the page, as text.

    Args:
      rows: the predictions of all images, with names, in the order of the source.
      model: the network, for the class-activation maps of the mistakes.
      source: the images.
      title: names the model and the data.
      command: the command that the user typed.
    """
    assert rows.name is not None  # The page shows the names.
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


def pictures(model: Model, source: Source, mistake: Mistake) -> tuple[str, str]:
    """Draw an image as the network sees it, and the same with its class-activation map.

    Args:
      model: the network.
      source: the images.
      mistake: which image, and for which class.

    Returns:
      Both as data URLs.
    """
    example = source[mistake.place]
    crop = model.preprocess(example.image, name=example.name)
    conv5 = np.asarray(model.extract_feat(crop)["conv5"])[0]
    longest = max(model.info.preprocess.size)
    height, width = (round(side * THUMBNAIL / longest) for side in model.info.preprocess.size)
    plain = Image.fromarray(crop[0].squeeze()).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small = Image.fromarray(np.uint8(255 * model.class_activation_map(conv5, mistake.predicted)))
    map_ = np.asarray(small.resize(plain.size, Image.Resampling.BICUBIC)) / 255
    alpha = (0.15 + 0.5 * map_)[..., None]
    mixed = np.asarray(plain) * (1 - alpha) + 255 * colormaps["inferno"](map_)[..., :3] * alpha
    return as_url(plain), as_url(Image.fromarray(np.uint8(mixed)))


def as_url(picture: Image.Image) -> str:
    """Encode a picture as a data URL of a JPEG.

    Args:
      picture: in RGB.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def in_words(preprocess: Preprocess) -> str:
    """Describe how images are prepared, in one sentence.

    Args:
      preprocess: of the network.
    """
    exif = "applied" if preprocess.decoder == "cv2" else "ignored"
    backend = "OpenCV's bilinear" if preprocess.backend == "cv2" else "Pillow's antialiased bilinear"
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (preprocess.mean, preprocess.std))
    scaled = "" if preprocess.scale == 1 else f" times {preprocess.scale:.6g}"
    return (
        f"decoded with EXIF's rotation {exif}; short side to {preprocess.resize} pixels by {backend}; "
        f"the central {preprocess.size[0]} x {preprocess.size[1]}; "
        f"{preprocess.channel_order}{scaled}, minus ({mean}), over ({std})"
    )
