"""Pictures of a training run."""

from matplotlib.figure import Figure

from .files import written_aside
from .logs import read_metrics

PANELS = {  # figure: (label, scale, splits that have it)
    "loss": ("loss", "log", ("train", "eval")),
    "top1": ("top-1 accuracy (%)", "linear", ("train", "eval")),
    "lr": ("learning rate", "linear", ("train",)),
}
STYLES = {"train": {"color": "tab:blue"}, "eval": {"color": "tab:orange", "marker": "o"}}


def plot_curves(workdir, *, title=None):
    """Draws loss, accuracy and learning rate over the epochs of workdir/metrics.jsonl into workdir/curves.png."""
    rows = read_metrics(workdir / "metrics.jsonl")
    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    for axes, (name, (label, scale, splits)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for split in splits:
            points = [(row["epoch"], row[name]) for row in rows if row["split"] == split]
            epochs, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(epochs, values, label=split, markersize=3, linewidth=1.2, **STYLES[split])
        axes.set(xlabel="epoch", ylabel=label, yscale=scale)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title or workdir.name)
    target = workdir / "curves.png"
    with written_aside(target) as draft:
        figure.savefig(draft)
    return target


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
