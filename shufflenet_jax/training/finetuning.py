"""With which weights a training begins: fresh ones, or those of a checkpoint as far as they fit."""

import logging

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .. import parallel
from ..errors import InputError
from ..loading import adapt_channels, load_model
from ..model import init_variables

logger = logging.getLogger(__name__)

STEMS = {True: "a stem of stride 1 without max pool", False: "a stem of stride 2 with a max pool"}


def initial_variables(module, config, info):
    """{"params", "batch_stats"} before the first step, from a TrainConfig's seed and `init_from`.

    Args:
      module: the ShuffleNetV2 to train.
      config: a TrainConfig.
      info: its ModelInfo.
    Raises:
      InputError: the checkpoint's network is another one.
    """
    fresh = init_variables(module, seed=config.seed)
    if not config.init_from:
        return fresh
    _, stored, known = load_model(config.init_from)
    for name in ("width", "layout"):
        if getattr(known, name) != getattr(info, name):
            raise InputError(
                f"checkpoint {config.init_from} has {name} {getattr(known, name)}, but the network to train "
                f"{getattr(info, name)}; change one of them"
            )
    stored, preprocess = adapt_channels(stored, known.preprocess, info.in_chans)
    _warn_of_other_input(config, preprocess)
    if known.small_stem != info.small_stem and parallel.is_first():
        logger.warning(
            "%s was trained with %s, and the network to train has %s; `small_stem` chooses it",
            config.init_from,
            *(STEMS[network.small_stem] for network in (known, info)),
        )
    fresh, stored = flatten_dict(fresh), flatten_dict(stored)
    if (known.num_classes, known.classes) != (info.num_classes, info.classes):
        stored = {path: leaf for path, leaf in stored.items() if path[1] != "fc"}
    begun = {path: np.asarray(stored[path], leaf.dtype) if path in stored else leaf for path, leaf in fresh.items()}
    anew = sorted({path[1] for path in fresh if path not in stored})
    which = f"; reinitialized: {', '.join(anew)}" if anew else ""
    if known.in_chans != info.in_chans:
        which += f"; conv1 takes {info.in_chans} instead of {known.in_chans} channels"
    count = len(fresh.keys() & stored.keys())
    logger.info("begins with %d of %d tensors of %s%s", count, len(fresh), config.init_from, which)
    return jax.tree.map(np.asarray, unflatten_dict(begun))


def _warn_of_other_input(config, known):
    """Says so where a checkpoint knows its images in other colours or on another scale."""
    ours = config.preprocess
    same = known.channel_order == ours.channel_order and all(
        np.allclose(np.divide(getattr(known, name), known.scale), np.divide(getattr(ours, name), ours.scale), rtol=0.01)
        for name in ("mean", "std")
    )
    if not same and parallel.is_first():
        logger.warning(
            "%s was trained on images that were normalized in another way; `preprocessing` chooses it", config.init_from
        )
