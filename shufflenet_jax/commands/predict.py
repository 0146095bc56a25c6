"""`predict`: what a model sees in images, as a table, JSON or a picture; or the features it computes of them."""

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np

from .. import plots
from ..cli import CommandLine, positive_integer, progress, usable_cores
from ..data.sources import IMAGE_SUFFIXES
from ..errors import InputError
from ..files import written_aside
from ..inference import class_activation_map, get_model
from ..published import CARD

DESCRIPTION = "Predict what is in images. What is no image is named on stderr, and the others go on; then exit is 2."
LAYERS = ("stem", "stage2", "stage3", "stage4", "conv5", "pooled")
BATCH = 16
MOST_DRAWN = 24
LARGEST_DOWNLOAD = 100_000_000  # Bytes.
SILENT_SECONDS = 30


def main(argv):
    options = parse(argv)
    model = get_model(options.checkpoint, pretrained=True)
    if not (model.info.num_classes or options.features):
        raise InputError(f"{options.checkpoint} has no classifier; ask for --features, or choose another checkpoint")
    failed, drawn, kept = 0, [], {"name": [], "features": []}
    with written_aside(options.features) if options.features else nullcontext() as draft:
        for name, crop, logits, features in predictions(model, expanded(options.images)):
            if crop is None:
                failed += 1
                print("error:", " ".join(str(logits).split()), file=sys.stderr)
                continue
            if options.features:
                kept["name"].append(name)
                kept["features"].append(features[options.layer])
                continue
            row = describe(model, name, logits, options.topk)
            print(json.dumps(row) if options.json else as_text(row))
            if options.save_picture and len(drawn) < MOST_DRAWN:
                cam = class_activation_map(model, features["conv5"], row["pred_label"]) if options.cam else None
                drawn.append((crop, row, cam))
        if draft and not kept["name"]:
            raise InputError("there is no image to compute features of")
        if draft:
            with open(draft, "wb") as file:
                np.savez(file, **{key: np.stack(values) for key, values in kept.items()})
    if drawn:
        plots.plot_predictions(drawn, options.save_picture)
    return 2 if failed else 0


def parse(argv):
    parser = CommandLine(prog="shufflenet-jax predict", description=DESCRIPTION)
    told = "files, folders (with all below them), http(s) addresses, or - for a list of these on stdin, one a line"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=told)
    told = f"a published name, a model directory, a training workdir or a .pth file (default: {CARD})"
    parser.add_argument("--checkpoint", default=CARD, help=told)
    parser.add_argument("--topk", type=positive_integer, default=5, help="classes of each image (default: 5)")
    parser.add_argument("--json", action="store_true", help="a JSON object for each image, one a line")
    told = f"draw the images with their classes there, the first {MOST_DRAWN} of them"
    parser.add_argument("--save-picture", metavar="OUT.png", type=Path, help=told)
    told = "overlay where the network sees the first class (its class-activation map) in the picture"
    parser.add_argument("--cam", action="store_true", help=told)
    told = "write {name, features} of all images there instead of predicting"
    parser.add_argument("--features", metavar="OUT.npz", type=Path, help=told)
    told = "of which layer: pooled is (C,) for each image, the others are (H, W, C) (default: pooled)"
    parser.add_argument("--layer", choices=LAYERS, default="pooled", help=told)
    options = parser.parse_args(argv)
    if options.cam and not options.save_picture:
        raise InputError("--cam draws into a picture; add --save-picture OUT.png")
    if options.save_picture and options.features:
        raise InputError("--features predicts nothing that --save-picture could draw; leave one of them out")
    return options


def expanded(words):
    """Each image that the command line names: folders become their files, - the lines of stdin."""
    for word in words:
        if word == "-":
            yield from expanded(line.strip() for line in sys.stdin if line.strip() not in ("", "-"))
        elif os.path.isdir(word):
            found = [path for path in sorted(Path(word).rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
            yield from map(str, found) if found else [word]
        else:
            yield word


def predictions(model, names):
    """(name, crop, logits, {layer: features}) for each image in turn; (name, None, InputError, None) for what is none.

    Images are read by threads, some ahead, and predicted in batches of one size.
    """
    names = list(names)
    size = min(BATCH, len(names))
    with ThreadPoolExecutor(usable_cores()) as readers, progress(total=len(names), unit="image") as bar:
        for first in range(0, len(names), size):
            part = names[first : first + size]
            read = list(readers.map(lambda name: read_crop(model, name), part))
            crops = [crop for crop in read if not isinstance(crop, InputError)]
            if crops:
                batch = np.stack(crops + crops[:1] * (size - len(crops)))
                logits, features = jax.device_get(model.outputs(batch))
            row = iter(range(len(crops)))
            for name, crop in zip(part, read, strict=True):
                bar.update()
                if isinstance(crop, InputError):
                    yield name, None, crop, None
                    continue
                i = next(row)
                seen = logits[i] if model.info.num_classes else None
                yield name, crop, seen, {layer: values[i] for layer, values in features.items()}


def read_crop(model, name):
    """The crop (H, W, C) of an image, or the InputError that tells why there is none."""
    try:
        address = name.startswith(("http://", "https://"))
        return model.preprocess(fetched(name) if address else name, name=name)[0]
    except InputError as error:
        return error


def fetched(address):
    """The bytes at an http(s) address."""
    try:
        with urllib.request.urlopen(address, timeout=SILENT_SECONDS) as answer:
            content = answer.read(LARGEST_DOWNLOAD + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InputError(f"image {address} cannot be fetched: {getattr(error, 'reason', error)}") from error
    if len(content) > LARGEST_DOWNLOAD:
        raise InputError(f"image {address} has more than {LARGEST_DOWNLOAD:,} bytes")
    return content


def describe(model, name, logits, topk):
    """{"image", "pred_label", "pred_class", "pred_score", "topk": [{"label", "class", "score"}]} of an image."""
    scores = np.exp(logits - logits.max(), dtype=np.float64)
    scores /= scores.sum()
    best = [
        {"label": int(label), "class": model.class_name(int(label)), "score": round(float(scores[label]), 6)}
        for label in np.argsort(-scores, kind="stable")[:topk]
    ]
    first = {f"pred_{key}": value for key, value in best[0].items()}
    return {"image": name, **first, "topk": best}


def as_text(row):
    lines = [f"{100 * entry['score']:6.2f} %  {entry['class']}" for entry in row["topk"]]
    return "\n".join([row["image"], *lines])
