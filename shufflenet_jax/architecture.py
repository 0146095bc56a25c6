"""What all networks of the family share: channel tables, wirings and the names of their parts.

The published tables are those of table 5 of Ma et al. (ECCV 2018). Nothing here needs JAX.
"""

import operator
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

from .errors import InputError, Unchecked

STAGES = ("stage2", "stage3", "stage4")
COLUMNS = ("stem", *STAGES, "conv5")  # The layers whose channels a table lists.
LAYERS = ("conv1", *STAGES, "conv5")  # The backbone, as parameter paths name it.
LEVELS = ("conv1", "stem", *STAGES)  # What `out_indices` of a backbone count: each has half of the resolution before.
FEATURES = (*COLUMNS, "pooled")  # The outputs that a network returns beside its logits.
Layout = Literal["torchvision", "megvii"]  # How units are wired; "megvii" is the authors' own release.
LAYOUTS = get_args(Layout)
MOST_CHANNELS, MOST_UNITS = 10_000, 100  # Of a layer, and of a stage: far beyond any use.
TABLE_FIELDS = ("width", "channels", "repeats")  # The settings and the keys of model.json that describe a table.


class Table(NamedTuple):
    """How wide and how deep a network is.

    Attributes:
      channels: outputs of the stem, stage2, stage3, stage4 and conv5.
      repeats: units of stage2, stage3 and stage4.
    """

    channels: tuple[int, ...]
    repeats: tuple[int, ...]


REPEATS = (4, 8, 4)
TABLES = {  # {width: its published table}
    0.5: Table((24, 48, 96, 192, 1024), REPEATS),
    1.0: Table((24, 116, 232, 464, 1024), REPEATS),
    1.5: Table((24, 176, 352, 704, 1024), REPEATS),
    2.0: Table((24, 244, 488, 976, 2048), REPEATS),
}


def resolve_table(width: Unchecked, channels: Unchecked = None, repeats: Unchecked = None) -> Table:
    """Return the table of a width, or of the channels or repeats that replace its own.

    Args:
      width: a key of TABLES; None if `channels` are given.
      channels: outputs of the stem, stage2, stage3, stage4 and conv5, instead of the width's.
      repeats: units of stage2, stage3 and stage4, instead of the width's.

    Raises:
      InputError: there is no such width, or the others are no whole numbers. `fault_of` says whether they fit.
    """
    published = isinstance(width, Real) and not isinstance(width, bool) and width in TABLES
    if not published and (width is not None or channels is None):
        raise InputError(
            f"width is {width!r}, but must be one of {', '.join(map(str, TABLES))}; `channels` describes other networks"
        )
    usual = TABLES[1.0 if width is None else width]
    return Table(
        usual.channels if channels is None else _whole_numbers("channels", channels),
        usual.repeats if repeats is None else _whole_numbers("repeats", repeats),
    )


def _whole_numbers(name: str, values: Unchecked) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, values))
    except TypeError as error:
        raise InputError(f"{name} is {values!r}, but must be a sequence of whole numbers") from error


def table_settings(table: Table) -> dict[str, Any]:
    """Return {"width", "channels", "repeats"} of a table: a published one by its width alone, others without width.

    Args:
      table: any table.
    """
    width = width_of(table)
    return dict(zip(TABLE_FIELDS, (None, *table) if width is None else (width, None, None), strict=True))


def width_of(table: Table) -> float | None:
    """Return the width of a published table, or None for another table."""
    return next((width for width, published in TABLES.items() if published == table), None)


def name_of(table: Table, *, conv5: bool = True) -> str:
    """Return a table's name: "1.0x" if it is published, else its channels and repeats, like "24,48,96,192,192/4,8,4".

    Args:
      table: a Table.
      conv5: whether the network has conv5; without it the table's last number means nothing, and the name omits it.
    """
    width = width_of(table)
    if width is not None:
        return f"{width}x"
    channels = table.channels if conv5 else table.channels[:-1]
    return f"{','.join(map(str, channels))}/{','.join(map(str, table.repeats))}"


def fault_of(table: Table, layout: str) -> str | None:
    """Return why no network of a layout can have a table, or None if one can.

    Args:
      table: the table.
      layout: wiring of the network.
    """
    groups = (
        ("channels", "channels", table.channels, COLUMNS, MOST_CHANNELS),
        ("repeats", "units", table.repeats, STAGES, MOST_UNITS),
    )
    for name, kind, numbers, parts, most in groups:
        if len(numbers) != len(parts):
            return f"{name} has {len(numbers)} numbers, but must have {len(parts)}: those of {', '.join(parts)}"
        for part, number in zip(parts, numbers, strict=True):
            if not 1 <= number <= most:
                return f"{part} has {number:,} {kind}, but must have 1 to {most:,}"
    for stage, inputs, outputs in zip(STAGES, table.channels, table.channels[1:], strict=False):
        if outputs % 2:
            return f"{stage} has {outputs} channels, an odd number, but its units split them into halves"
        if layout == "megvii" and outputs <= inputs:
            return (
                f"{stage} has {outputs} channels, but in layout megvii must have more than the {inputs} that enter it: "
                "its first unit passes these on and adds the others"
            )
    return None
