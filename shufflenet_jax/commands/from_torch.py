"""`convert/from_torch.py`: a published PyTorch checkpoint becomes a model directory, with proof."""

from pathlib import Path

from .. import checkpoint
from ..model import describe
from ..porting import convert
from ..porting.dialects import DIALECTS
from .parsing import CommandLine

DESCRIPTION = "Convert a PyTorch ShuffleNetV2 checkpoint into a model directory, and prove that both compute the same."


def main(argv):
    parser = CommandLine(prog="from_torch.py", description=DESCRIPTION)
    parser.add_argument("ckpt", help="the PyTorch file: legacy or zip, of MMPretrain, torchvision, Megvii or ericsun99")
    parser.add_argument("--out", help="the model directory to write (default: the file's name without ending, here)")
    parser.add_argument("--dialect", choices=DIALECTS, help="insist on this naming instead of recognising it")
    parser.add_argument(
        "--ema",
        action="store_true",
        help="take ema_state_dict instead of state_dict; MMEngine's hook stores the averaged weights in state_dict, "
        "and the raw ones under this name",
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison with PyTorch")
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory if there is one")
    options = parser.parse_args(argv)

    out = Path(options.out or Path(options.ckpt).stem)
    file = convert.read(options.ckpt, ema=options.ema)
    convert.warn_if_outdated(file)
    checkpoint.require_free(out, overwrite=options.overwrite)
    conversion = convert.convert(file, dialect=options.dialect)
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
