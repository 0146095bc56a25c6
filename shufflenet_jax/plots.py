"""Pictures of a training run."""

from matplotlib.figure import Figure

from .errors import InputError
from .files import written_aside
from .logs import METRICS, read_metrics

PANELS = {  # figure: (label, scale, splits that have it)
    "loss": ("loss", "log", ("train", "eval", "eval_ema")),
    "top1": ("top-1 accuracy (%)", "linear", ("train", "eval", "eval_ema")),
    "lr": ("learning rate", "linear", ("train",)),
}
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
    rows = read_metrics(workdir / METRICS) if (workdir / METRICS).is_file() else []
    if not rows:
        raise InputError(f"{workdir} holds no {METRICS} with figures; give the workdir of a training")
    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    for axes, (name, (label, scale, splits)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for split in splits:
            points = [(row["epoch"], row[name]) for row in rows if row["split"] == split]
            if points:
                axes.plot(*zip(*points, strict=True), label=split, markersize=3, linewidth=1.2, **STYLES[split])
        _over_epochs(axes, ylabel=label, yscale=scale)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title or workdir.name)
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
        axes.set_title(title[:22], fontsize=7)
        axes.axis("off")
    with written_aside(target) as draft:
        figure.savefig(draft, format="png")
