"""`eval.py`: top-1, top-5 and loss of a checkpoint on a data set, prepared as the checkpoint's authors did."""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from .. import parallel, progress
from ..config import (
    LOWERINGS,
    MEGVII_EVAL,
    MMPRETRAIN_EVAL,
    TORCHVISION_EVAL,
    TORCHVISION_EVAL_LARGE,
    VAL_SHARE,
    ModelInfo,
    Preprocess,
)
from ..data.inventory import report_notes
from ..data.labels import class_name
from ..data.pipeline import eval_batches
from ..data.sources import Source, open_source, split_version
from ..deploy import Deployed
from ..errors import InputError
from ..evaluation.classes import ClassScores, class_rows, confusion_matrix
from ..evaluation.counting import eval_step, evaluate
from ..evaluation.predictions import Predictions, read_predictions, write_predictions
from ..files import path_of, printable, written_aside
from ..inference import Model
from ..loading import load_model
from ..model import ShuffleNetV2
from ..published import CARD, PUBLISHED
from ..shapes import Variables
from .console import libraries_silent, speak_as
from .parsing import CHECKPOINT, CommandLine, add_process_options, add_val_share, positive_integer, program_of

DESCRIPTION = (
    "Evaluate a checkpoint. The last line on stdout is a JSON object: images, counts, percentages, loss. Without "
    "arguments: MMPretrain's published model on ImageNet's validation images, expecting 69.55 / 88.92."
)
IMAGENET = {"data": "tfds:imagenet2012", "split": "validation"}
CPU_BATCH, ACCELERATOR_BATCH = 16, 128
SOME_FLIPS, MOST_FLIPS = 3, 1000  # Names in the table, and in the figures: a whole data set may flip.
SUBSETS = ("imagenet_a", "imagenet_r")  # Hendrycks et al. predict among the 200 classes that occur in each.
EXPECTED: dict[str, tuple[str, type, str]] = {  # {option: (figure, type, meaning)}
    "--expect-top1-correct": ("top1_correct", int, "number of images whose label comes first"),
    "--expect-top5-correct": ("top5_correct", int, "number of images whose label is among the first five"),
    "--expect-top1": ("top1", float, "top-1 accuracy in percent, to two decimals"),
    "--expect-top5": ("top5", float, "top-5 accuracy in percent, to two decimals"),
}
Network = tuple[ShuffleNetV2 | Deployed, Variables]
Figures = dict[str, Any]  # Integers, floats, names, lists of them, and figures again.
Evaluated = tuple[Figures, Predictions | None]


class Other(NamedTuple):
    """A checkpoint to compare with.

    Attributes:
      network: its network and variables.
      preprocess: how to prepare images for it.
    """

    network: Network
    preprocess: Preprocess


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    options = parse(argv)
    with parallel.joined(options.coordinator_address, options.num_processes, options.process_id, on_joined=speak_as):
        return evaluate_checkpoint(options, argv)


def evaluate_checkpoint(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Evaluate a checkpoint. All processes of a run call this together.

    Args:
      options: of the command.
      argv: its arguments, for the report.

    Returns:
      The exit status.

    Raises:
      InputError: an option cannot be used, or a file cannot be read or written.
    """
    if keeps_logits(options) and jax.process_count() > 1:
        raise InputError(
            "--predictions, --compare, --preprocess, --report, --per-class and --confusion need all logits in one "
            "process; start one alone"
        )
    model, network = load(options.checkpoint, options, ema=options.ema)
    info = model.info
    source = open_source(
        options.data,
        options.split,
        data_dir=options.data_dir,
        classes=info.classes,
        num_classes=info.num_classes,
        multi_label=True,
        val_share=share_held_out(options, info),
    )
    if parallel.is_first():
        report_notes(source.notes)
    total = min(options.limit or len(source), len(source))
    parallel.require_same("images and classes", (total, info.classes))

    among = competing(source, options, info.num_classes)
    evaluate_on = partial(evaluated, source=source, total=total, options=options, among=among)
    with ExitStack() as files:
        # Open all files first: errors should not cost an evaluation.
        predictions, report, confusion = (
            target and files.enter_context(written_aside(target))
            for target in (options.predictions, options.report, options.confusion)
        )
        other = opened(options.compare, options, info) if options.compare else None
        figures, rows = evaluate_on(network, info.preprocess)
        if predictions and rows:
            write_predictions(predictions, rows)
        if report and rows:
            from ..evaluation.report import make_report

            title = title_of(options) + ("" if among is None else f", among its {figures['classes']} classes")
            typed = program_of("eval")
            command = f"{'python ' if typed.endswith('.py') else ''}{typed} {shlex.join(argv)}"
            page = make_report(rows, model, source, title=title, command=command)
            report.write_text(page, encoding="utf-8", errors="backslashreplace")
        if confusion and rows:
            draw_confusion(rows, info, confusion)
    if options.per_class and rows:
        figures |= class_by_class(rows, info)
    if options.preprocess and rows:
        figures["preprocess"] = under_each_preprocessing(network, info, source, figures, rows, evaluate_on)
    if other and rows:
        others = other if isinstance(other, Predictions) else evaluate_on(*other)[1]
        assert others is not None  # The option keeps logits.
        figures["compare"] = compared(options, info, rows, others)
    missed = misses(figures, options)
    if parallel.is_first():
        print(*missed, sep="", end="", file=sys.stderr)
        print(json.dumps(figures))
    return 1 if missed else 0


def share_held_out(options: argparse.Namespace, info: ModelInfo) -> float:
    """Return the share of a folder without splits to evaluate on.

    It is that of the training by default, since another share would include training images.

    Args:
      options: of the command.
      info: the model description.
    """
    trained = info.source.get("config")
    share = trained.get("val_share") if isinstance(trained, dict) else None
    if options.val_share is not None:
        return options.val_share
    return share if isinstance(share, float) else VAL_SHARE


def keeps_logits(options: argparse.Namespace) -> bool:
    """Return whether an option needs the logits of all images.

    Args:
      options: of the command.
    """
    files = options.predictions or options.report or options.confusion
    return bool(files or options.compare or options.preprocess or options.per_class)


def title_of(options: argparse.Namespace) -> str:
    """Return a title with model and data: TFDS data sets by their full names, paths by their last parts.

    Args:
      options: of the command.
    """
    data = options.data if options.data.startswith("tfds:") else called(options.data)
    return f"{called(options.checkpoint)} on {data}" + (f", split {options.split}" if options.split else "")


def called(path: str) -> str:
    """Return the last part of a path.

    Args:
      path: as the user typed it.
    """
    return Path(os.path.abspath(path_of(path))).name or path  # The last part of "/" is empty.


def load(checkpoint: str, options: argparse.Namespace, *, ema: bool = False) -> tuple[Model, Network]:
    """Load a checkpoint with a classifier.

    Args:
      checkpoint: its name or path.
      options: of the command.
      ema: take the moving averages.

    Returns:
      (the model, the network to evaluate): the fast form unless --lowering is reference.

    Raises:
      InputError: it cannot be read, or has no classifier.
    """
    settings = {"dtype": jnp.dtype(options.dtype), "lowering": options.lowering}
    model = Model(*load_model(checkpoint, ema=ema, **settings))
    if not model.info.num_classes:
        raise InputError(f"{checkpoint} has no classifier and so no accuracy; choose another checkpoint")
    return model, (model.module, model.variables) if options.lowering == "reference" else model.deployed


def competing(source: Source, options: argparse.Namespace, num_classes: int) -> Bool[np.ndarray, " classes"] | None:
    """Return the classes among which to predict, or None for all.

    Args:
      source: the data.
      options: of the command.
      num_classes: of the network.
    """
    if not (options.subset or split_version(options.data.partition("tfds:")[2])[0] in SUBSETS):
        return None
    among = np.zeros(num_classes, bool)
    among[list(set(source.labels()))] = True
    return among


def evaluated(
    network: Network,
    preprocess: Preprocess,
    *,
    source: Source,
    total: int,
    options: argparse.Namespace,
    among: Bool[np.ndarray, " classes"] | None,
) -> Evaluated:
    """Evaluate a network on images that are prepared in one way.

    Args:
      network: the network and its variables.
      preprocess: how to prepare the images.
      source: the data.
      total: number of images to evaluate.
      options: of the command.
      among: the classes that compete; None means all.

    Returns:
      (rounded figures, predictions). The predictions are None if no option needs them.
    """
    module, variables = network
    # Small batches let a CPU alternate between decoding and predicting; accelerators need large ones.
    batch_size = options.batch_size or (CPU_BATCH if jax.default_backend() == "cpu" else ACCELERATOR_BATCH)
    batch_size = parallel.shared_equally(min(batch_size, total))
    step = parallel.map_eval_step(partial(eval_step, module, preprocess, flip=options.tta == "flip", among=among))
    batches = eval_batches(source, preprocess, batch_size=batch_size, limit=total, **parallel.own_slice())
    with libraries_silent(), closing(shown(batches, total)) as fed:
        figures, rows = evaluate(step, parallel.replicate(variables), fed, keep_logits=keeps_logits(options))
    figures = {key: round(value, 6 if key == "loss" else 2) for key, value in figures.items()}
    return figures if among is None else {**figures, "classes": int(among.sum())}, rows


def class_by_class(rows: Predictions, info: ModelInfo) -> dict[str, Any]:
    """Print the figures of each class.

    Args:
      rows: the predictions.
      info: the model description.

    Returns:
      Means over the classes, the figures of each class, and the confusion matrix.
    """
    labels, predicted = rows.first_classes()
    scores = ClassScores(labels, predicted, info.num_classes)
    classes = []
    print(f"{'class':28}{'images':>8}{'precision':>11}{'recall':>9}{'F1':>9}")
    for row in class_rows(labels, predicted, info.num_classes):
        percent = {name: round(getattr(row, name), 2) for name in ("precision", "recall", "f1")}
        name = class_name(info.classes, row.label)
        print(f"{printable(name)[:27]:28}{row.images:8,}", *(f"{value:8.2f}" for value in percent.values()))
        classes.append({"label": row.label, "class": name, "images": row.images, "right": row.right, **percent})
    return {
        **{name: round(value, 2) for name, value in scores.means.items()},
        "per_class": sorted(classes, key=lambda row: row["label"]),
        "confusion": confusion_matrix(labels, predicted, info.num_classes).tolist(),
    }


def draw_confusion(rows: Predictions, info: ModelInfo, target: Path) -> None:
    """Draw the confusion matrix into a PNG file.

    Args:
      rows: the predictions.
      info: the model description.
      target: path of the file.
    """
    from ..plots import plot_confusion

    names = [class_name(info.classes, label) for label in range(info.num_classes)]
    plot_confusion(confusion_matrix(*rows.first_classes(), info.num_classes), names, target)


def under_each_preprocessing(
    network: Network,
    info: ModelInfo,
    source: Source,
    figures: Figures,
    rows: Predictions,
    evaluate_on: Callable[..., Evaluated],
) -> dict[str, Figures]:
    """Evaluate the same weights on images prepared in other ways, and print a table.

    The table names the first images that flip, the figures up to MOST_FLIPS of them.

    Args:
      network: the network and its variables.
      info: the model description.
      source: the data.
      figures: of the model's own preprocessing.
      rows: the predictions of the model's own preprocessing.
      evaluate_on: function of a network, a Preprocess and a Source.

    Returns:
      {way: its figures}.
    """
    from ..evaluation.comparison import compare

    ways: dict[str, Figures] = {"as stored": {**figures, "flips": 0, "flipped": []}}
    print(f"{'images prepared':28}{'top-1':>8}{'top-5':>8}{'flips':>7}  the first that flip")
    print(f"{'as stored with the weights':28}{figures['top1']:8.2f}{figures['top5']:8.2f}{0:7}")
    for name, (preprocess, images) in ways_to_prepare(info.preprocess, source).items():
        these, others = evaluate_on(network, preprocess, source=images)
        assert others is not None  # The option keeps logits.
        flipped = [flip.name for flip in compare(rows, others).flips]
        ways[name] = {**these, "flips": len(flipped), "flipped": flipped[:MOST_FLIPS]}
        first = ", ".join(flipped[:SOME_FLIPS]) + (", ..." if len(flipped) > SOME_FLIPS else "")
        print(f"{name:28}{these['top1']:8.2f}{these['top5']:8.2f}{len(flipped):7}  {first}")
    return ways


def ways_to_prepare(own: Preprocess, source: Source) -> dict[str, tuple[Preprocess, Source]]:
    """Return the published ways to prepare images, and the model's own with one change; equal ones once.

    Args:
      own: the model's own preprocessing.
      source: the data.

    Returns:
      {name: (preprocessing, data)}.

    Raises:
      InputError: the images have no colors.
    """
    from ..evaluation.comparison import decoded_by

    if own.channels != 3:
        raise InputError("--preprocess all is for networks that take colors; omit it")
    changed = partial(dataclasses.replace, own)
    decoder, backend = (({"cv2", "pillow"} - {used}).pop() for used in (own.decoder, own.backend))
    rotated = own.decoder == "cv2"
    # The decoders differ in two things; change one at a time.
    decoded = {
        f"decoded by {'Pillow' if rotated else 'OpenCV'}": decoded_by(source, decoder, oriented=rotated),
        f"EXIF's rotation {'ignored' if rotated else 'applied'}": decoded_by(source, own.decoder, oriented=not rotated),
    }
    ways = {
        "as MMPretrain does": MMPRETRAIN_EVAL,
        "as torchvision does": TORCHVISION_EVAL,
        "as torchvision, 232 pixels": TORCHVISION_EVAL_LARGE,
        "as Megvii does": MEGVII_EVAL,
        f"resized by {'OpenCV' if backend == 'cv2' else 'Pillow'}": changed(backend=backend),
        "red and blue exchanged": changed(channel_order="RGB" if own.channel_order == "BGR" else "BGR"),
    }
    return {
        **{name: (way, source) for name, way in ways.items() if way != own},
        **{name: (own, images) for name, images in decoded.items()},
    }


def opened(compare: str, options: argparse.Namespace, info: ModelInfo) -> Predictions | Other:
    """Open what `--compare` names.

    Args:
      compare: a file of predictions, or a checkpoint.
      options: of the command.
      info: the description of the model to compare.

    Raises:
      InputError: it cannot be read, or has other classes.
    """
    if Path(compare).suffix == ".npz":
        return read_predictions(compare)
    model, network = load(compare, options)
    if model.info.classes != info.classes:
        raise InputError(f"{compare} has other classes than {options.checkpoint}, so they cannot be compared")
    return Other(network, model.info.preprocess)


def compared(options: argparse.Namespace, info: ModelInfo, rows: Predictions, others: Predictions) -> Figures:
    """Compare predictions with others, and print the differences.

    Args:
      options: of the command.
      info: the model description.
      rows: the predictions.
      others: those to compare with.

    Returns:
      The figures.
    """
    from ..evaluation.comparison import compare

    comparison = compare(rows, others)
    print(
        f"right: both {comparison.both}, only {options.checkpoint} {comparison.first_only}, only {options.compare} "
        f"{comparison.second_only}, neither {comparison.neither}\nthe same first class: {comparison.agreement:.2f} %\n"
        f"a split this uneven by chance (McNemar's exact test): p = {comparison.p_value:.3g}"
    )
    for flip in comparison.flips:
        first, second, label = (class_name(info.classes, c) for c in (flip.first, flip.second, flip.label))
        print(f"flips: {flip.name}: {first} -> {second} ({label})")
    figures = {"agreement": round(comparison.agreement, 2), "flips": len(comparison.flips)}
    return {**comparison._asdict(), **figures}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Args:
      argv: the command's arguments.

    Raises:
      InputError: they are wrong.
    """
    parser = CommandLine(prog=program_of("eval"), description=DESCRIPTION)
    parser.add_argument("--checkpoint", default=CARD, help=f"{CHECKPOINT} (default: {CARD})")
    parser.add_argument("--ema", action="store_true", help="take the moving averages instead of the weights")
    help_text = (
        "tfds:NAME, a folder, zip or tar of images, or digits: see docs/data.md (default for a published name: "
        "ImageNet's validation images, expecting the published figures)"
    )
    parser.add_argument("--data", help=help_text)
    parser.add_argument("--data-dir", help="folder of tfds: data sets (default: TFDS's own)")
    parser.add_argument("--split", help="the part of the data (default: the first of val, validation, test it has)")
    add_val_share(parser, own="that of the checkpoint's training")
    help_text = f"images per step (default: {CPU_BATCH} on CPUs, {ACCELERATOR_BATCH} on accelerators)"
    parser.add_argument("--batch-size", type=positive_integer, help=help_text)
    help_text = "predict only classes that occur in the data, as always for tfds:imagenet_a and imagenet_r"
    parser.add_argument("--subset", action="store_true", help=help_text)
    parser.add_argument("--limit", type=positive_integer, help="evaluate only the first images, this many")
    parser.add_argument("--tta", choices=["flip"], help="average the probabilities of each image and its mirror image")
    parser.add_argument("--predictions", metavar="FILE.npz", help="store name, label and logits of each image there")
    help_text = "write a page with classes, confusions, calibration and the mistakes of highest confidence there"
    parser.add_argument("--report", metavar="FILE.html", type=Path, help=help_text)
    help_text = "also report precision, recall and F1 per class, their means, and the confusion matrix"
    parser.add_argument("--per-class", action="store_true", help=help_text)
    parser.add_argument("--confusion", metavar="FILE.png", type=Path, help="draw the confusion matrix there")
    help_text = "also compare the predictions with those of another checkpoint, or of a --predictions file"
    parser.add_argument("--compare", metavar="OTHER", help=help_text)
    help_text = "also evaluate the same weights on images prepared in every published way, and report which images flip"
    parser.add_argument("--preprocess", choices=["all"], help=help_text)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the computation")
    help_text = "'reference' is the plain form, which is slow and keeps batch norm"
    parser.add_argument("--lowering", choices=LOWERINGS, default="auto", help=help_text)
    add_process_options(parser)
    for option, (_, kind, meaning) in EXPECTED.items():
        help_text = f"the {meaning}; exit 1 if the result differs"
        parser.add_argument(option, type=kind, metavar="N" if kind is int else "P", help=help_text)
    options = parser.parse_args(argv)
    if options.data is None:
        if options.checkpoint not in PUBLISHED:
            raise InputError(f"--data is missing, which names the data set; see {program_of('eval')} --help")
        published = PUBLISHED[options.checkpoint]
        defaults = {**IMAGENET, "expect_top1": round(published.top1, 2), "expect_top5": round(published.top5, 2)}
        for name, value in defaults.items():
            if getattr(options, name) is None and not (options.limit and name.startswith("expect")):
                setattr(options, name, value)
    return options


def shown(batches: Iterable[Mapping[str, np.ndarray]], total: int) -> Generator[Mapping[str, np.ndarray], None, None]:
    """Yield the batches, with a progress bar in images.

    Args:
      batches: of the data.
      total: number of images.
    """
    with progress.bar(total=total, unit="image", description="evaluating") as bar:
        for batch in batches:
            yield batch
            bar.update(int(batch["mask"].sum()) * jax.process_count())


def misses(figures: Figures, options: argparse.Namespace) -> list[str]:
    """Return a line for each expectation on the command line that the figures do not meet.

    Args:
      figures: of the evaluation.
      options: of the command.
    """
    lines = []
    for option, (figure, _, _) in EXPECTED.items():
        wanted = getattr(options, option[2:].replace("-", "_"))
        if wanted is not None and figures[figure] != wanted:
            lines.append(f"{figure} is {figures[figure]}, not {wanted} as {option} expects\n")
    return lines
