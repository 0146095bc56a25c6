"""Plots of a training run: its curves, and the learning rate that it will have."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import InputError
from ..files import written_aside
from ..shapes import Array
from .logs import METRICS, read_metrics

PANELS = {  # {figure: (label, scale, splits that have it)}
    "loss": ("loss", "log", ("train", "eval", "eval_ema")),
    "top1": ("top-1 accuracy (%)", "linear", ("train", "eval", "eval_ema")),
    "lr": ("learning rate", "linear", ("train",)),
}
STYLES = {
    "train": {"color": "tab:blue"},
    "eval": {"color": "tab:orange", "marker": "o"},
    "eval_ema": {"color": "tab:green", "marker": "s"},
}


def plot_curves(workdir: Path, *, title: str | None = None) -> Path:
    """Draw loss, accuracy and learning rate over the epochs of workdir/metrics.jsonl into workdir/curves.png.

    Args:
      workdir: folder of the run.
      title: of the plot; None means the folder's name.

    Returns:
      The path of the plot.

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
        # A loss that is always zero, as with a single class, does not fit on a logarithmic axis.
        positive = any(max(line.get_ydata()) > 0 for line in axes.lines)
        _over_epochs(axes, ylabel=label, yscale=scale if positive else "linear")
    if figure.axes[0].lines:
        figure.axes[0].legend(frameon=False)
    figure.suptitle(title or workdir.name, parse_math=False)
    target = workdir / "curves.png"
    with written_aside(target) as draft:
        figure.savefig(draft)
    return target


def plot_schedule(epochs: Sequence[float] | Array, rates: Sequence[float] | Array, target: Path) -> None:
    """Draw the learning rate over the epochs into a PNG file.

    Args:
      epochs: (N,), the epoch of each point.
      rates: (N,), its learning rate.
      target: path of the file.
    """
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, rates, linewidth=1.2)
    _over_epochs(axes, ylabel="learning rate")
    with written_aside(target) as draft:
        figure.savefig(draft, format="png")


def _over_epochs(axes: Axes, **settings: str) -> None:
    axes.set(xlabel="epoch", **settings)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
