"""`convert/to_torch.py`: a model directory becomes a PyTorch checkpoint in any dialect of its wiring."""

from ..files import written_aside
from ..loading import load_model
from ..porting.dialects import DIALECTS
from .parsing import CHECKPOINT, CommandLine, program_of

DESCRIPTION = "Write a model directory as a PyTorch checkpoint; what was converted from PyTorch comes back bit for bit."


def main(argv):
    parser = CommandLine(prog=program_of("convert-back"), description=DESCRIPTION)
    parser.add_argument("dir", help=CHECKPOINT)
    parser.add_argument("--dialect", choices=DIALECTS, required=True, help="the project whose names to use")
    parser.add_argument("--out", required=True, help="the file to write")
    options = parser.parse_args(argv)
    from ..porting import convert  # It needs PyTorch, an extra, and the options above do not.

    with written_aside(options.out) as draft:
        tensors = convert.back_to_torch(*load_model(options.dir), options.dialect)
        convert.save_torch(tensors, options.dialect, draft)
    print(f"wrote {options.out}: {len(tensors)} tensors")
    return 0
