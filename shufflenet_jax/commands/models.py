"""`models`: the published weights, what they are and where they come from."""

import json

from ..inference import describe_published, list_models
from .parsing import CommandLine, program_of

DESCRIPTION = (
    "List the published weights. Every name is a --checkpoint, whose file is downloaded on first use; Megvii's, which "
    "lie in a cloud drive, are put into the cache by hand. Accuracies are what the authors publish for ImageNet."
)


def main(argv):
    parser = CommandLine(prog=program_of("models"), description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="a JSON object for each, one a line")
    options = parser.parse_args(argv)
    columns = (30, 7, 13, 16, 8, 8, 13, 14)
    names = ("name", "width", "parameters", "multiply-adds", "top-1", "top-5", "from", "licence")
    if not options.json:
        print("".join(f"{name:{width}}" for name, width in zip(names, columns, strict=True)).rstrip())
    for row in map(describe_published, list_models()):
        if options.json:
            print(json.dumps(row))
            continue
        told = (row["name"], f"{row['width']}x", f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e6:.1f} M")
        told += (f"{row['top1']:.2f}", f"{row['top5']:.2f}", row["source"], row["licence"])
        print("".join(f"{word:{width}}" for word, width in zip(told, columns, strict=True)).rstrip())
    return 0
