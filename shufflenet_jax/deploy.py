"""A trained network in the form in which it predicts fastest: batch norm folded into the convolutions, no shuffles.

`plan` follows where each channel goes, and weights are permuted to match.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import lowerings
from .lowerings import reference
from .model import EPSILON, ShuffleNetV2

# For CPUs: no fusions for YNNPACK, which take over nearly all matrix products (docs/laboratory.md).
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
VECTOR = 16  # Numbers that a CPU computes at once; products whose outputs are whole vectors take up to a quarter less.


@dataclass(frozen=True)
class Deployed:
    """The fast form of a ShuffleNetV2; `apply(weights, images)` returns what the module's `apply` does."""

    module: ShuffleNetV2

    @property
    def dtype(self):
        return self.module.dtype

    def apply(self, weights, images):
        """(logits, features) of images (B, H, W, C), as `ShuffleNetV2` has them, but for inference only."""
        module, params, dtype = self.module, weights["params"], self.module.dtype
        lower = lowerings.for_inference(module.lowering)

        def layers(x, unit, *names, stride=1):
            """One after the other, with bias and ReLU but behind depthwise ones; the stride is the 3x3 one's."""
            for name in names:
                conv = unit[name]["conv"]
                kernel = conv["kernel"].astype(dtype)
                groups = x.shape[-1] // kernel.shape[2]
                x = lower.conv(x, kernel, stride=stride if len(kernel) > 1 else 1, groups=groups)
                if "bias" in conv:  # Which has no number for outputs that only fill up a vector.
                    x = jax.nn.relu(x[..., : len(conv["bias"])] + reference.per_channel(conv["bias"].astype(dtype)))
            return x

        right_branch = "right_pw1", "right_dw", "right_pw2"
        x = layers(images.astype(dtype), params, "conv1", stride=1 if module.small_stem else 2)
        features = {"conv1": x} if module.outputs else {}
        x = x if module.small_stem else lower.max_pool(x)
        features["stem"] = x
        for stage, steps, positions in plans(module, params):
            unit = params[f"{stage}_unit0"]
            pieces = [layers(x, unit, "left_dw", "left_pw", stride=2), layers(x, unit, *right_branch, stride=2)]
            for index, step in enumerate(steps, start=1):
                right = jnp.concatenate([pieces[piece][..., channels] for piece, channels in step.right], -1)
                right = layers(right, params[f"{stage}_unit{index}"], *right_branch)
                pieces = [*(pieces[piece][..., channels] for piece, channels in step.left), right]
            x = jnp.concatenate(pieces, -1)
            features[stage] = x[..., np.argsort(positions)]
        if module.outputs is not None:
            return None, {name: features[name] for name in module.outputs}
        if not module.conv5:
            return None, features

        features["conv5"] = x = layers(x, params, "conv5")
        stored = jnp.promote_types(dtype, jnp.float32)
        features["pooled"] = x = reference.global_mean(x.astype(stored))
        if not module.num_classes:
            return None, features
        logits = x @ params["fc"]["kernel"].astype(stored)
        return logits + params["fc"]["bias"][None] if "bias" in params["fc"] else logits, features


def compile_deployed(function, options=CPU_OPTIONS):
    """Compile a function of (weights, images) that runs a deployed network, with XLA's options for it on CPUs.

    It does without the options where XLA does not know them, and inside a program of the caller, which has its own.
    """
    plain, optimized = jax.jit(function), jax.jit(function, compiler_options=options)
    known = jax.default_backend() == "cpu"

    def call(weights, images):
        nonlocal known
        if known and not isinstance(images, jax.core.Tracer):
            try:
                return optimized(weights, images)
            except jax.errors.JaxRuntimeError as error:
                if not any(name in str(error) for name in options):
                    raise
                known = False
        return plain(weights, images)

    return call


def deploy(module, variables):
    """(Deployed, its weights) of a ShuffleNetV2 and its variables {"params", "batch_stats"}, on the host."""
    folded = jax.tree.map_with_path(fill_vectors, arrange(module, fold(variables)))
    stored = jnp.promote_types(module.dtype, jnp.float32)
    return Deployed(module), jax.tree.map(lambda leaf: np.asarray(leaf, stored), {"params": folded})


def fill_vectors(path, leaf):
    """A leaf as it is, but the kernel of a 1x1 convolution with zeros up to the next multiple of VECTOR outputs."""
    if path[-1].key != "kernel" or leaf.shape[:2] != (1, 1):
        return leaf
    return np.pad(leaf, [*[(0, 0)] * 3, (0, -leaf.shape[-1] % VECTOR)])


def fold(variables):
    """Parameters with batch norm in the convolutions: in float64, {layer: {"conv": {"kernel", "bias"}}} and "fc"."""

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
    for stage, units in zip(module.stages, module.table.repeats, strict=False):
        left, right = (len(params[f"{stage}_unit0"][name]["conv"]["bias"]) for name in ("left_pw", "right_pw2"))
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
