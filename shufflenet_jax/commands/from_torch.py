"""`convert/from_torch.py`: converts a published PyTorch checkpoint to a model directory, with proof."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import checkpoint, hub
from ..config import PREPROCESSING
from ..errors import InputError
from ..files import path_of
from ..model import describe
from ..porting.dialects import DIALECTS
from .parsing import CommandLine, positive_integer, program_of

DESCRIPTION = "Convert a PyTorch ShuffleNetV2 checkpoint into a model directory, and prove that both compute the same."


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    parser = CommandLine(prog=program_of("convert"), description=DESCRIPTION)
    parser.add_argument(
        "ckpt",
        help="the PyTorch file, with the names of MMPretrain, torchvision, Megvii or ericsun99: a state dict, a "
        "training's checkpoint that holds one, a pickled module or a TorchScript program",
    )
    parser.add_argument("--out", help="the model directory to write (default: the file's name without ending, here)")
    parser.add_argument("--dialect", choices=DIALECTS, help="require these names instead of recognizing them")
    parser.add_argument(
        "--ema",
        action="store_true",
        help="take the averaged weights (state_dict_ema, model_ema, ema_state_dict, ...); MMEngine's hook stores the "
        "averages in state_dict, and the raw weights under ema_state_dict",
    )
    stated = parser.add_argument_group("what a file does not show")
    stated.add_argument(
        "--small-stem",
        action=argparse.BooleanOptionalAction,
        help="the first convolution has stride 1 and no max pool follows, as in networks for CIFAR (default: as in a "
        "pickled module, else no)",
    )
    stated.add_argument(
        "--preprocessing",
        choices=PREPROCESSING,
        help="whose way to decode, scale and normalize images (default: that of the project whose names the file has)",
    )
    stated.add_argument(
        "--image-size",
        metavar="PIXELS",
        type=positive_integer,
        help="side of the square input (default: the preprocessing's, 224 or for cifar10 and digits 32)",
    )
    stated.add_argument(
        "--classes",
        metavar="FILE",
        help="class names in the order of the labels, one per line (default: those in the file, else for 1000 classes "
        "ImageNet's)",
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison with PyTorch")
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory if there is one")
    options = parser.parse_args(argv)
    if hub.is_repository(options.ckpt):
        raise InputError(f"{options.ckpt} needs no conversion: it is a checkpoint wherever one can stand")
    from ..porting import convert  # It needs PyTorch, an extra, and the options above do not.

    out = path_of(options.out or Path(options.ckpt).stem)
    file = convert.read(options.ckpt, ema=options.ema)
    checkpoint.require_free(out, overwrite=options.overwrite)
    statements = convert.Statements(
        small_stem=options.small_stem,
        preprocessing=options.preprocessing,
        image_size=options.image_size,
        classes=convert.read_classes(options.classes) if options.classes else None,
    )
    conversion = convert.convert(file, dialect=options.dialect, statements=statements)
    print(f"{file.name}: {conversion.dialect}, {describe(conversion.module)}")
    if not options.no_verify:
        rows = convert.verify(conversion)
        print(convert.table(rows))
        if not all(row.passed for row in rows):
            print("JAX and PyTorch compute different things: nothing written")
            return 1
    checkpoint.save_model(out, conversion.info, conversion.variables, overwrite=options.overwrite)
    print(f"wrote {out}")
    return 0
