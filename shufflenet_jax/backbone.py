"""Backbones: which feature maps `out_indices` mean, what they are, and a network without the layers behind them."""

import operator
from typing import NamedTuple

from .architecture import LEVELS
from .errors import InputError, Unchecked
from .model import ShuffleNetV2, variable_shapes
from .shapes import Variables


class FeatureMap(NamedTuple):
    """A feature map that a backbone returns.

    Attributes:
      name: of architecture.LEVELS.
      channels: of the map.
      reduction: how many pixels of the image's side one of its pixels stands for.
    """

    name: str
    channels: int
    reduction: int


class FeatureInfo(tuple[FeatureMap, ...]):
    """The feature maps of a backbone in their order, with the methods of timm's FeatureInfo."""

    __slots__ = ()

    def channels(self) -> list[int]:
        """Return the channels of each map."""
        return [level.channels for level in self]

    def reduction(self) -> list[int]:
        """Return the reduction of each map: 8 for maps of an eighth of the image's height and width."""
        return [level.reduction for level in self]

    def module_name(self) -> list[str]:
        """Return the name of each map."""
        return [level.name for level in self]


def resolve_levels(out_indices: Unchecked) -> tuple[str, ...]:
    """Return the names of the feature maps that indices mean.

    Args:
      out_indices: 0 to 4, for conv1, stem, stage2, stage3 and stage4, ascending; negative ones count from the end.
        None means all.

    Raises:
      InputError: they are not.
    """
    if out_indices is None:
        return LEVELS
    count = len(LEVELS)
    try:
        given = [operator.index(index) for index in out_indices]
    except TypeError as error:
        raise InputError(f"out_indices is {out_indices!r}, but must be a sequence of whole numbers") from error
    indices = [index % count for index in given]
    if not given or not all(-count <= index < count for index in given) or sorted(set(indices)) != indices:
        names = ", ".join(LEVELS)
        raise InputError(f"out_indices is {out_indices!r}, but must be some of 0 to 4 ({names}), ascending")
    return tuple(LEVELS[index] for index in indices)


def drop_layers(module: ShuffleNetV2, variables: Variables, outputs: tuple[str, ...]) -> tuple[ShuffleNetV2, Variables]:
    """Return a network that ends with the last of some feature maps.

    Args:
      module: a whole network.
      variables: its {"params", "batch_stats"}; not changed.
      outputs: names of architecture.LEVELS.

    Returns:
      (module, variables) without the layers that these maps do not need.
    """
    module = module.clone(num_classes=0, conv5=False, outputs=outputs)
    needed = variable_shapes(module)
    return module, {kind: {name: variables[kind][name] for name in layers} for kind, layers in needed.items()}


def feature_info_of(module: ShuffleNetV2) -> FeatureInfo:
    """Return what the feature maps of a network with `outputs` are."""
    stem, *stages, _ = module.table.channels
    first = 1 if module.small_stem else 2
    reductions = [first, first**2, *(first**2 * 2**number for number in range(1, len(stages) + 1))]
    levels = map(FeatureMap, LEVELS, [stem, stem, *stages], reductions)
    return FeatureInfo(level for level in levels if level.name in (module.outputs or LEVELS))
