"""`python -m shufflenet_jax info`: what a network costs, stage by stage."""

import argparse
import json
import re

from ..accounting import count, total
from ..architecture import CHANNELS, LAYOUTS
from ..config import MOST
from ..errors import InputError
from ..loading import load_model
from ..model import ShuffleNetV2, describe
from .parsing import CommandLine

DESCRIPTION = "Tell parameters, multiply-adds, activations, receptive field and output of each stage, for one image."
DEFAULTS = {"width": 1.0, "layout": "torchvision", "num_classes": 1000, "in_chans": 3, "small_stem": False}
SIDE = 224
COLUMNS = {  # heading: the field of a Stage
    "parameters": "parameters",
    "multiply-adds": "multiply_adds",
    "with norms": "multiply_adds_with_norms",
    "activations": "activations",
    "field": "receptive_field",
    "stride": "stride",
    "output": "output",
}
MEANING = (
    "with norms: two multiply-adds more for each output of a batch norm; activations: outputs of convolutions and fc; "
    "field: receptive field in pixels"
)


def main(argv):
    options = parse(argv)
    given = {name: value for name in DEFAULTS if (value := getattr(options, name)) is not None}
    resolution = options.resolution
    if options.checkpoint is not None:
        if given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise InputError(f"{options.checkpoint} has settings of its own; leave out {names} or --checkpoint")
        module, _, info = load_model(options.checkpoint)
        resolution = resolution or (info.preprocess.crop, info.preprocess.crop)
    else:
        module = ShuffleNetV2(**{**DEFAULTS, **given})
    height, width = resolution or (SIDE, SIDE)

    stages = count(module, height, width)
    settings = {name: getattr(module, name) for name in DEFAULTS}
    if options.json:
        rows = [stage._asdict() for stage in stages]
        print(json.dumps({**settings, "resolution": [height, width], "stages": rows, "total": total(stages)}))
    else:
        images = f"{height} x {width} x {module.in_chans}"
        print(f"{describe(module)}, for an image of {images}", *table(stages), MEANING, sep="\n")
    return 0


def parse(argv):
    parser = CommandLine(prog="shufflenet-jax info", description=DESCRIPTION)
    parser.add_argument("--width", type=float, choices=CHANNELS, help=f"of the network (default: {DEFAULTS['width']})")
    parser.add_argument("--layout", choices=LAYOUTS, help=f"its wiring (default: {DEFAULTS['layout']})")
    told = f"outputs of the classifier; 0 leaves it out (default: {DEFAULTS['num_classes']})"
    parser.add_argument("--num-classes", type=whole_number(0), metavar="N", help=told)
    told = f"channels of the images (default: {DEFAULTS['in_chans']})"
    parser.add_argument("--in-chans", type=whole_number(1), metavar="N", help=told)
    told = "first convolution with stride 1 and no max pool after it"
    parser.add_argument("--small-stem", action="store_const", const=True, help=told)
    told = f"size of the images: a side, or height x width, in pixels (default: {SIDE}, or what the checkpoint expects)"
    parser.add_argument("--resolution", type=resolution_of, metavar="HxW", help=told)
    told = "take the settings from there: a model directory, a training workdir, WORKDIR/checkpoints/N or a .pth file"
    parser.add_argument("--checkpoint", help=told)
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the table")
    return parser.parse_args(argv)


def whole_number(least):
    """A number from `least` up, for `type=`."""

    def number(text):
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {MOST}")
        return int(text)

    return number


def resolution_of(text):
    """(height, width) of "224" or "192x256", for `type=`."""
    sides = [int(side) for side in text.split("x") if re.fullmatch("[0-9]{1,9}", side) and 0 < int(side) <= MOST]
    if len(sides) != text.count("x") + 1 or len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in pixels, like 224 or 192x256")
    return sides[0], sides[-1]


def table(stages):
    """Lines: a heading, each stage and the sums, in columns."""
    summed = total(stages)
    rows = [["stage", *COLUMNS]]
    rows += [[stage.name, *(_text(getattr(stage, name), name) for name in COLUMNS.values())] for stage in stages]
    rows += [["total", *(f"{summed[name]:,}" if name in summed else "" for name in COLUMNS.values())]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "   ".join([first.ljust(widths[0]), *cells]).rstrip()


def _text(value, name):
    if value is None:
        return {"receptive_field": "all", "stride": "-"}[name]
    return " x ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}"
