"""The weights before the first step: fresh ones, or the fitting ones of a checkpoint."""

import logging
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .. import parallel
from ..architecture import Table, name_of
from ..config import ModelInfo, Preprocess, TrainConfig
from ..errors import InputError
from ..loading import adapt_channels, load_model
from ..model import ShuffleNetV2, init_variables, variable_shapes
from ..shapes import Variables

logger = logging.getLogger(__name__)

Tensors = dict[tuple[str, ...], Any]  # {("params", "stage2_unit0", "left_dw", "conv", "kernel"): array}
STEMS = {True: "a stem of stride 1 without max pool", False: "a stem of stride 2 with a max pool"}


def initial_variables(module: ShuffleNetV2, config: TrainConfig, info: ModelInfo) -> Variables:
    """Return {"params", "batch_stats"} before the first step, from a TrainConfig's seed and `init_from`.

    Args:
      module: the network to train.
      config: the settings.
      info: the network's model.json.

    Raises:
      InputError: the checkpoint's network has another wiring, or lacks frozen layers.
    """
    if not config.init_from:
        return init_variables(module, seed=config.seed)
    _, variables, theirs = load_model(config.init_from)
    if theirs.layout != info.layout:
        raise InputError(
            f"checkpoint {config.init_from} has layout {theirs.layout}, but the network to train {info.layout}; change "
            "one of them"
        )
    variables, preprocess = adapt_channels(variables, theirs.preprocess, info.in_chans)
    _warn_of_other_input(config, preprocess)
    if theirs.small_stem != info.small_stem and parallel.is_first():
        logger.warning(
            "%s was trained with %s, and the network to train has %s; `small_stem` chooses it",
            config.init_from,
            *(STEMS[network.small_stem] for network in (theirs, info)),
        )
    stored = flatten_dict(variables)
    if (theirs.num_classes, theirs.classes) != (info.num_classes, info.classes):
        stored = {path: leaf for path, leaf in stored.items() if path[1] != "fc"}
    if theirs.table != info.table:
        shapes = flatten_dict(variable_shapes(module))
        stored = _fitting(config, stored, shapes, tables=(theirs.table, info.table))
    fresh = flatten_dict(init_variables(module, seed=config.seed))
    begun = {path: np.asarray(stored[path], leaf.dtype) if path in stored else leaf for path, leaf in fresh.items()}
    layers = set(map(_layer_of, fresh))
    missing = _summarize({_layer_of(path) for path in fresh if path not in stored}, layers)
    changes = f"; reinitialized: {', '.join(missing)}" if missing else ""
    if theirs.in_chans != info.in_chans:
        changes += f"; conv1 takes {info.in_chans} instead of {theirs.in_chans} channels"
    count = len(fresh.keys() & stored.keys())
    logger.info("begins with %d of %d tensors of %s%s", count, len(fresh), config.init_from, changes)
    return jax.tree.map(np.asarray, unflatten_dict(begun))


def _fitting(config: TrainConfig, stored: Tensors, shapes: Tensors, *, tables: tuple[Table, Table]) -> Tensors:
    """Return the tensors of those layers that have the same shapes in a checkpoint and in the network to train.

    A layer is a convolution with its batch norm; one without the other is useless. The classifier depends on conv5.

    Args:
      config: whose `init_from` names the checkpoint.
      stored: the checkpoint's tensors.
      shapes: of the network's.
      tables: of both.

    Raises:
      InputError: no layer fits, or a frozen layer does not fit.
    """
    theirs, ours = map(name_of, tables)
    beyond = {_layer_of(path) for path in stored.keys() - shapes.keys()}
    misfits = {_layer_of(path) for path in shapes if path not in stored or stored[path].shape != shapes[path].shape}
    if ("conv5",) in misfits:
        misfits.add(("fc",))
    fitting = {path: leaf for path, leaf in stored.items() if _layer_of(path) not in misfits | beyond}
    frozen = [name for name in config.frozen if name in {layer[0].partition("_unit")[0] for layer in misfits}]
    if frozen or not fitting:
        raise InputError(
            f"checkpoint {config.init_from} has the table {theirs}, whose {', '.join(frozen) or 'layers'} do not fit a "
            f"network of {ours}{', so they cannot be frozen' if frozen else ''}; "
            f"{'change `freeze`' if frozen else 'omit `init_from`'}"
        )
    if parallel.is_first():
        unused = ", ".join(_summarize(beyond, set(map(_layer_of, stored))))
        logger.warning(
            "%s has the table %s, the network to train %s: only layers of equal shapes are copied%s",
            *(config.init_from, theirs, ours, f"; not in this network: {unused}" if unused else ""),
        )
    return fitting


def _layer_of(path: tuple[str, ...]) -> tuple[str, ...]:
    """Return the layer of a tensor's path: ("stage2_unit0", "left_dw"), or ("fc",) for the classifier."""
    return path[1:-2] or path[1:2]


def _summarize(some: set[tuple[str, ...]], layers: set[tuple[str, ...]]) -> list[str]:
    """List some of a network's layers, with complete stages and units by their own names."""
    names: list[str] = []
    for name in (lambda layer: layer[0].partition("_unit")[0], lambda layer: layer[0], "/".join):
        complete = set(map(name, some)) - set(map(name, layers - some))
        names += complete
        some = {layer for layer in some if name(layer) not in complete}
    return sorted(names)


def _warn_of_other_input(config: TrainConfig, theirs: Preprocess) -> None:
    """Warn if a checkpoint expects images in other colors or on another scale."""
    ours = config.preprocess
    same = theirs.channel_order == ours.channel_order and all(
        np.allclose(
            np.divide(getattr(theirs, name), theirs.scale), np.divide(getattr(ours, name), ours.scale), rtol=0.01
        )
        for name in ("mean", "std")
    )
    if not same and parallel.is_first():
        logger.warning(
            "%s was trained on images that were normalized in another way; `preprocessing` chooses it", config.init_from
        )
