"""Pictures of a training run and of what a model sees."""

import warnings
from pathlib import Path

from matplotlib.figure import Figure

from .errors import InputError
from .files import printable, written_aside
from .training.logs import METRICS, read_metrics

PANELS = {  # figure: (label, scale, splits that have it)
    "loss": ("loss", "log", ("train", "eval", "eval_ema")),
    "top1": ("top-1 accuracy (%)", "linear", ("train", "eval", "eval_ema")),
    "lr": ("learning rate", "linear", ("train",)),
}
MOST_BARS = 8  # Beside an image.
STYLES = {
    "train": {"color": "tab:blue"},
    "eval": {"color": "tab:orange", "marker": "o"},
    "eval_ema": {"color": "tab:green", "marker": "s"},
}


def plot_curves(workdir, *, title=None):
    """Draws loss, accuracy and learning rate over the epochs of workdir/metrics.jsonl into workdir/curves.png.

    Raises:
      InputError: there is nothing to draw.
    """
    rows = read_metrics(workdir / METRICS) if (workdir / METRICS).exists() else []
    if not any(row.get(name) is not None and row["split"] in STYLES for row in rows for name in PANELS):
        raise InputError(f"{workdir} holds no {METRICS} with figures; give the workdir of a training")
    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    for axes, (name, (label, scale, splits)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for split in splits:
            drawn = [row for row in rows if row["split"] == split and row.get(name) is not None]
            points = [(row["epoch"], row[name]) for row in drawn]
            if points:
                axes.plot(*zip(*points, strict=True), label=split, markersize=3, linewidth=1.2, **STYLES[split])
        # A loss that is always zero, as of a single class, has no place on a logarithmic axis.
        positive = any(max(line.get_ydata()) > 0 for line in axes.lines)
        _over_epochs(axes, ylabel=label, yscale=scale if positive else "linear")
    if figure.axes[0].lines:
        figure.axes[0].legend(frameon=False)
    figure.suptitle(title or workdir.name, parse_math=False)
    target = workdir / "curves.png"
    with written_aside(target) as draft:
        figure.savefig(draft)
    return target


def plot_schedule(epochs, rates, target):
    """Draws the learning rate over the epochs into a PNG file."""
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, rates, linewidth=1.2)
    _over_epochs(axes, ylabel="learning rate")
    with written_aside(target) as draft:
        figure.savefig(draft, format="png")


def _over_epochs(axes, **settings):
    axes.set(xlabel="epoch", **settings)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def plot_batch(batch, titles, target):
    """Draws the images of a training batch, as the network sees them but for normalisation, into a PNG file."""
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


def plot_predictions(predictions, target):
    """Draws images with the classes seen in them, most likely first, into a PNG file.

    Args:
      predictions: [(uint8 (H, W, C), {"image": name, "topk": [{"class", "score"}]}, class-activation map or None)].
      target: the file.
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
    with written_aside(target) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # Names may be in any script; boxes stand for those.
        figure.savefig(draft, format="png")


def _bars(axes, best):
    """A bar for each class, its name above it."""
    for place, entry in enumerate(best):
        axes.barh(place, 1, height=0.3, color="0.93")
        axes.barh(place, entry["score"], height=0.3, color="tab:blue")
        axes.text(0, place - 0.24, entry["class"][:26], fontsize=8, va="bottom", parse_math=False)
        axes.text(1, place - 0.24, f"{100 * entry['score']:.1f} %", fontsize=8, va="bottom", ha="right", color="0.35")
    axes.set(xlim=(0, 1), ylim=(max(len(best), 3) - 0.6, -0.8))
    axes.axis("off")
