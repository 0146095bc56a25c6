"""`python -m shufflenet_jax info`: the costs of a network per stage, or of several networks side by side."""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..accounting import Stage, count, measure_milliseconds, total
from ..architecture import LAYOUTS, TABLE_FIELDS, TABLES, Table, name_of, resolve_table, table_settings, width_of
from ..config import MOST
from ..errors import InputError
from ..loading import load_model
from ..model import ShuffleNetV2, describe
from .parsing import CHECKPOINT, CommandLine, numbers, program_of, require_width_or_channels

DESCRIPTION = (
    "Show parameters, multiply-adds, activations, receptive field and output of each stage, for one image; with "
    "--compare the sums of several networks, and the time of each here."
)
DEFAULTS = {
    **table_settings(TABLES[1.0]),
    "layout": "torchvision",
    "num_classes": 1000,
    "in_chans": 3,
    "small_stem": False,
}
SIDE = 224
COLUMNS = {  # {heading: field of a Stage}
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
COMPARED = {  # {heading: figure}
    "parameters": "parameters",
    "multiply-adds": "multiply_adds",
    "activations": "activations",
}
COMPARED_MEANING = "activations: outputs of convolutions and fc; ms: one image on this machine, median"


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    options = parse(argv)
    given = {name: value for name in DEFAULTS if (value := getattr(options, name)) is not None}
    require_width_or_channels(options)
    if options.compare is not None:
        return compare(options, given)
    resolution = options.resolution
    if options.checkpoint is not None:
        if given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise InputError(f"{options.checkpoint} has settings of its own; leave out {names} or --checkpoint")
        module, _, info = load_model(options.checkpoint)
        resolution = resolution or info.preprocess.size
    else:
        module = ShuffleNetV2(**{**DEFAULTS, **given})
    height, width = resolution or (SIDE, SIDE)

    stages = count(module, height, width)
    settings = settings_of(module)
    if options.json:
        rows = [stage._asdict() for stage in stages]
        print(json.dumps({**settings, "resolution": [height, width], "stages": rows, "total": total(stages)}))
    else:
        images = f"{height} x {width} x {module.in_chans}"
        print(f"{describe(module)}, for an image of {images}", *table(stages), MEANING, sep="\n")
    return 0


def compare(options: argparse.Namespace, given: Mapping[str, Any]) -> int:
    """Print the costs of networks of several tables, a row each.

    Args:
      options: of the command.
      given: settings that the user chose.

    Returns:
      The exit status.

    Raises:
      InputError: an option describes another network.
    """
    taken = [name for name in (*TABLE_FIELDS, "checkpoint") if getattr(options, name) is not None]
    if taken:
        raise InputError(f"--compare names the tables itself; leave out {', '.join(f'--{name}' for name in taken)}")
    height, width = options.resolution or (SIDE, SIDE)
    tables = options.compare or list(TABLES.values())
    modules = [ShuffleNetV2(**{**DEFAULTS, **given, **table_settings(table)}) for table in tables]
    costs = [total(count(module, height, width)) for module in modules]
    times = measure_milliseconds(modules, height, width)
    rows = [
        {"name": name_of(table), **settings_of(module), **summed, "milliseconds": round(milliseconds, 3)}
        for table, module, summed, milliseconds in zip(tables, modules, costs, times, strict=True)
    ]
    if options.json:
        print(json.dumps({"resolution": [height, width], "networks": rows}))
        return 0
    cells = [["table", *COMPARED, "ms"]]
    cells += [
        [row["name"], *(f"{row[key]:,}" for key in COMPARED.values()), f"{row['milliseconds']:.2f}"] for row in rows
    ]
    print(f"{modules[0].layout} layout, for an image of {height} x {width} x {modules[0].in_chans}")
    print(*in_columns(cells), COMPARED_MEANING, sep="\n")
    return 0


def settings_of(module: ShuffleNetV2) -> dict[str, Any]:
    """Return the settings of a ShuffleNetV2 as JSON shows them, with channels and repeats.

    Args:
      module: the network.
    """
    table = module.table
    written = {"width": width_of(table), **table._asdict()}
    return {**written, **{name: getattr(module, name) for name in DEFAULTS if name not in written}}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Args:
      argv: the command's arguments.

    Raises:
      InputError: they are wrong.
    """
    parser = CommandLine(prog=program_of("info"), description=DESCRIPTION)
    parser.add_argument("--width", type=float, choices=TABLES, help=f"of the network (default: {DEFAULTS['width']})")
    help_text = "channels of the stem, stage2, stage3, stage4 and conv5, like 24,48,96,192,192, instead of a width"
    parser.add_argument("--channels", type=numbers, metavar="N,N,...", help=help_text)
    help_text = "units of stage2, stage3 and stage4 (default: 4,8,4)"
    parser.add_argument("--repeats", type=numbers, metavar="N,N,N", help=help_text)
    help_text = (
        "compare networks side by side: each a width, channels, or either with repeats after a slash, like "
        "24,48,96,192,192/4,8,1 (default: the published widths)"
    )
    parser.add_argument("--compare", type=table_named, nargs="*", metavar="TABLE", help=help_text)
    parser.add_argument("--layout", choices=LAYOUTS, help=f"its wiring (default: {DEFAULTS['layout']})")
    help_text = f"outputs of the classifier; 0 means no classifier (default: {DEFAULTS['num_classes']})"
    parser.add_argument("--num-classes", type=whole_number(0), metavar="N", help=help_text)
    help_text = f"channels of the images (default: {DEFAULTS['in_chans']})"
    parser.add_argument("--in-chans", type=whole_number(1), metavar="N", help=help_text)
    help_text = "first convolution with stride 1 and no max pool after it"
    parser.add_argument("--small-stem", action="store_const", const=True, help=help_text)
    help_text = f"size of the images: a side, or height x width, in pixels (default: {SIDE}, or the checkpoint's)"
    parser.add_argument("--resolution", type=resolution_of, metavar="HxW", help=help_text)
    parser.add_argument("--checkpoint", help=f"take the settings from there: {CHECKPOINT}")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the table")
    return parser.parse_args(argv)


def whole_number(least: int) -> Callable[[str], int]:
    """Return a function that parses a number from `least` up, for `type=`.

    Args:
      least: smallest allowed number.
    """

    def number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {MOST}")
        return int(text)

    return number


def table_named(text: str) -> Table:
    """Parse "0.5", "24,48,96,192,192" or either with "/4,8,1" after it, for `type=`.

    Args:
      text: the option's value.

    Raises:
      ArgumentTypeError: it has another form.
    """
    wide, _, deep = text.partition("/")
    try:
        repeats = numbers(deep) if deep else None
        if "," in wide:
            return resolve_table(None, numbers(wide), repeats)
        return resolve_table(float(wide.removesuffix("x")), None, repeats)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a width ({', '.join(map(str, TABLES))}) nor a table like 24,48,96,192,192/4,8,1"
        ) from error


def resolution_of(text: str) -> tuple[int, int]:
    """Parse "224" or "192x256" as (height, width), for `type=`.

    Args:
      text: the option's value.

    Raises:
      ArgumentTypeError: it has another form.
    """
    sides = [int(side) for side in text.split("x") if re.fullmatch("[0-9]{1,9}", side) and 0 < int(side) <= MOST]
    if len(sides) != text.count("x") + 1 or len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in pixels, like 224 or 192x256")
    return sides[0], sides[-1]


def table(stages: Sequence[Stage]) -> Iterator[str]:
    """Return lines: a heading, each stage and the sums, in columns.

    Args:
      stages: of the network.
    """
    summed = total(stages)
    rows = [["stage", *COLUMNS]]
    rows += [[stage.name, *(_text(getattr(stage, name), name) for name in COLUMNS.values())] for stage in stages]
    rows += [["total", *(f"{summed[name]:,}" if name in summed else "" for name in COLUMNS.values())]]
    return in_columns(rows)


def in_columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines of cells: the first column to the left, the others to the right.

    Args:
      rows: of cells.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "   ".join([first.ljust(widths[0]), *cells]).rstrip()


def _text(value: int | tuple[int, ...] | None, name: str) -> str:
    if value is None:
        return {"receptive_field": "all", "stride": "-"}[name]
    return " x ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}"
