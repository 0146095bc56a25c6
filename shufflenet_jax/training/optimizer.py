"""The update of the parameters: PyTorch's SGD, which adds L2 to the gradient before momentum, and its AdamW."""

from collections.abc import Collection
from typing import Any

import jax
import optax

from ..batch_groups import Epoch
from ..config import TrainConfig
from ..shapes import Array, Params
from .schedule import make_schedule

KeyPath = tuple[Any, ...]  # As jax.tree.map_with_path gives it; JAX's keys have no common type.


def make_optimizer(config: TrainConfig, epoch: Epoch) -> optax.GradientTransformation:
    """Return the optimizer of a TrainConfig, as PyTorch computes it; optional clipping comes first.

    Args:
      config: the settings.
      epoch: number of steps of a pass.
    """
    learning_rate = make_schedule(config, epoch)

    def mask(params: Params) -> Params:
        return decays(params, config.decay, config.frozen)

    if config.optimizer == "adamw":
        betas = {"b1": config.momentum, "b2": config.beta2}
        parts = [optax.adamw(learning_rate, **betas, weight_decay=config.weight_decay, mask=mask)]
    else:
        parts = [
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.sgd(learning_rate, momentum=config.momentum, nesterov=config.nesterov),
        ]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.backbone_lr != 1:
        parts.append(optax.stateless(lambda updates, _: _slow_backbone(updates, config.backbone_lr)))
    return optax.chain(*parts)


def _slow_backbone(updates: Params, share: float) -> Params:
    """Multiply the updates of all layers except the classifier by a share."""
    return jax.tree.map_with_path(lambda path, leaf: leaf if path[0].key == "fc" else leaf * share, updates)


def decays(params: Params, which: str = "no_norm", frozen: Collection[str] = ()) -> Params:
    """Return a tree of booleans: whether weight decay applies to each parameter.

    Args:
      params: the network's parameters, or their shapes.
      which: a TrainConfig's `decay`.
      frozen: layers and stages that do not train.
    """

    def applies(path: KeyPath, leaf: Array | jax.ShapeDtypeStruct) -> bool:
        if is_frozen(path, frozen):
            return False
        if which == "matrices":
            return leaf.ndim > 1
        return which == "all" or all(entry.key != "bn" for entry in path)

    return jax.tree.map_with_path(applies, params)


def is_frozen(path: KeyPath, frozen: Collection[str]) -> bool:
    """Return whether a parameter belongs to a frozen layer or stage.

    Args:
      path: of the parameter.
      frozen: layers and stages that do not train.
    """
    return path[0].key.partition("_unit")[0] in frozen


def decay_table(params: Params, which: str, frozen: Collection[str] = ()) -> str:
    """Describe which parameters decay: a line per kind with tensors, numbers and whether weight decay applies.

    Args:
      params: the network's parameters, or their shapes.
      which: a TrainConfig's `decay`.
      frozen: layers and stages that do not train, which get a line of their own.
    """
    kinds: dict[str, tuple[int, int, bool]] = {}
    frozen_tensors = frozen_numbers = 0
    flags = jax.tree.leaves(decays(params, which))
    for (path, leaf), applies in zip(jax.tree.leaves_with_path(params), flags, strict=True):
        if is_frozen(path, frozen):
            frozen_tensors += 1
            frozen_numbers += leaf.size
            continue
        *above, layer, name = (entry.key for entry in path)
        depthwise = layer == "conv" and above[-1].endswith("_dw")
        kind = f"{'depthwise ' if depthwise else ''}{layer}/{name}"
        tensors, numbers, _ = kinds.get(kind, (0, 0, applies))
        kinds[kind] = tensors + 1, numbers + leaf.size, applies
    rows = [f"{'parameters':24}{'tensors':>8}{'numbers':>12}  weight decay"]
    rows += [f"{kind:24}{n:8}{size:12,}  {'yes' if on else 'no'}" for kind, (n, size, on) in kinds.items()]
    if frozen:
        rows.append(f"{'frozen':24}{frozen_tensors:8}{frozen_numbers:12,}  {', '.join(frozen)}, with their statistics")
    return "\n".join(rows)
