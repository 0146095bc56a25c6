"""A trained network in the form in which it predicts fastest: batch norm folded into the convolutions.

On CPUs also: arrays (C, pixels) whose rows of pixels end in one column of zeros, so that a shift by a tap is a shift
along one axis; and no shuffles: `plan` follows where each channel goes, and the weights are permuted to match.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import ops, planar
from .model import EPSILON, UNITS, ShuffleNetV2

FEW_IMAGES = 8  # Below that the stem's views are no long rows of numbers, and one matrix product is faster.


@dataclass(frozen=True)
class Deployed:
    """The fast form of a ShuffleNetV2; `apply(weights, images)` returns what the module's `apply` does."""

    module: ShuffleNetV2

    @property
    def dtype(self):
        return self.module.dtype

    def apply(self, weights, images):
        """(logits, features) of images (B, H, W, C), as `ShuffleNetV2` has them, but for inference only."""
        if _flat(self.module):
            return _apply_flat(self.module, weights, images)
        return self.module.clone(folded=True).apply(weights, images)


def deploy(module, variables):
    """(Deployed, its weights) of a ShuffleNetV2 and its variables {"params", "batch_stats"}, on the host."""
    folded = fold(variables)
    if _flat(module):
        folded = _arrange(module, folded)
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


def _flat(module):
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


def _plans(module, params):
    """(stage, its steps, positions) for each stage."""
    for stage, units in UNITS.items():
        left, right = (params[f"{stage}_unit0"][name]["conv"]["kernel"].shape[-1] for name in ("left_pw", "right_pw2"))
        yield stage, *plan(left + right, left, units, module.layout)


def _arrange(module, folded):
    """Folded parameters with input channels in the order in which `_apply_flat` has them."""
    params = jax.tree.map(np.asarray, folded)

    def reorder(layer, order):
        conv = params[layer[0]][layer[1]]["conv"] if isinstance(layer, tuple) else params[layer]["conv"]
        conv["kernel"] = conv["kernel"][:, :, order]

    def skip_bias(unit, depthwise, following):
        # No ReLU lies between: the bias of a depthwise convolution may as well be added behind the next one.
        conv = params[unit][following]["conv"]
        conv["bias"] = conv["bias"] + params[unit][depthwise]["conv"].pop("bias") @ conv["kernel"][0, 0]

    order = None
    for stage, steps, positions in list(_plans(module, params)):
        first = f"{stage}_unit0"
        skip_bias(first, "left_dw", "left_pw")
        skip_bias(first, "right_dw", "right_pw2")
        if order is not None:
            reorder((first, "right_pw1"), order)
            reorder((first, "left_pw"), order)
            left_dw = params[first]["left_dw"]["conv"]
            left_dw["kernel"] = left_dw["kernel"][..., order]
        for index, step in enumerate(steps, start=1):
            skip_bias(f"{stage}_unit{index}", "right_dw", "right_pw2")
            reorder((f"{stage}_unit{index}", "right_pw1"), step.order)
        order = positions
    if module.conv5:
        reorder("conv5", order)
    return params


def _apply_flat(module, weights, images):
    params, dtype = weights["params"], module.dtype
    x = planar.enter(images.astype(dtype))
    count = x.shape[-1]
    conv = params["conv1"]["conv"]
    x = _stem(x, conv["kernel"].astype(dtype), 1 if module.small_stem else 2)
    x = _activate(x, conv["bias"])
    x = x if module.small_stem else planar.max_pool(x)
    features = {"stem": planar.leave(x)}

    for stage, steps, positions in _plans(module, params):
        first = params[f"{stage}_unit0"]
        left = _product(_strided(x, first["left_dw"], dtype), first["left_pw"], dtype)
        right = _activate(
            planar.conv(x, first["right_pw1"]["conv"]["kernel"].astype(dtype)), first["right_pw1"]["conv"]["bias"]
        )
        right = _product(_strided(right, first["right_dw"], dtype), first["right_pw2"], dtype)
        height, width = ((length + 1) // 2 for length in x.shape[1:3])
        pieces = [left, right]
        for index, step in enumerate(steps, start=1):
            unit = params[f"{stage}_unit{index}"]
            right = _gather(pieces, step.right)
            right = _product(right, unit["right_pw1"], dtype)
            right = _product(_shifted(right, unit["right_dw"], height, width, count), unit["right_pw2"], dtype)
            pieces = [*(pieces[piece][part] for piece, part in step.left), right]
        flat = jnp.concatenate(pieces)
        x = flat.reshape(len(flat), height, width + 1, count)[:, :, :width]
        features[stage] = planar.leave(x[np.argsort(positions)])
    if not module.conv5:
        return None, features

    flat = _product(flat, params["conv5"], dtype)
    x = flat.reshape(len(flat), height, width + 1, count)[:, :, :width]
    features["conv5"] = planar.leave(x)
    stored = jnp.promote_types(dtype, jnp.float32)
    features["pooled"] = x = planar.global_mean(x.astype(stored))
    if not module.num_classes:
        return None, features
    logits = x @ params["fc"]["kernel"].astype(stored)
    return logits + params["fc"]["bias"][None] if "bias" in params["fc"] else logits, features


def _stem(x, kernel, stride):
    if x.shape[-1] >= FEW_IMAGES:
        return planar.conv(x, kernel, stride=stride)
    views = jnp.concatenate([tap for _, _, tap in planar.taps(planar.pad(x), stride, x.shape)])  # (9 I, H', W', N)
    return planar.conv(views, kernel.reshape(1, 1, -1, kernel.shape[-1]))


def _activate(x, bias):
    """Bias and ReLU of (C, ...)."""
    bias = bias.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
    return jax.nn.relu(x + bias)


def _gather(pieces, parts):
    return jnp.concatenate([pieces[piece][part] for piece, part in parts])


def _product(x, layer, dtype):
    """A 1x1 convolution with bias and ReLU, (I, pixels) to (O, pixels)."""
    kernel = layer["conv"]["kernel"][0, 0].astype(dtype)
    return _activate(jax.lax.dot_general(kernel, x, (((0,), (0,)), ((), ()))), layer["conv"]["bias"])


def _strided(x, layer, dtype):
    """A depthwise convolution with stride 2, (C, H, W, N) to (C, H' (W' + 1) N); the last column is of no use."""
    kernel = layer["conv"]["kernel"][:, :, 0].astype(jnp.promote_types(dtype, jnp.float32))
    height, width = ((length + 1) // 2 for length in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 3), (0, 0)))
    shape = (None, 2 * height - 1, 2 * width + 1)
    met = planar.taps(padded, 2, shape)
    total = sum(tap.astype(kernel.dtype) * planar.per_channel(kernel[row, column]) for row, column, tap in met)
    return total.astype(dtype).reshape(len(x), -1)


def _shifted(x, layer, height, width, count):
    """A depthwise convolution with stride 1 of (C, H (W + 1) N), whose last column becomes zero before.

    A row's last column is also the pixel left of the next row.
    """
    kernel = layer["conv"]["kernel"][:, :, 0].astype(jnp.promote_types(x.dtype, jnp.float32))
    inside = np.tile(np.repeat(np.arange(width + 1) < width, count), height)
    margin = (width + 2) * count
    padded = jnp.pad(jnp.where(inside[None], x, 0), ((0, 0), (margin, margin)))
    total = 0
    for row in range(3):
        for column in range(3):
            start = (row * (width + 1) + column) * count
            tap = padded[:, start : start + x.shape[1]]
            total += tap.astype(kernel.dtype) * kernel[row, column][:, None]
    return total.astype(x.dtype)
