"""Plots of images as a network sees them, of their predictions, and of confused classes."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import printable, written_aside

# An image, its classes and its class-activation map; images have different sizes.
Prediction = tuple[UInt8[np.ndarray, "_ _ _"], dict[str, Any], Float[np.ndarray, "_ _"] | None]

MOST_BARS = 8  # Beside an image.
MOST_NAMED = 40  # Classes whose names and counts fit into a confusion matrix.


def plot_batch(batch: Mapping[str, np.ndarray], titles: Sequence[str], target: str | Path) -> None:
    """Draw the images of a training batch, as the network sees them except for normalization, into a PNG file.

    Args:
      batch: {"images": uint8 (B, H, W, C)} and, if they apply, "flip" and "erase" as in
        `data.augmentation.training_row`.
      titles: for each image.
      target: path of the file.
    """
    columns = 8
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(1.6 * columns, 1.8 * rows), dpi=110, layout="constrained")
    for index, (axes, title) in enumerate(zip(figure.subplots(rows, columns, squeeze=False).flat, titles, strict=True)):
        image = batch["images"][index]
        if "flip" in batch and batch["flip"][index]:
            image = image[:, ::-1]
        if "erase" in batch:
            top, left, height, width = batch["erase"][index]
            image = image.copy()
            image[top : top + height, left : left + width] = 127
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title[:22], fontsize=7, parse_math=False)
        axes.axis("off")
    with written_aside(target) as draft:
        figure.savefig(draft, format="png")


def plot_predictions(predictions: Sequence[Prediction], target: str | Path) -> None:
    """Draw images with their predicted classes, most likely first, into a PNG file.

    Args:
      predictions: [(uint8 (H, W, C), {"image": name, "topk": [{"class", "score"}]}, class-activation map or None)].
      target: path of the file.
    """
    columns = min(3, len(predictions))
    rows = -(-len(predictions) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.5 * rows), dpi=130, layout="constrained")
    grid = figure.subfigures(rows, columns, squeeze=False)
    for place, (image, row, cam) in zip(grid.flat, predictions, strict=False):
        left, right = place.subplots(1, 2, width_ratios=(1, 1.1))
        height, width = image.shape[:2]
        left.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        if cam is not None:
            left.imshow(
                cam,
                cmap="inferno",
                alpha=0.15 + 0.5 * cam,
                interpolation="bilinear",
                vmin=0,
                vmax=1,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
        left.axis("off")
        left.set_title(printable(Path(row["image"]).name)[-28:], fontsize=8, loc="left", parse_math=False)
        _bars(right, row["topk"][:MOST_BARS])
    _save(figure, target)


def plot_confusion(matrix: Int[np.ndarray, "classes classes"], names: Sequence[str], target: str | Path) -> None:
    """Draw a confusion matrix into a PNG file: colors by the share of the row, and numbers if they are readable.

    Args:
      matrix: int (num_classes, num_classes), labels in rows.
      names: of the classes.
      target: path of the file.
    """
    count = len(names)
    side = min(2.5 + 0.42 * count, 14)
    figure = Figure(figsize=(side + 0.6, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="% of the class")
    axes.set(xlabel="taken for", ylabel="class")
    if count <= MOST_NAMED:
        axes.set_xticks(range(count), [printable(name)[:20] for name in names], rotation=90, parse_math=False)
        axes.set_yticks(range(count), [printable(name)[:20] for name in names], parse_math=False)
        for place in zip(*np.nonzero(matrix), strict=True):
            color = "white" if shares[place] > 60 else "black"
            axes.text(place[1], place[0], str(matrix[place]), ha="center", va="center", fontsize=8, color=color)
    _save(figure, target)


def _save(figure: Figure, target: str | Path) -> None:
    """Write a PNG file. Names may be in any script; boxes replace letters that the font lacks."""
    with written_aside(target) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(draft, format="png")


def _bars(axes: Axes, best: Sequence[Mapping[str, Any]]) -> None:
    """Draw a bar for each class, with its name above it."""
    for place, entry in enumerate(best):
        axes.barh(place, 1, height=0.3, color="0.93")
        axes.barh(place, entry["score"], height=0.3, color="tab:blue")
        axes.text(0, place - 0.24, entry["class"][:26], fontsize=8, va="bottom", parse_math=False)
        axes.text(1, place - 0.24, f"{100 * entry['score']:.1f} %", fontsize=8, va="bottom", ha="right", color="0.35")
    axes.set(xlim=(0, 1), ylim=(max(len(best), 3) - 0.6, -0.8))
    axes.axis("off")
