"""`models`: the published weights, what they are and where they come from."""

import json
from collections.abc import Sequence

from ..inference import describe_published, list_models
from .parsing import CommandLine, program_of

DESCRIPTION = (
    "List the published weights. Every name is a --checkpoint, whose file is downloaded on first use; Megvii's, which "
    "lie in a cloud drive, are put into the cache by hand. Accuracies are what the authors publish for ImageNet."
)


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    parser = CommandLine(prog=program_of("models"), description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print a JSON object for each, one per line")
    options = parser.parse_args(argv)
    columns = (30, 7, 13, 16, 8, 8, 13, 14)
    names = ("name", "width", "parameters", "multiply-adds", "top-1", "top-5", "from", "licence")
    if not options.json:
        print("".join(f"{name:{width}}" for name, width in zip(names, columns, strict=True)).rstrip())
    for row in map(describe_published, list_models()):
        if options.json:
            print(json.dumps(row))
            continue
        cells = [row["name"], f"{row['width']}x", f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e6:.1f} M"]
        cells += [f"{row['top1']:.2f}", f"{row['top5']:.2f}", row["source"], row["licence"]]
        print("".join(f"{cell:{width}}" for cell, width in zip(cells, columns, strict=True)).rstrip())
    return 0
