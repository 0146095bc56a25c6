"""`models`: the published weights, what they are and where they come from."""

import json
from collections.abc import Sequence
from typing import Any

from ..accounting import count, total
from ..checkpoint import module_of
from ..inference import published_info
from ..published import Published, list_models
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
    for row in map(row_of, list_models().items()):
        if options.json:
            print(json.dumps(row))
            continue
        cells = [row["name"], f"{row['width']}x", f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e6:.1f} M"]
        cells += [f"{row['top1']:.2f}", f"{row['top5']:.2f}", row["source"], row["licence"]]
        print("".join(f"{cell:{width}}" for cell, width in zip(cells, columns, strict=True)).rstrip())
    return 0


def row_of(item: tuple[str, Published]) -> dict[str, Any]:
    """Return the figures of published weights.

    Args:
      item: of `list_models`.
    """
    name, published = item
    info = published_info(name)
    summed = total(count(module_of(info), *info.preprocess.size))
    costs = {key: summed[key] for key in ("parameters", "multiply_adds")}
    facts = {key: getattr(published, key) for key in ("width", "layout", "top1", "top5", "source", "licence", "file")}
    url = f"{published.place}{published.file}" if published.place else None
    return {"name": name, **costs, **facts, "url": url}
