"""The names that published PyTorch files give to the weights: one table a dialect, read in both directions.

Keys follow the code of MMPretrain, torchvision, Megvii and ericsun99.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ..architecture import CHANNELS, UNITS
from ..config import MEGVII_EVAL, MMPRETRAIN_EVAL, MOST, TORCHVISION_EVAL, TORCHVISION_EVAL_LARGE, Preprocess
from ..errors import InputError
from ..model import ShuffleNetV2, variable_shapes


@dataclass(frozen=True)
class Dialect:
    """One project's way to name, wire and feed ShuffleNetV2."""

    # Their convolution and batch norm for each of our ConvBNs.
    conv1: tuple[str, str]
    conv5: tuple[str, str]
    # The same inside a unit, behind its prefix: {stage} is 2..4, {layer} 0..2, {unit} starts anew in each stage,
    # {index} does not.
    unit_prefix: str
    unit: dict[str, tuple[str, str]]
    # Their classifier.
    fc: str
    layout: str
    # How the authors evaluate: by width, None for all others.
    preprocess: dict[float | None, Preprocess]

    def preprocess_of(self, width):
        """How the authors evaluate a width."""
        return self.preprocess.get(width, self.preprocess[None])

    def layer_keys(self):
        """{our ConvBN's path: (their convolution, their batch norm)}, in the order of the network."""
        layers = {"conv1": self.conv1}
        index = 0
        for layer, (stage, units) in enumerate(UNITS.items()):
            for unit in range(units):
                prefix = self.unit_prefix.format(stage=layer + 2, layer=layer, unit=unit, index=index)
                for name, (conv, bn) in self.unit.items():
                    if unit == 0 or name.startswith("right"):  # Only stride-2 units have layers on the left.
                        layers[f"{stage}_unit{unit}/{name}"] = (prefix + conv, prefix + bn)
                index += 1
        return {**layers, "conv5": self.conv5}

    def tensor_keys(self):
        """{our leaf's path: their key} for every tensor of the network, in the order of their files."""
        keys = {}
        for layer, (conv, bn) in self.layer_keys().items():
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


# The branches of a unit where they are flat sequences of convolution, batch norm and, behind 1x1 convolutions, ReLU.
def _left(branch):
    return {"left_dw": (f"{branch}.0", f"{branch}.1"), "left_pw": (f"{branch}.2", f"{branch}.3")}


def _right(branch):
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
    unit=_left("banch1") | _right("banch2"),  # Sic.
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
# Backbones of detectors that follow Megvii's code; trained on values in 0..1.
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
    """Where a table of tensors holds a network."""

    dialect: str
    prefix: str  # What stands in front of the backbone's names, like "module.backbone.".
    matches: int  # How many tensors have names of the dialect.


# Entries that averaging and thop's profiler leave beside the weights.
COUNTERS = {"n_averaged", "num_updates", "steps", "total_ops", "total_params"}
DEEPEST = 7  # Parts of the longest name, layers.0.0.branch1.0.conv.weight.
FEWEST = 20  # Tensors; half a network has more.


def find_networks(keys: Collection[str]) -> list[Network]:
    """Find every ShuffleNetV2 in a table of tensors, whatever stands in front of its names.

    Args:
      keys: the names in the table.
    Returns:
      A Network for each prefix behind which at least half of a dialect's names follow, in the order of the table.
    """
    if len(keys) < FEWEST:
        return []
    speakers: dict[str, list[str]] = {}  # {name: the dialects that have it}
    for dialect, rules in DIALECTS.items():
        for key in rules.tensor_keys().values():
            speakers.setdefault(bare(key), []).append(dialect)
    sizes = Counter(dialect for names in speakers.values() for dialect in names)
    counts: Counter[tuple[str, str]] = Counter()
    for key in keys:
        for prefix, name in _splits(key):
            counts.update((prefix, dialect) for dialect in speakers.get(name, ()))
    best: dict[str, Network] = {}
    for (prefix, dialect), count in counts.items():
        # Fewer than half of the names is another network that happens to share some, like a ResNet's conv1 and fc.
        if 2 * count >= sizes[dialect] and (prefix not in best or best[prefix].matches < count):
            best[prefix] = Network(dialect, prefix, count)
    return list(best.values())


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Yield (what stands in front, name) for each way to cut a key before one of its parts, longest names first."""
    parts = key.rsplit(".", DEEPEST)
    for cut in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])


def bare(key: str) -> str:
    """Return a dialect's name without the `backbone.` that other files leave out."""
    return key.removeprefix("backbone.")


def canonical(
    tensors: dict[str, Any], network: Network, networks: Sequence[Network] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Rename a network's tensors as the dialect's own code names them.

    Args:
      tensors: {key: tensor} that hold the network, and perhaps more.
      network: which one.
      networks: all that the table holds.
    Returns:
      {the dialect's own key: tensor}, in which unknown names behind the network's prefix stay as they are, and the
      keys that belong to no network.
    Raises:
      InputError: two keys name the same tensor.
    """
    rules, prefix = DIALECTS[network.dialect], network.prefix
    counters = [f"{bn}.num_batches_tracked" for _, bn in rules.layer_keys().values()]
    known = {bare(key): key for key in (*rules.tensor_keys().values(), *counters)}
    classifier = _classifier_keys(tensors, rules, prefix)
    others = tuple(other.prefix for other in networks if other.prefix != prefix)
    within = tuple(other for other in others if other.startswith(prefix))
    renamed: dict[str, Any] = {}
    unknown, left_out = [], []
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        if key in classifier:
            renamed[classifier[key]] = tensor
        elif key.rpartition(".")[2] in COUNTERS or key.startswith(within):
            continue
        elif not key.startswith(prefix):
            left_out += [] if key.startswith(others) else [key]
        elif name in known:
            renamed[known[name]] = tensor
        else:
            unknown.append(name)
    for name in unknown:
        twice = next((known[end] for _, end in _splits(name) if known.get(end) in renamed), None)
        if twice:
            raise InputError(f"the file holds {twice} twice, with and without a prefix; keep one of both")
        renamed[name] = tensors[prefix + name]
    return renamed, left_out


def _classifier_keys(tensors: dict[str, Any], rules: Dialect, prefix: str) -> dict[str, str]:
    """Return {the file's key: the dialect's own} of the classifier, {} where there is none.

    It stands beside the backbone's layers or in a module around them, by itself or, after a dropout, in a sequence.
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


def module_for(tensors, dialect):
    """The ShuffleNetV2 whose weights these are, from the shapes under the dialect's own keys.

    Raises:
      InputError: the stages have the channels of no published width.
    """
    votes = {stage: Counter() for stage in UNITS}
    for layer, (conv, _) in dialect.layer_keys().items():
        shape = _shape(tensors, f"{conv}.weight")
        if layer.endswith("right_dw") and len(shape) == 4:
            votes[layer.partition("_")[0]][2 * shape[0]] += 1
    # What most units of a stage say: single tensors that are missing or misshapen are named later, by `from_torch`.
    found = {stage: counts.most_common(1)[0][0] for stage, counts in votes.items() if counts}
    fitting = [
        width
        for width, channels in CHANNELS.items()
        if all(found.get(stage, count) == count for stage, count in zip(UNITS, channels, strict=False))
    ]
    if not found or not fitting:
        published = "; ".join(f"{w}x {', '.join(map(str, c[:3]))}" for w, c in CHANNELS.items())
        raise InputError(
            f"the stages have {', '.join(map(str, found.values())) or 'no'} channels, which no published width has "
            f"({published}); such a file cannot be converted"
        )
    has_conv5 = any(f"{name}.weight" in tensors for name in dialect.conv5)
    weight, bias = (_shape(tensors, f"{dialect.fc}.{name}") for name in ("weight", "bias"))
    num_classes = (weight or bias or (0,))[0]
    if num_classes > MOST:
        raise InputError(
            f"the classifier has {num_classes:,} classes, which cannot be; such a file cannot be converted"
        )
    first = _shape(tensors, f"{dialect.conv1[0]}.weight")
    return ShuffleNetV2(
        width=fitting[0],
        layout=dialect.layout,
        num_classes=num_classes,
        conv5=has_conv5 or num_classes > 0,
        in_chans=first[1] if len(first) == 4 and first[1] else 3,
    )


def _shape(tensors, key):
    return np.shape(tensors[key]) if key in tensors else ()


def from_torch(tensors, dialect, module):
    """PyTorch's tensors as Flax variables.

    Args:
      tensors: {the dialect's own key: array}.
      dialect: a Dialect.
      module: the ShuffleNetV2 whose variables they are.
    Returns:
      {"params", "batch_stats"} of float32 NumPy arrays, and the number of batches that the batch norms have tracked:
      one number where all agree, else {layer: number} of those that the file gives.
    Raises:
      InputError: names every tensor that is missing, too many, misshapen, or not made of finite float32 numbers.
    """
    shapes = flatten_dict(variable_shapes(module))
    keys = {path: key for path, key in dialect.tensor_keys().items() if path in shapes}
    counters = {
        layer: f"{bn}.num_batches_tracked"
        for layer, (_, bn) in dialect.layer_keys().items()
        if ("params", *layer.split("/"), "bn", "scale") in shapes
    }
    faults = {
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
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise InputError(f"the tensors do not make a {module.width}x ShuffleNetV2: {told}")
    counts = {layer: int(tensors[key]) for layer, key in counters.items() if key in tensors}
    if len(counts) == len(counters) and len(set(counts.values())) == 1:
        counts = next(iter(counts.values()))
    return unflatten_dict(variables), counts


def to_torch(variables, dialect, counts):
    """The way back: {the dialect's own key: array} in the order of its files, bit for bit what `from_torch` read."""
    flat = flatten_dict(variables)
    tensors = {}
    for path, key in dialect.tensor_keys().items():
        if path in flat:
            tensors[key] = np.ascontiguousarray(_torch_axes(np.asarray(flat[path])))
            layer = "/".join(path[1:-2])
            count = counts.get(layer) if isinstance(counts, dict) else counts
            if path[-1] == "var" and count is not None:
                tensors[key.replace("running_var", "num_batches_tracked")] = np.asarray(count, np.int64)
    return tensors


def _is_float32(array):
    """Whether an array holds finite numbers that float32 keeps as they are."""
    if not np.issubdtype(array.dtype, np.floating):
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array).all() and (array.astype(np.float32) == array).all())


def _flax_axes(array):
    """(O, I, H, W) as (H, W, I, O), (O, I) as (I, O)."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _torch_shape(shape):
    """The same of shapes."""
    return (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _torch_axes(array):
    """(H, W, I, O) as (O, I, H, W), (I, O) as (O, I)."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
