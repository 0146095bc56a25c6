"""`eval.py`: top-1, top-5 and loss of a checkpoint on a data set, prepared as the checkpoint's authors did."""

import dataclasses
import json
import os
import shlex
import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import parallel, progress
from ..config import (
    LOWERINGS,
    MEGVII_EVAL,
    MMPRETRAIN_EVAL,
    TORCHVISION_EVAL,
    TORCHVISION_EVAL_LARGE,
    VAL_SHARE,
    ModelInfo,
)
from ..data.inventory import report_notes
from ..data.labels import class_name
from ..data.pipeline import eval_batches
from ..data.sources import open_source, split_version
from ..errors import InputError
from ..evaluation.classes import ClassScores, class_rows, confusion_matrix
from ..evaluation.counting import eval_step, evaluate
from ..evaluation.predictions import Predictions, read_predictions, write_predictions
from ..files import path_of, printable, written_aside
from ..inference import Model
from ..loading import load_model
from ..published import CARD, PUBLISHED
from .console import libraries_silent, speak_as
from .parsing import CHECKPOINT, CommandLine, add_process_options, add_val_share, positive_integer, program_of

DESCRIPTION = (
    "Evaluate a checkpoint. The last line on stdout is a JSON object: images, counts, percentages, loss. Without "
    "arguments: MMPretrain's published model on ImageNet's validation images, expecting 69.55 / 88.92."
)
IMAGENET = {"data": "tfds:imagenet2012", "split": "validation"}
CPU_BATCH, ACCELERATOR_BATCH = 16, 128
SOME_FLIPS, MOST_FLIPS = 3, 1000  # Named in the table, and in the figures: a whole data set may flip.
SUBSETS = ("imagenet_a", "imagenet_r")  # Hendrycks et al. judge among the 200 classes that occur in each.
EXPECTED = {  # option: (figure, type, meaning)
    "--expect-top1-correct": ("top1_correct", int, "number of images whose label comes first"),
    "--expect-top5-correct": ("top5_correct", int, "number of images whose label is among the first five"),
    "--expect-top1": ("top1", float, "top-1 accuracy in percent, to two decimals"),
    "--expect-top5": ("top5", float, "top-5 accuracy in percent, to two decimals"),
}


def main(argv):
    options = parse(argv)
    with parallel.joined(options.coordinator_address, options.num_processes, options.process_id, on_joined=speak_as):
        return evaluate_checkpoint(options, argv)


def evaluate_checkpoint(options, argv):
    """Evaluates what the options ask for; returns the exit status. All processes of a run do this together."""
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
        # Opened first: what cannot be written or read should not cost an evaluation.
        predictions, report, confusion = (
            target and files.enter_context(written_aside(target))
            for target in (options.predictions, options.report, options.confusion)
        )
        other = options.compare and opened(options.compare, options, info)
        figures, rows = evaluate_on(*network, info.preprocess)
        if predictions:
            write_predictions(predictions, rows)
        if report:
            from ..evaluation.report import make_report

            title = title_of(options) + ("" if among is None else f", among its {figures['classes']} classes")
            typed = program_of("eval")
            command = f"{'python ' if typed.endswith('.py') else ''}{typed} {shlex.join(argv)}"
            page = make_report(rows, model, source, title=title, command=command)
            report.write_text(page, encoding="utf-8", errors="backslashreplace")
        if confusion:
            draw_confusion(rows, info, confusion)
    if options.per_class:
        figures |= class_by_class(rows, info)
    if options.preprocess:
        figures["preprocess"] = under_each_preprocessing(network, info, source, figures, rows, evaluate_on)
    if other:
        others = other if isinstance(other, Predictions) else evaluate_on(**other)[1]
        figures["compare"] = compared(options, info, rows, others)
    missed = misses(figures, options)
    if parallel.is_first():
        print(*missed, sep="", end="", file=sys.stderr)
        print(json.dumps(figures))
    return 1 if missed else 0


def share_held_out(options, info):
    """Return the share of a folder without splits to evaluate on: with another one than training's its images count."""
    trained = info.source.get("config")
    share = trained.get("val_share") if isinstance(trained, dict) else None
    if options.val_share is not None:
        return options.val_share
    return share if isinstance(share, float) else VAL_SHARE


def keeps_logits(options):
    files = options.predictions or options.report or options.confusion
    return bool(files or options.compare or options.preprocess or options.per_class)


def title_of(options):
    """What is evaluated on what: TFDS data sets by their whole names, paths by their last parts."""
    data = options.data if options.data.startswith("tfds:") else called(options.data)
    return f"{called(options.checkpoint)} on {data}" + (f", split {options.split}" if options.split else "")


def called(path):
    return Path(os.path.abspath(path_of(path))).name or path  # That of "/" is empty.


def load(checkpoint, options, *, ema=False):
    """(a Model with a classifier, (what to evaluate, its variables)): the fast form unless --lowering is reference."""
    settings = {"dtype": jnp.dtype(options.dtype), "lowering": options.lowering}
    model = Model(*load_model(checkpoint, ema=ema, **settings))
    if not model.info.num_classes:
        raise InputError(f"{checkpoint} has no classifier and so no accuracy; choose another checkpoint")
    return model, (model.module, model.variables) if options.lowering == "reference" else model.deployed


def competing(source, options, num_classes):
    """bool (num_classes,): the classes among which a prediction is made, or None for all."""
    if not (options.subset or split_version(options.data.partition("tfds:")[2])[0] in SUBSETS):
        return None
    among = np.zeros(num_classes, bool)
    among[list(set(source.labels()))] = True
    return among


def evaluated(module, variables, preprocess, *, source, total, options, among):
    """(rounded figures, rows or None) of a network on the data, its images prepared in one way."""
    # Small batches let a CPU decode and predict by turns; accelerators want to be filled.
    batch_size = options.batch_size or (CPU_BATCH if jax.default_backend() == "cpu" else ACCELERATOR_BATCH)
    batch_size = parallel.shared_equally(min(batch_size, total))
    step = parallel.map_eval_step(partial(eval_step, module, preprocess, flip=options.tta == "flip", among=among))
    batches = eval_batches(source, preprocess, batch_size=batch_size, limit=total, **parallel.own_slice())
    with libraries_silent(), closing(shown(batches, total)) as fed:
        figures, rows = evaluate(step, parallel.replicate(variables), fed, keep_logits=keeps_logits(options))
    figures = {key: round(value, 6 if key == "loss" else 2) for key, value in figures.items()}
    return figures if among is None else {**figures, "classes": int(among.sum())}, rows


def class_by_class(rows: Predictions, info: ModelInfo) -> dict[str, Any]:
    """Print how each class fares, and return the figures: means over the classes, each class, the confusion matrix."""
    labels, predicted = rows.first_classes()
    scores = ClassScores(labels, predicted, info.num_classes)
    found = []
    print(f"{'class':28}{'images':>8}{'precision':>11}{'recall':>9}{'F1':>9}")
    for row in class_rows(labels, predicted, info.num_classes):
        percent = {name: round(getattr(row, name), 2) for name in ("precision", "recall", "f1")}
        name = class_name(info.classes, row.label)
        print(f"{printable(name)[:27]:28}{row.images:8,}", *(f"{value:8.2f}" for value in percent.values()))
        found.append({"label": row.label, "class": name, "images": row.images, "right": row.right, **percent})
    return {
        **{name: round(value, 2) for name, value in scores.means.items()},
        "per_class": sorted(found, key=lambda row: row["label"]),
        "confusion": confusion_matrix(labels, predicted, info.num_classes).tolist(),
    }


def draw_confusion(rows: Predictions, info: ModelInfo, target: Path) -> None:
    """Draw the confusion matrix into a PNG file."""
    from ..plots import plot_confusion

    names = [class_name(info.classes, label) for label in range(info.num_classes)]
    plot_confusion(confusion_matrix(*rows.first_classes(), info.num_classes), names, target)


def under_each_preprocessing(network, info, source, figures, rows, evaluate_on):
    """Evaluates the same weights on images prepared in other ways; prints a table and returns {way: figures}.

    The figures name the images that flip, up to MOST_FLIPS of them, the table the first few.
    """
    from ..evaluation.comparison import compare

    found = {"as stored": {**figures, "flips": 0, "flipped": []}}
    print(f"{'images prepared':28}{'top-1':>8}{'top-5':>8}{'flips':>7}  the first that flip")
    print(f"{'as stored with the weights':28}{figures['top1']:8.2f}{figures['top5']:8.2f}{0:7}")
    for name, (preprocess, images) in ways_to_prepare(info.preprocess, source).items():
        these, others = evaluate_on(*network, preprocess, source=images)
        flipped = [flip.name for flip in compare(rows, others).flips]
        found[name] = {**these, "flips": len(flipped), "flipped": flipped[:MOST_FLIPS]}
        told = ", ".join(flipped[:SOME_FLIPS]) + (", ..." if len(flipped) > SOME_FLIPS else "")
        print(f"{name:28}{these['top1']:8.2f}{these['top5']:8.2f}{len(flipped):7}  {told}")
    return found


def ways_to_prepare(own, source):
    """{name: (Preprocess, Source)}: the published ways, and the model's own with one thing changed; equal ones once."""
    from ..evaluation.comparison import decoded_by

    if own.channels != 3:
        raise InputError("--preprocess all is for networks that take colours; leave it out")
    changed = partial(dataclasses.replace, own)
    decoder, backend = (({"cv2", "pillow"} - {used}).pop() for used in (own.decoder, own.backend))
    turned = own.decoder == "cv2"
    # The decoders differ in two things, of which each is changed alone.
    decoded = {
        f"decoded by {'Pillow' if turned else 'OpenCV'}": decoded_by(source, decoder, oriented=turned),
        f"EXIF's rotation {'ignored' if turned else 'applied'}": decoded_by(source, own.decoder, oriented=not turned),
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


def opened(compare, options, info):
    """What `--compare` names: the Predictions of a file, or the arguments to evaluate a checkpoint with."""
    if Path(compare).suffix == ".npz":
        return read_predictions(compare)
    model, (module, variables) = load(compare, options)
    if model.info.classes != info.classes:
        raise InputError(f"{compare} knows other classes than {options.checkpoint}; there is nothing to compare")
    return {"module": module, "variables": variables, "preprocess": model.info.preprocess}


def compared(options, info, rows, others):
    """Sets predictions beside others; prints what differs and returns the figures."""
    from ..evaluation.comparison import compare

    found = compare(rows, others)
    print(
        f"right: both {found.both}, only {options.checkpoint} {found.first_only}, only {options.compare} "
        f"{found.second_only}, neither {found.neither}\nthe same first class: {found.agreement:.2f} %\n"
        f"so uneven a split by chance (McNemar's exact test): p = {found.p_value:.3g}"
    )
    for flip in found.flips:
        first, second, label = (class_name(info.classes, c) for c in (flip.first, flip.second, flip.label))
        print(f"flips: {flip.name}: {first} -> {second} ({label})")
    return {**found._asdict(), "agreement": round(found.agreement, 2), "flips": len(found.flips)}


def parse(argv):
    parser = CommandLine(prog=program_of("eval"), description=DESCRIPTION)
    parser.add_argument("--checkpoint", default=CARD, help=f"{CHECKPOINT} (default: {CARD})")
    parser.add_argument("--ema", action="store_true", help="take the moving averages kept beside the weights")
    told = (
        "tfds:NAME, a folder, zip or tar of images, or digits: see docs/data.md (default for a published name: "
        "ImageNet's validation images, expecting the published figures)"
    )
    parser.add_argument("--data", help=told)
    parser.add_argument("--data-dir", help="where tfds: data sets lie (default: TFDS's own place)")
    parser.add_argument("--split", help="the part of the data (default: the first of val, validation, test it has)")
    add_val_share(parser, own="what the checkpoint was trained with")
    told = f"images a step (default: {CPU_BATCH} on CPUs, {ACCELERATOR_BATCH} on accelerators)"
    parser.add_argument("--batch-size", type=positive_integer, help=told)
    told = "choose among the classes that occur in the data alone; tfds:imagenet_a and imagenet_r are always judged so"
    parser.add_argument("--subset", action="store_true", help=told)
    parser.add_argument("--limit", type=positive_integer, help="evaluate only that many images, the first ones")
    parser.add_argument("--tta", choices=["flip"], help="average the probabilities of each image and its mirror image")
    parser.add_argument("--predictions", metavar="FILE.npz", help="keep name, label and logits of each image there")
    told = "write a page of what is right and wrong there: classes, confusions, calibration, the surest mistakes"
    parser.add_argument("--report", metavar="FILE.html", type=Path, help=told)
    told = "also give precision, recall and F1 of each class, their means, and the confusion matrix"
    parser.add_argument("--per-class", action="store_true", help=told)
    told = "draw the confusion matrix there"
    parser.add_argument("--confusion", metavar="FILE.png", type=Path, help=told)
    told = "also tell how the predictions differ from those of another checkpoint, or of a --predictions file"
    parser.add_argument("--compare", metavar="OTHER", help=told)
    told = "also evaluate the same weights on images prepared in every published way, and tell which images flip"
    parser.add_argument("--preprocess", choices=["all"], help=told)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the computation")
    parser.add_argument(
        "--lowering", choices=LOWERINGS, default="auto", help="'reference' is the slow, plain form, batch norm and all"
    )
    add_process_options(parser)
    for option, (_, kind, meaning) in EXPECTED.items():
        told = f"the {meaning}; exit 1 if another comes out"
        parser.add_argument(option, type=kind, metavar="N" if kind is int else "P", help=told)
    options = parser.parse_args(argv)
    if options.data is None:
        if options.checkpoint not in PUBLISHED:
            raise InputError(f"--data is missing: on what to evaluate; see {program_of('eval')} --help")
        published = PUBLISHED[options.checkpoint]
        defaults = {**IMAGENET, "expect_top1": round(published.top1, 2), "expect_top5": round(published.top5, 2)}
        for name, value in defaults.items():
            if getattr(options, name) is None and not (options.limit and name.startswith("expect")):
                setattr(options, name, value)
    return options


def shown(batches, total):
    """The batches as they come, with a progress bar that counts their images."""
    with progress.bar(total=total, unit="image", description="evaluating") as bar:
        for batch in batches:
            yield batch
            bar.update(int(batch["mask"].sum()) * jax.process_count())


def misses(figures, options):
    """A line for each expectation on the command line that the figures do not meet."""
    lines = []
    for option, (figure, _, _) in EXPECTED.items():
        wanted = getattr(options, option[2:].replace("-", "_"))
        if wanted is not None and figures[figure] != wanted:
            lines.append(f"{figure} is {figures[figure]}, not {wanted} as {option} expects\n")
    return lines
