"""A trained network in the form in which it predicts fastest: batch norm folded into the convolutions.

In the planar lowering also without shuffles: `plan` follows where each channel goes, and weights are permuted to match.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import ops, planar
from .model import EPSILON, UNITS, ShuffleNetV2


@dataclass(frozen=True)
class Deployed:
    """The fast form of a ShuffleNetV2; `apply(weights, images)` returns what the module's `apply` does."""

    module: ShuffleNetV2

    @property
    def dtype(self):
        return self.module.dtype

    def apply(self, weights, images):
        """(logits, features) of images (B, H, W, C), as `ShuffleNetV2` has them, but for inference only."""
        if _is_planar(self.module):
            return _apply_planar(self.module, weights, images)
        return self.module.clone(folded=True).apply(weights, images)


def deploy(module, variables):
    """(Deployed, its weights) of a ShuffleNetV2 and its variables {"params", "batch_stats"}, on the host."""
    folded = fold(variables)
    if _is_planar(module):
        folded = arrange(module, folded)
    stored = jnp.promote_types(module.dtype, jnp.float32)
    return Deployed(module), jax.tree.map(lambda leaf: np.asarray(leaf, stored), {"params": folded})


def fold(variables):
    """The parameters of a `ShuffleNetV2(folded=True)`: in float64, {layer: {"conv": {"kernel", "bias"}}} and "fc"."""

    def merge(params, statistics):
        if "conv" not in params:
            return {name: merge(child, statistics[name]) for name, child in params.items()}
        kernel, scale, bias = (
            np.asarray(leaf, np.float64)
            for leaf in (params["conv"]["kernel"], *map(params["bn"].get, ("scale", "bias")))
        )
        mean, var = (np.asarray(statistics["bn"][name], np.float64) for name in ("mean", "var"))
        factor = scale / np.sqrt(var + EPSILON)
        return {"conv": {"kernel": kernel * factor, "bias": bias - mean * factor}}

    params = dict(variables["params"])
    classifier = {"fc": params.pop("fc")} if "fc" in params else {}
    return {**merge(params, variables["batch_stats"]), **classifier}


def _is_planar(module):
    return ops.resolve(module.lowering) is planar


class Step(NamedTuple):
    """What a unit of stride 1 does with the pieces that hold its input's channels."""

    right: list  # (piece, slice of its channels) for each part of what goes through the right branch.
    left: list  # The same for the rest.
    order: np.ndarray  # Which channel of the right branch each of the right parts' channels is.


def plan(features, left, units, layout):
    """Where the channels of a stage go, when nothing is ever shuffled.

    Args:
      features: channels of the stage.
      left: how many of them the left branch of the first unit makes.
      units: of the stage.
      layout: the network's.
    Returns:
      (a Step for each unit but the first, positions): the positions in the stage's output of the channels of the
      pieces that are left at its end, one piece after the other.
    """
    half, joined = features // 2, layout == "megvii"
    # A piece is an array of channels, known by their positions in the output of the unit before.
    pieces = [np.arange(left), np.arange(left, features)] if joined else [np.arange(half) * 2, np.arange(half) * 2 + 1]
    steps = []
    for _ in range(units - 1):
        right, left, order, kept = [], [], [], []
        for index, positions in enumerate(pieces):
            goes_right = positions % 2 == 1 if joined else positions >= half
            for chosen, parts in ((goes_right, right), (~goes_right, left)):
                if chosen.any():
                    parts.append((index, _as_slice(np.flatnonzero(chosen))))
            order.append((positions[goes_right] - 1) // 2 if joined else positions[goes_right] - half)
            if not goes_right.all():
                kept.append(positions[~goes_right] // 2 if joined else positions[~goes_right] * 2)
        steps.append(Step(right, left, np.concatenate(order)))
        pieces = [*kept, np.arange(half) + half if joined else np.arange(half) * 2 + 1]
    return steps, np.concatenate(pieces)


def _as_slice(indices):
    """Evenly spaced indices as a slice."""
    step = int(indices[1] - indices[0]) if len(indices) > 1 else 1
    return slice(int(indices[0]), int(indices[-1]) + 1, step)


def plans(module, params):
    """(stage, its steps, positions) for each stage of folded parameters; positions are as `plan` has them."""
    for stage, units in UNITS.items():
        left, right = (params[f"{stage}_unit0"][name]["conv"]["kernel"].shape[-1] for name in ("left_pw", "right_pw2"))
        yield stage, *plan(left + right, left, units, module.layout)


def arrange(module, folded):
    """Folded parameters for a network that follows its `plans`: input channels in their order, and no bias behind
    depthwise convolutions."""
    params = jax.tree.map(np.asarray, folded)

    def reorder(layer, order, axis=-2):
        layer["conv"]["kernel"] = np.take(layer["conv"]["kernel"], order, axis)

    def skip_bias(unit, depthwise, following):
        # No ReLU lies between: the bias of a depthwise convolution may as well be added behind the next one.
        conv = unit[following]["conv"]
        conv["bias"] = conv["bias"] + unit[depthwise]["conv"].pop("bias") @ conv["kernel"][0, 0]

    order = None
    for stage, steps, positions in list(plans(module, params)):
        first = params[f"{stage}_unit0"]
        skip_bias(first, "left_dw", "left_pw")
        skip_bias(first, "right_dw", "right_pw2")
        if order is not None:
            reorder(first["right_pw1"], order)
            reorder(first["left_dw"], order, axis=-1)
            reorder(first["left_pw"], order)
        for index, step in enumerate(steps, start=1):
            unit = params[f"{stage}_unit{index}"]
            skip_bias(unit, "right_dw", "right_pw2")
            reorder(unit["right_pw1"], step.order)
        order = positions
    if module.conv5:
        reorder(params["conv5"], order)
    return params


def _apply_planar(module, weights, images):
    params, dtype = weights["params"], module.dtype
    x = planar.enter(images.astype(dtype))
    x = _layer(x, params["conv1"], stride=1 if module.small_stem else 2)
    x = x if module.small_stem else planar.max_pool(x)
    features = {"stem": planar.leave(x)}

    for stage, steps, positions in plans(module, params):
        unit = params[f"{stage}_unit0"]
        left = _layer(_layer(x, unit["left_dw"], stride=2), unit["left_pw"])
        pieces = [left, _right_branch(x, unit, stride=2)]
        for index, step in enumerate(steps, start=1):
            x = jnp.concatenate([pieces[piece][channels] for piece, channels in step.right])
            right = _right_branch(x, params[f"{stage}_unit{index}"], stride=1)
            pieces = [*(pieces[piece][channels] for piece, channels in step.left), right]
        x = jnp.concatenate(pieces)
        features[stage] = planar.leave(x[np.argsort(positions)])
    if not module.conv5:
        return None, features

    x = _layer(x, params["conv5"])
    features["conv5"] = planar.leave(x)
    stored = jnp.promote_types(dtype, jnp.float32)
    features["pooled"] = x = planar.global_mean(x.astype(stored))
    if not module.num_classes:
        return None, features
    logits = x @ params["fc"]["kernel"].astype(stored)
    return logits + params["fc"]["bias"][None] if "bias" in params["fc"] else logits, features


def _right_branch(x, unit, *, stride):
    return _layer(_layer(_layer(x, unit["right_pw1"]), unit["right_dw"], stride=stride), unit["right_pw2"])


def _layer(x, layer, *, stride=1):
    """A convolution and, unless it is a depthwise one, bias and ReLU."""
    kernel = layer["conv"]["kernel"].astype(x.dtype)
    x = planar.conv(x, kernel, stride=stride, groups=x.shape[0] // kernel.shape[2])
    if "bias" not in layer["conv"]:
        return x
    return jax.nn.relu(x + planar.per_channel(layer["conv"]["bias"].astype(x.dtype)))
