"""`predict`: what a model sees in images, as a table, JSON or a picture; or the features it computes of them."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from .. import progress
from ..architecture import FEATURES
from ..data.folders import find_images
from ..data.inventory import describe_skipped, report_notes
from ..data.workers import usable_cores
from ..errors import InputError
from ..files import printable, written_aside
from ..inference import BATCH, Model, get_model
from ..published import CARD
from .console import libraries_silent, report_error
from .parsing import CHECKPOINT, CommandLine, positive_integer, program_of

Crop = UInt8[np.ndarray, "height width channels"]
# Name, crop or error, logits and features of an image; the last two are None where there is an error.
Predicted = tuple[str, Crop | InputError, np.ndarray | None, np.ndarray | None]

DESCRIPTION = "Classify images. Files that are no images are reported on stderr and skipped; then exit is 2."
MOST_DRAWN = 24
LISTINGS = (".csv", ".jsonl")


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    options = parse(argv)
    names = list(expanded(options.images))
    if not names:
        raise InputError("there are no names of images on stdin; write one a line")
    failed, rows = 0, []
    drawn: list[Any] = []
    columns: dict[str, list[Any]] = {"name": [], "features": []}
    with ExitStack() as files:
        # Open all files first: errors should not cost the predictions.
        features, picture, listing = (
            target and files.enter_context(written_aside(target))
            for target in (options.features, options.save_picture, options.out)
        )
        model = get_model(options.checkpoint, pretrained=True)
        require_layers(model, options)
        layer = options.layer if options.features else "conv5" if options.cam else None
        found = predictions(model, names, layer)
        if options.features:  # Otherwise the lines on stdout show how far it is.
            found = progress.follow(found, total=len(names), unit="image", description="predicting")
        for name, crop, logits, feature in found:
            if isinstance(crop, InputError):
                failed += 1
                report_error(crop)
                continue
            if options.features:
                columns["name"].append(name)
                columns["features"].append(feature)
                continue
            assert logits is not None  # There is no error.
            row = prediction_of(model, name, logits, options.topk)
            print(json.dumps(row) if options.json else as_text(row))
            if listing:
                rows.append(row)
            if options.save_picture and len(drawn) < MOST_DRAWN:
                cam = None if feature is None else model.class_activation_map(feature, row["pred_label"])
                drawn.append((crop, row, cam))
        if (targets := targets_of(options)) and failed == len(names):
            raise InputError(f"nothing is left to write to {targets[0]}: no image could be read")
        if listing:
            write_rows(rows, listing)
        if features:
            with open(features, "wb") as file:
                np.savez(file, name=np.stack(columns["name"]), features=np.stack(columns["features"]))
        elif drawn:
            from ..plots import plot_predictions

            plot_predictions(drawn, picture)
    return 2 if failed else 0


def targets_of(options: argparse.Namespace) -> list[Path]:
    """Return the files that the options ask for.

    Args:
      options: of the command.
    """
    return [target for target in (options.features, options.save_picture, options.out) if target]


def write_rows(rows: list[dict[str, Any]], target: Path) -> None:
    """Write a list of predictions, as CSV or as JSON lines, by the file's ending.

    Args:
      rows: from `prediction_of`, for each image.
      target: path of the file.
    """
    with open(target, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        if target.suffix == ".csv":
            numbers = range(1, max((len(row["topk"]) for row in rows), default=0) + 1)
            fields = [(number, name) for number in numbers for name in ("label", "class", "score")]
            table = csv.writer(file)
            table.writerow(["image", *(f"{name}_{number}" for number, name in fields)])
            for row in rows:
                table.writerow([row["image"], *(row["topk"][number - 1][name] for number, name in fields)])
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def require_layers(model: Model, options: argparse.Namespace) -> None:
    """Raise InputError if the model lacks layers that the options need.

    Args:
      model: the network.
      options: of the command.
    """
    if not (model.info.num_classes or options.features):
        raise InputError(f"{options.checkpoint} has no classifier; ask for --features, or choose another checkpoint")
    if options.features and not model.info.conv5 and options.layer in ("conv5", "pooled"):
        raise InputError(f"{options.checkpoint} ends with stage4; choose --layer stage4 or one before it")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Args:
      argv: the command's arguments.

    Raises:
      InputError: they are wrong.
    """
    parser = CommandLine(prog=program_of("predict"), description=DESCRIPTION)
    help_text = "files, folders (with all below them), http(s) addresses, or - for a list of these on stdin, one a line"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=help_text)
    parser.add_argument("--checkpoint", default=CARD, help=f"{CHECKPOINT} (default: {CARD})")
    parser.add_argument("--topk", type=positive_integer, default=5, help="classes of each image (default: 5)")
    parser.add_argument("--json", action="store_true", help="a JSON object for each image, one a line")
    help_text = "also write the classes of all images there, as CSV or as JSON lines"
    parser.add_argument("--out", metavar="FILE.csv|FILE.jsonl", type=Path, help=help_text)
    help_text = f"draw the images with their classes there, the first {MOST_DRAWN} of them"
    parser.add_argument("--save-picture", metavar="OUT.png", type=Path, help=help_text)
    help_text = "overlay where the network sees the first class (its class-activation map) in the picture"
    parser.add_argument("--cam", action="store_true", help=help_text)
    help_text = "write {name, features} of all images there instead of predicting"
    parser.add_argument("--features", metavar="OUT.npz", type=Path, help=help_text)
    help_text = "of which layer: pooled is (C,) for each image, the others are (H, W, C) (default: pooled)"
    parser.add_argument("--layer", choices=FEATURES, default="pooled", help=help_text)
    options = parser.parse_args(argv)
    if options.cam and not options.save_picture:
        raise InputError("--cam draws into a picture; add --save-picture OUT.png")
    if options.out and options.out.suffix not in LISTINGS:
        raise InputError(f"--out is {options.out}, whose ending says no format; use {' or '.join(LISTINGS)}")
    if options.out and options.features:
        raise InputError("--features predicts nothing that --out could list; leave one of them out")
    if options.save_picture and options.features:
        raise InputError("--features predicts nothing that --save-picture could draw; leave one of them out")
    return options


def expanded(words: Iterable[str]) -> Iterator[str]:
    """Yield each image that the command line names: folders become their files, - the lines of stdin.

    Args:
      words: of the command line.
    """
    for word in words:
        if word == "-":
            lines = (os.fsdecode(line).strip() for line in sys.stdin.buffer)
            yield from expanded(line for line in lines if line not in ("", "-"))
        elif os.path.isdir(word):
            found, skipped = find_images(word)
            report_notes(describe_skipped(word, skipped))
            yield from found or [word]
        else:
            yield word


def predictions(model: Model, names: Sequence[str], layer: str | None = None) -> Iterator[Predicted]:
    """Yield name, crop, logits and features of each image.

    Threads read the images; the network predicts them in batches of one size. For a file that is no image, the crop is
    an InputError.

    Args:
      model: the network.
      names: paths or addresses.
      layer: whose features to return; None means none.
    """
    size = 1 if len(names) == 1 else BATCH
    with ThreadPoolExecutor(usable_cores()) as readers:
        for first in range(0, len(names), size):
            part = names[first : first + size]
            with libraries_silent():
                read = list(readers.map(partial(read_crop, model), part))
            crops = [crop for crop in read if not isinstance(crop, InputError)]
            if crops:
                logits, features = model.outputs(np.stack(crops + crops[:1] * (size - len(crops))))
                outputs = jax.device_get((logits, features.get(layer or "")))
            row = iter(range(len(crops)))
            for name, crop in zip(part, read, strict=True):
                if isinstance(crop, InputError):
                    yield name, crop, None, None
                else:
                    i = next(row)
                    own = [None if values is None else values[i] for values in outputs]
                    yield name, crop, own[0], own[1]


def read_crop(model: Model, name: str) -> Crop | InputError:
    """Return the crop (H, W, C) of an image, or the InputError if there is none.

    Args:
      model: prepares the image.
      name: path or address.
    """
    try:
        if os.path.isdir(name):
            raise InputError(f"folder {name} holds no images")
        return model.preprocess(name)[0]
    except InputError as error:
        return error


def prediction_of(model: Model, name: str, logits: Float[np.ndarray, " classes"], topk: int) -> dict[str, Any]:
    """Return {"image", "pred_label", "pred_class", "pred_score", "topk": [{"label", "class", "score"}]} of an image.

    Args:
      model: the network, with the class names.
      name: of the image.
      logits: (num_classes,).
      topk: number of classes.
    """
    scores = np.exp(logits - logits.max(), dtype=np.float64)
    scores /= scores.sum()
    best = [{**entry, "score": round(entry["score"], 6)} for entry in model.ranked(scores, topk)]
    first = {f"pred_{key}": value for key, value in best[0].items()}
    return {"image": name, **first, "topk": best}


def as_text(row: dict[str, Any]) -> str:
    """Return a prediction in lines.

    Args:
      row: from `prediction_of`.
    """
    lines = [f"{100 * entry['score']:6.2f} %  {entry['class']}" for entry in row["topk"]]
    return "\n".join([printable(row["image"]), *lines])
