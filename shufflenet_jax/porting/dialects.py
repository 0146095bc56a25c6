"""Parameter names in published PyTorch files: one table for each dialect, used in both directions.

A dialect is one project's way to name, wire and feed the network. The names are those in the code of MMPretrain,
torchvision, Megvii and ericsun99.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ..architecture import COLUMNS, STAGES, TABLES, Table, fault_of, name_of, table_settings, width_of
from ..config import MEGVII_EVAL, MMPRETRAIN_EVAL, MOST, TORCHVISION_EVAL, TORCHVISION_EVAL_LARGE, Preprocess
from ..errors import InputError
from ..model import ShuffleNetV2, variable_shapes

Tensor = TypeVar("Tensor")
Tensors = Mapping[str, np.ndarray]  # {the dialect's own key: a network's tensor}
Variables = dict[str, Any]  # {"params", "batch_stats"}: trees of arrays of any depth, which Python cannot type.
BatchCounts = int | dict[str, int]  # Training batches that batch norm has seen: in all layers, else {layer: number}.
CANNOT_CONVERT = "this file cannot be converted"


@runtime_checkable
class HasShape(Protocol):
    """An array of any library."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""


@dataclass(frozen=True)
class Dialect:
    """One project's way to name, wire and feed ShuffleNetV2.

    Attributes:
      conv1: names of the first convolution and its batch norm.
      conv5: names of the last convolution and its batch norm.
      unit_prefix: start of the names in a unit. {stage} is 2 to 4, {layer} is 0 to 2, {unit} counts the units of a
        stage and {index} those of the network, both from 0.
      unit: {our ConvBN in a unit: names of its convolution and batch norm after the prefix}.
      fc: name of the classifier.
      layout: how units are wired, see `architecture.Layout`.
      preprocess: {width: how the authors prepare images for evaluation}; None stands for all other tables.
    """

    conv1: tuple[str, str]
    conv5: tuple[str, str]
    unit_prefix: str
    unit: dict[str, tuple[str, str]]
    fc: str
    layout: str
    preprocess: dict[float | None, Preprocess]

    def preprocess_of(self, table: Table) -> Preprocess:
        """Return how the authors prepare images to evaluate a network with a table."""
        return self.preprocess.get(width_of(table), self.preprocess[None])

    def layer_keys(self, repeats: Sequence[int]) -> dict[str, tuple[str, str]]:
        """Return the names of each layer, in the order of the network.

        Args:
          repeats: number of units in each stage.

        Returns:
          {path of our ConvBN: (name of the convolution, name of the batch norm)}.
        """
        layers = {"conv1": self.conv1}
        index = 0
        for layer, units in enumerate(repeats):
            for unit in range(units):
                prefix = self.unit_prefix.format(stage=layer + 2, layer=layer, unit=unit, index=index)
                for name, (conv, bn) in self.unit.items():
                    if unit == 0 or name.startswith("right"):  # Only stride-2 units have layers on the left.
                        layers[f"stage{layer + 2}_unit{unit}/{name}"] = (prefix + conv, prefix + bn)
                index += 1
        return {**layers, "conv5": self.conv5}

    def tensor_keys(self, repeats: Sequence[int]) -> dict[tuple[str, ...], str]:
        """Return the key of each tensor, in the order of the dialect's files.

        Args:
          repeats: number of units in each stage.

        Returns:
          {path of our leaf: the dialect's own key}.
        """
        keys = {}
        for layer, (conv, bn) in self.layer_keys(repeats).items():
            path = tuple(layer.split("/"))
            keys["params", *path, "conv", "kernel"] = f"{conv}.weight"
            keys["params", *path, "bn", "scale"] = f"{bn}.weight"
            keys["params", *path, "bn", "bias"] = f"{bn}.bias"
            keys["batch_stats", *path, "bn", "mean"] = f"{bn}.running_mean"
            keys["batch_stats", *path, "bn", "var"] = f"{bn}.running_var"
        keys["params", "fc", "kernel"] = f"{self.fc}.weight"
        if self.layout != "megvii":
            keys["params", "fc", "bias"] = f"{self.fc}.bias"
        return keys

    @property
    def numbers_all_units(self) -> bool:
        """Whether one numbering runs through the units of all stages."""
        return "{index}" in self.unit_prefix

    @cached_property
    def _names_in_unit(self) -> dict[str, str]:
        """{name of a tensor after the prefix of its unit: our ConvBN in the unit}."""
        return {
            f"{layer}.{leaf}": ours
            for ours, (conv, bn) in self.unit.items()
            for layer, leaves in ((conv, ("weight",)), (bn, ("weight", "bias", "running_mean", "running_var")))
            for leaf in leaves
        }

    @cached_property
    def _unit_pattern(self) -> re.Pattern[str]:
        """The pattern of the names of tensors in units, without `backbone.`."""
        pattern = re.escape(bare(self.unit_prefix))
        for field, numbers in (("stage", "[234]"), ("layer", "[012]"), ("unit", r"\d{1,2}"), ("index", r"\d{1,3}")):
            pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{numbers})")
        return re.compile(f"{pattern}(?P<name>.+)")

    def unit_of(self, key: str) -> tuple[int, int, str] | None:
        """Find the unit that a tensor belongs to.

        Args:
          key: name of the tensor, with or without `backbone.`.

        Returns:
          (stage, unit, our ConvBN in the unit), or None for a tensor outside the units. Both numbers start from 0. The
          stage is 0 where one numbering runs through the units of all stages.
        """
        match = self._unit_pattern.fullmatch(bare(key))
        layer = match and self._names_in_unit.get(match["name"])
        if not match or not layer:
            return None
        numbers = match.groupdict()
        stage = int(numbers["stage"]) - 2 if "stage" in numbers else int(numbers.get("layer", 0))
        return stage, int(numbers.get("unit") or numbers["index"]), layer

    def repeats_in(self, keys: Iterable[str]) -> tuple[int, ...]:
        """Count the units in each stage from the names of the tensors.

        A unit counts if at least half of the tensors of its right branch are present. A few tensors that are missing or
        unexpected therefore change nothing.

        Args:
          keys: names of tensors, with or without `backbone.`.

        Returns:
          The number of units in each stage. Where one numbering runs through the units of all stages, a unit with a
          left branch starts a new stage, so the result may have more or fewer than three numbers.
        """
        tensors: Counter[tuple[int, int, str]] = Counter()
        for place in filter(None, map(self.unit_of, keys)):
            stage, unit, layer = place
            tensors[stage, unit, layer.partition("_")[0]] += 1
        sizes = Counter(layer.partition("_")[0] for layer in self._names_in_unit.values())
        branches = {place for place, count in tensors.items() if 2 * count >= sizes[place[2]]}
        units = [
            max((unit + 1 for stage, unit, side in branches if side == "right" and stage == number), default=0)
            for number in range(len(STAGES))
        ]
        if not self.numbers_all_units:
            return tuple(units)
        starts = sorted({0, *(unit for _, unit, side in branches if side == "left" and unit < units[0])})
        return tuple(end - start for start, end in zip(starts, [*starts[1:], units[0]], strict=True))


# In most dialects a branch is a flat sequence: convolution, batch norm and, after 1x1 convolutions, ReLU.
def _left(branch: str) -> dict[str, tuple[str, str]]:
    return {"left_dw": (f"{branch}.0", f"{branch}.1"), "left_pw": (f"{branch}.2", f"{branch}.3")}


def _right(branch: str) -> dict[str, tuple[str, str]]:
    return {
        "right_pw1": (f"{branch}.0", f"{branch}.1"),
        "right_dw": (f"{branch}.3", f"{branch}.4"),
        "right_pw2": (f"{branch}.5", f"{branch}.6"),
    }


MMPRETRAIN = Dialect(
    conv1=("backbone.conv1.conv", "backbone.conv1.bn"),
    conv5=("backbone.layers.3.conv", "backbone.layers.3.bn"),
    unit_prefix="backbone.layers.{layer}.{unit}.",
    unit={
        "left_dw": ("branch1.0.conv", "branch1.0.bn"),
        "left_pw": ("branch1.1.conv", "branch1.1.bn"),
        "right_pw1": ("branch2.0.conv", "branch2.0.bn"),
        "right_dw": ("branch2.1.conv", "branch2.1.bn"),
        "right_pw2": ("branch2.2.conv", "branch2.2.bn"),
    },
    fc="head.fc",
    layout="torchvision",
    preprocess={None: MMPRETRAIN_EVAL},
)
TORCHVISION = Dialect(
    conv1=("conv1.0", "conv1.1"),
    conv5=("conv5.0", "conv5.1"),
    unit_prefix="stage{stage}.{unit}.",
    unit=_left("branch1") | _right("branch2"),
    fc="fc",
    layout="torchvision",
    preprocess={None: TORCHVISION_EVAL, 1.5: TORCHVISION_EVAL_LARGE, 2.0: TORCHVISION_EVAL_LARGE},
)
ERICSUN99 = Dialect(
    conv1=("conv1.0", "conv1.1"),
    conv5=("conv_last.0", "conv_last.1"),
    unit_prefix="features.{index}.",
    unit=_left("banch1") | _right("banch2"),  # The misspelling is the project's own.
    fc="classifier.0",
    layout="torchvision",
    preprocess={None: TORCHVISION_EVAL},
)
MEGVII = Dialect(
    conv1=("first_conv.0", "first_conv.1"),
    conv5=("conv_last.0", "conv_last.1"),
    unit_prefix="features.{index}.",
    unit=_right("branch_main") | _left("branch_proj"),
    fc="classifier.0",
    layout="megvii",
    preprocess={None: MEGVII_EVAL},
)
# Backbones of detectors that follow Megvii's code. They were trained on values from 0 to 1.
MEGVII_STAGES = dataclasses.replace(
    MEGVII,
    unit_prefix="stage{stage}.{unit}.",
    preprocess={None: dataclasses.replace(MEGVII_EVAL, scale=1 / 255)},
)

DIALECTS = {
    "mmpretrain": MMPRETRAIN,
    "torchvision": TORCHVISION,
    "megvii": MEGVII,
    "megvii-stages": MEGVII_STAGES,
    "ericsun99": ERICSUN99,
}


class Network(NamedTuple):
    """The place of a network in a table of tensors.

    Attributes:
      dialect: whose names the tensors have, a key of DIALECTS.
      prefix: what precedes the names of the backbone, for example "module.backbone.".
      matches: number of tensors with names of the dialect.
    """

    dialect: str
    prefix: str
    matches: int


# Entries that weight averaging and the profiler thop store beside the weights.
COUNTERS = {"n_averaged", "num_updates", "steps", "total_ops", "total_params"}
DEEPEST = 7  # Parts of the longest name, layers.0.0.branch1.0.conv.weight.
FEWEST = 20  # Fewer tensors than half of any network.


def find_networks(keys: Collection[str]) -> list[Network]:
    """Find every ShuffleNetV2 in a table of tensors, whatever precedes its names.

    Args:
      keys: names of the tensors.

    Returns:
      A Network for each prefix with at least half of a dialect's names, in the order of the table.
    """
    if len(keys) < FEWEST:
        return []
    numbers = [int(part) for key in keys for part in key.split(".") if part.isdecimal() and len(part) <= 2]
    speakers: dict[str, list[str]] = {}  # {name: dialects that have it}
    for dialect, rules in DIALECTS.items():
        for key in rules.tensor_keys([max(numbers, default=0) + 1] * len(STAGES)).values():
            speakers.setdefault(bare(key), []).append(dialect)
    counts: Counter[tuple[str, str]] = Counter()
    for key in keys:
        for prefix, name in _splits(key):
            counts.update((prefix, dialect) for dialect in speakers.get(name, ()))
    best: dict[str, Network] = {}
    for (prefix, dialect), count in counts.items():
        network = _network_at(prefix, dialect, keys) if count >= FEWEST else None
        if network and (prefix not in best or best[prefix].matches < network.matches):
            best[prefix] = network
    return list(best.values())


def _network_at(prefix: str, dialect: str, keys: Collection[str]) -> Network | None:
    """Return the Network of a dialect with a prefix, or None if fewer than half of its names are present.

    Other architectures share some names: a ResNet has conv1 and fc too.
    """
    rules, names = DIALECTS[dialect], [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    repeats = [max(units, 1) for units in rules.repeats_in(names)]
    own_names = set(map(bare, rules.tensor_keys(repeats).values()))
    matches = sum(name in own_names for name in names)
    return Network(dialect, prefix, matches) if 2 * matches >= len(own_names) else None


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Yield (prefix, name) for each way to split a key at a dot, longest names first."""
    parts = key.rsplit(".", DEEPEST)
    for cut in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])


def bare(key: str) -> str:
    """Return a dialect's name without `backbone.`, which some files leave out."""
    return key.removeprefix("backbone.")


def canonical(
    tensors: Mapping[str, Tensor], network: Network, networks: Sequence[Network] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors of a network as the dialect's own code names them.

    Args:
      tensors: {key: tensor} of a table with the network.
      network: the network to rename.
      networks: all networks in the table.

    Returns:
      {the dialect's own key: tensor}, where unknown names only lose the network's prefix, and the keys that belong to
      no network.

    Raises:
      InputError: two keys name the same tensor.
    """
    rules, prefix = DIALECTS[network.dialect], network.prefix
    repeats = rules.repeats_in(key.removeprefix(prefix) for key in tensors if key.startswith(prefix))
    counters = [f"{bn}.num_batches_tracked" for _, bn in rules.layer_keys(repeats).values()]
    own_keys = {bare(key): key for key in (*rules.tensor_keys(repeats).values(), *counters)}
    classifier = _classifier_keys(tensors, rules, prefix)
    others = tuple(other.prefix for other in networks if other.prefix != prefix)
    within = tuple(other for other in others if other.startswith(prefix))
    renamed: dict[str, Tensor] = {}
    unknown, left_out = [], []
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        if key in classifier:
            renamed[classifier[key]] = tensor
        elif key.rpartition(".")[2] in COUNTERS or key.startswith(within):
            continue
        elif not key.startswith(prefix):
            left_out += [] if key.startswith(others) else [key]
        elif name in own_keys:
            renamed[own_keys[name]] = tensor
        else:
            unknown.append(name)
    for name in unknown:
        twice = next((own_keys[end] for _, end in _splits(name) if own_keys.get(end) in renamed), None)
        if twice:
            raise InputError(f"the file holds {twice} twice, with and without a prefix; remove one of the two")
        renamed[name] = tensors[prefix + name]
    return renamed, left_out


def _classifier_keys(tensors: Mapping[str, Any], rules: Dialect, prefix: str) -> dict[str, str]:
    """Return {the file's key: the dialect's own key} of the classifier, {} where there is none.

    The classifier lies beside the layers of the backbone or in a module around them, alone or, after dropout, in a
    sequence.
    """
    alone = rules.fc.removesuffix(".0")
    numbered = re.compile(rf"{re.escape(alone)}\.\d+")
    matrices = [key.removesuffix(".weight") for key, tensor in tensors.items() if key.endswith(".weight")
                and np.ndim(tensor) == 2]  # fmt: skip
    while True:
        here = [key for key in matrices if key.startswith(prefix)]
        names = [key for key in here if key[len(prefix) :] == alone or numbered.fullmatch(key[len(prefix) :])]
        if len(names) == 1:
            keys = {f"{names[0]}.{leaf}": f"{rules.fc}.{leaf}" for leaf in ("weight", "bias")}
            return {key: name for key, name in keys.items() if key in tensors}
        if names or not prefix:
            return {}
        prefix = prefix[:-1].rpartition(".")[0]
        prefix += "." if prefix else ""


def module_for(tensors: Mapping[str, HasShape], dialect: Dialect) -> ShuffleNetV2:
    """Infer the ShuffleNetV2 from the names and shapes of its tensors.

    Single tensors that are missing or misshapen do not matter here; `from_torch` reports them.

    Args:
      tensors: {the dialect's own key: tensor}.
      dialect: whose keys they are.

    Raises:
      InputError: no ShuffleNetV2 has these channels and units.
    """
    weight, bias = (_shape(tensors, f"{dialect.fc}.{name}") for name in ("weight", "bias"))
    num_classes = (weight or bias or (0,))[0]
    if num_classes > MOST:
        raise InputError(
            f"the classifier has {num_classes:,} classes, more than the {MOST:,} that are possible; {CANNOT_CONVERT}"
        )
    conv5 = any(f"{name}.weight" in tensors for name in dialect.conv5) or num_classes > 0
    first = _shape(tensors, f"{dialect.conv1[0]}.weight")
    return ShuffleNetV2(
        **table_settings(_read_table(tensors, dialect)),
        layout=dialect.layout,
        num_classes=num_classes,
        conv5=conv5,
        in_chans=first[1] if len(first) == 4 and first[1] else 3,
    )


class Size(NamedTuple):
    """What the length of one axis of a tensor implies for the table.

    Attributes:
      column: which of the table's channels it concerns, an index of `architecture.COLUMNS`.
      part: "all" of these channels, a "half", or the outputs of the "left" or "right" branch in a stage's first unit.
      channels: length of the axis.
      key: name of the tensor.
    """

    column: int
    part: str
    channels: int
    key: str


class Vote(NamedTuple):
    """The number of channels that most tensors imply for a part of the table.

    Attributes:
      channels: that number; 0 if no tensor implies any.
      key: name of the first tensor with that number.
      tensors: how many axes of tensors have that length.
    """

    channels: int
    key: str
    tensors: int


def _read_table(tensors: Mapping[str, HasShape], dialect: Dialect) -> Table:
    """Infer the table of channels and units; in each stage the majority of the tensors decides.

    Raises:
      InputError: no network has this table; the message names a tensor that shows why.
    """
    repeats = dialect.repeats_in(tensors)
    _require_stages(dialect, repeats)
    sizes = list(_sizes(tensors, dialect, repeats))

    def vote(column: int, part: str) -> Vote:
        return _vote(size for size in sizes if (size.column, size.part) == (column, part))

    stem, conv5, halves = vote(0, "all"), vote(4, "all"), [vote(column, "half") for column in (1, 2, 3)]
    stages = tuple(2 * half.channels for half in halves)
    # Without conv5 its number has no effect. The published number lets the table have the name of a width.
    usual = {table.channels[:4]: table.channels[4] for table in TABLES.values()}.get((stem.channels, *stages))
    table = Table((stem.channels, *stages, conv5.channels or usual or TABLES[1.0].channels[4]), repeats)
    if fault := fault_of(table, dialect.layout):
        keys = dict(zip(COLUMNS, (stem.key, *(half.key for half in halves), conv5.key), strict=True))
        raise InputError(f"{fault} ({keys.get(fault.partition(' ')[0], '')}); {CANNOT_CONVERT}")
    for column, half in enumerate(halves, start=1):
        inputs, outputs = table.channels[column - 1 : column + 1]
        left = inputs if dialect.layout == "megvii" else half.channels
        _require_fit(column, half, "all", vote(column, "all"), outputs)
        _require_fit(column, half, "left", vote(column, "left"), left)
        _require_fit(column, half, "right", vote(column, "right"), outputs - left)
    return table


def _require_stages(dialect: Dialect, repeats: tuple[int, ...]) -> None:
    """Raise InputError unless there are three stages with units."""
    if dialect.numbers_all_units and len(repeats) != len(STAGES):
        starts = [sum(repeats[:stage]) for stage in range(len(repeats))]
        first = [dialect.unit_prefix.format(index=start) + dialect.unit["left_dw"][0] for start in starts]
        raise InputError(
            f"its units form {len(repeats)} stages, since each left branch starts one, but a ShuffleNetV2 has "
            f"{len(STAGES)} ({', '.join(f'{name}.weight' for name in first)}); {CANNOT_CONVERT}"
        )
    for layer, (stage, units) in enumerate(zip(STAGES, repeats, strict=True)):
        if not units:
            prefix = dialect.unit_prefix.format(stage=layer + 2, layer=layer, unit=0)
            key = f"{prefix}{dialect.unit['right_dw'][0]}.weight"
            raise InputError(f"{stage} has no units: {key} is missing; {CANNOT_CONVERT}")


def _require_fit(column: int, half: Vote, part: str, vote: Vote, expected: int) -> None:
    """Raise InputError if several tensors contradict the channels of a stage, or of a branch in its first unit.

    Args:
      column: index of the stage in `architecture.COLUMNS`.
      half: vote on half of the stage's channels, from its units.
      part: "all", "left" or "right", as in Size.
      vote: vote on that part.
      expected: channels of that part that fit the halves.
    """
    # Only one tensor shows the output channels of stage4.
    one_more = part == "all" and vote.channels == expected + 1
    if vote.channels == expected or (vote.tensors < 2 and not one_more):
        return
    stage, seen = COLUMNS[column], f"{vote.channels} channels ({vote.key})"
    if part == "all" and vote.channels % 2:
        reason = f"{stage} has {seen}, an odd number, but its units split them into halves"
    elif part == "all":
        reason = f"the halves of {stage} do not fit: they have {half.channels} channels ({half.key}), the stage {seen}"
    else:
        reason = f"the halves of {stage} do not fit: the {part} branch of its first unit has {seen}, not {expected}"
    raise InputError(f"{reason}; {CANNOT_CONVERT}")


def _sizes(tensors: Mapping[str, HasShape], dialect: Dialect, repeats: tuple[int, ...]) -> Iterator[Size]:
    """Yield what each axis of each tensor implies for the table."""
    for layer, (conv, bn) in dialect.layer_keys(repeats).items():
        outputs, inputs = _axes(layer)
        shape = _shape(tensors, f"{conv}.weight")
        if len(shape) == 4:
            yield Size(*outputs, shape[0], f"{conv}.weight")
            if inputs:
                yield Size(*inputs, shape[1], f"{conv}.weight")
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shape = _shape(tensors, f"{bn}.{leaf}")
            if len(shape) == 1:
                yield Size(*outputs, shape[0], f"{bn}.{leaf}")
    shape = _shape(tensors, f"{dialect.fc}.weight")
    if len(shape) == 2:
        yield Size(4, "all", shape[1], f"{dialect.fc}.weight")


def _axes(layer: str) -> tuple[tuple[int, str], tuple[int, str] | None]:
    """Return the outputs and inputs of a ConvBN as (column, part) of Size; inputs that the table lacks are None."""
    if layer in ("conv1", "conv5"):
        return ((0, "all"), None) if layer == "conv1" else ((4, "all"), (3, "all"))
    unit, _, name = layer.partition("/")
    stage, _, number = unit.partition("_unit")
    column, first = COLUMNS.index(stage), number == "0"
    half, entering = (column, "half"), (column - 1, "all") if first else (column, "half")
    return {
        "left_dw": (entering, None),
        "left_pw": ((column, "left"), entering),
        "right_pw1": (half, entering),
        "right_dw": (half, None),
        "right_pw2": ((column, "right") if first else half, half),
    }[name]


def _vote(sizes: Iterable[Size]) -> Vote:
    """Return what most of the sizes imply; 0 channels if there are none."""
    sizes = list(sizes)
    if not sizes:
        return Vote(0, "", 0)
    channels, count = Counter(size.channels for size in sizes).most_common(1)[0]
    return Vote(channels, next(size.key for size in sizes if size.channels == channels), count)


def _shape(tensors: Mapping[str, HasShape], key: str) -> tuple[int, ...]:
    return tensors[key].shape if key in tensors else ()


def from_torch(tensors: Tensors, dialect: Dialect, module: ShuffleNetV2) -> tuple[Variables, BatchCounts]:
    """Convert a network's PyTorch tensors to Flax variables.

    Args:
      tensors: {the dialect's own key: tensor}.
      dialect: whose keys they are.
      module: the ShuffleNetV2 with these variables.

    Returns:
      {"params", "batch_stats"} of float32 NumPy arrays, and the number of training batches that batch norm has seen:
      one number if all layers agree, else {layer: number} of the layers for which the file has one.

    Raises:
      InputError: tensors are missing, unexpected, misshapen or not finite float32 numbers; the message names them all.
    """
    shapes = flatten_dict(variable_shapes(module))
    keys = {path: key for path, key in dialect.tensor_keys(module.table.repeats).items() if path in shapes}
    counters = {
        layer: f"{bn}.num_batches_tracked"
        for layer, (_, bn) in dialect.layer_keys(module.table.repeats).items()
        if ("params", *layer.split("/"), "bn", "scale") in shapes
    }
    faults: dict[str, list[str]] = {
        "missing": [key for key in keys.values() if key not in tensors],
        "unexpected": sorted(tensors.keys() - set(keys.values()) - set(counters.values())),
        "misshapen": [],
        "not numbers that float32 holds": [],
    }
    variables = {}
    for path, key in keys.items():
        if key in tensors:
            array = np.asarray(tensors[key])
            expected = _torch_shape(shapes[path].shape)
            if array.shape != expected:
                faults["misshapen"].append(f"{key} is {array.shape}, not {expected}")
            elif not _is_float32(array) or (path[-1] == "var" and (array < 0).any()):
                faults["not numbers that float32 holds"].append(key)
            else:
                variables[path] = np.ascontiguousarray(_flax_axes(array), np.float32)
    for key in counters.values():
        if key in tensors and (np.shape(tensors[key]) or not np.issubdtype(tensors[key].dtype, np.integer)):
            faults["misshapen"].append(f"{key} is not one whole number")
    if any(faults.values()):
        reasons = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        network = name_of(module.table, conv5=module.conv5)
        raise InputError(f"the tensors do not form a ShuffleNetV2 {network}: {reasons}")
    counts = {layer: int(tensors[key]) for layer, key in counters.items() if key in tensors}
    agree = len(counts) == len(counters) and len(set(counts.values())) == 1
    return unflatten_dict(variables), next(iter(counts.values())) if agree else counts


def to_torch(variables: Variables, dialect: Dialect, counts: BatchCounts | None) -> dict[str, np.ndarray]:
    """Convert Flax variables to PyTorch tensors: the inverse of `from_torch`, bit for bit.

    Args:
      variables: {"params", "batch_stats"} of a ShuffleNetV2.
      dialect: whose keys the tensors get.
      counts: the number of training batches that batch norm has seen, as `from_torch` returns it; None if unknown.

    Returns:
      {the dialect's own key: tensor} in the order of the dialect's files.
    """
    flat = flatten_dict(variables)
    units = Counter(path[1].partition("_unit")[0] for path in flat if path[-3:] == ("right_dw", "conv", "kernel"))
    tensors = {}
    for path, key in dialect.tensor_keys([units[stage] for stage in STAGES]).items():
        if path in flat:
            tensors[key] = np.ascontiguousarray(_torch_axes(np.asarray(flat[path])))
            layer = "/".join(path[1:-2])
            count = counts.get(layer) if isinstance(counts, dict) else counts
            if path[-1] == "var" and count is not None:
                tensors[key.replace("running_var", "num_batches_tracked")] = np.asarray(count, np.int64)
    return tensors


def _is_float32(array: np.ndarray) -> bool:
    """Whether an array holds finite numbers that float32 represents exactly."""
    if not np.issubdtype(array.dtype, np.floating):
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array).all() and (array.astype(np.float32) == array).all())


def _flax_axes(array: np.ndarray) -> np.ndarray:
    """Transpose (O, I, H, W) to (H, W, I, O), and (O, I) to (I, O)."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an array after `_torch_axes`, from its shape before."""
    return (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _torch_axes(array: np.ndarray) -> np.ndarray:
    """Transpose (H, W, I, O) to (O, I, H, W), and (I, O) to (O, I)."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
