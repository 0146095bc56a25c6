"""What a ShuffleNetV2 costs, stage by stage: parameters, multiply-adds, activations, receptive field; and its time.

All but the time is read from a trace of the network itself in the reference lowering, without computing anything.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from . import progress
from .architecture import FEATURES
from .deploy import compile_deployed, deploy
from .forward import forward
from .model import ShuffleNetV2, variable_shapes

SECONDS, FEWEST_CALLS = 1.0, 5  # That each network is timed for, at least.


class Stage(NamedTuple):
    """What a part of the network costs for one image."""

    name: str  # "stem" is conv1 and the max pool, "fc" the global mean and the classifier.
    parameters: int  # Without batch norm's running statistics.
    multiply_adds: int  # Of convolutions and the classifier.
    multiply_adds_with_norms: int  # Two more for each output of a batch norm, as fvcore and MMPretrain count.
    activations: int  # Numbers that convolutions and the classifier put out, as timm, fvcore and MMPretrain count.
    receptive_field: int | None  # Side, in pixels, of the square that one output depends on; None: the whole image.
    stride: int | None  # From one output to the next, in pixels of the image; None where there is but one.
    output: tuple[int, ...]  # (H, W, C); (num_classes,) of the classifier.


class View(NamedTuple):
    """How an array sees the images: each of its pixels a square of `field` pixels a side, `stride` pixels apart."""

    field: float
    stride: float


WHOLE = View(math.inf, math.inf)  # What a mean over all pixels sees.


class Operation(NamedTuple):
    """A convolution or matrix product."""

    kernel: str  # The path of its weights.
    multiply_adds: int
    outputs: int


def count(module, height, width):
    """The costs of a ShuffleNetV2 for one image of height x width pixels.

    A multiply-add is one multiplication and one addition; products with the padding count like all others, biases and
    everything else do not count. The receptive field follows the longest branch, reaches beyond the borders of small
    images and includes the max pool.

    Returns:
      A list of Stage: stem, stage2, stage3, stage4, and conv5 and fc where the module has them.
    """
    module = module.clone(lowering="reference", remat=False)
    variables = variable_shapes(module)
    images = jax.ShapeDtypeStruct((1, height, width, module.in_chans), jnp.float32)
    jaxpr, shapes = jax.make_jaxpr(module.apply, return_shape=True)(variables, images)
    sizes = {_join(path): leaf.size for path, leaf in jax.tree.leaves_with_path(variables["params"])}

    operations = []
    paths = [_join(path[1:]) for path, _ in jax.tree.leaves_with_path(variables)]
    views = _follow(jaxpr.jaxpr, [*paths, View(1, 1)], operations)
    logits, features = shapes
    logits_view, feature_views = jax.tree.unflatten(jax.tree.structure(shapes), views)
    ends = {name: (features[name], feature_views[name]) for name in FEATURES if name in features and name != "pooled"}
    if logits is not None:
        ends["fc"] = logits, logits_view

    stages = []
    for name, (end, view) in ends.items():
        here = [operation for operation in operations if _stage_of(operation.kernel) == name]
        multiply_adds = sum(operation.multiply_adds for operation in here)
        normalized = sum(o.outputs for o in here if o.kernel.endswith("conv/kernel"))  # Not the classifier's.
        stages.append(
            Stage(
                name=name,
                parameters=sum(size for path, size in sizes.items() if _stage_of(path) == name),
                multiply_adds=multiply_adds,
                multiply_adds_with_norms=multiply_adds + 2 * normalized,
                activations=sum(operation.outputs for operation in here),
                receptive_field=None if view == WHOLE else view.field,
                stride=None if view == WHOLE else view.stride,
                output=end.shape[1:],
            )
        )
    return stages


def total(stages):
    """The sums of a list of Stage, by name."""
    names = ("parameters", "multiply_adds", "multiply_adds_with_norms", "activations")
    return {name: sum(getattr(stage, name) for stage in stages) for name in names}


def measure_milliseconds(modules: Sequence[ShuffleNetV2], height: int, width: int) -> list[float]:
    """Time networks on this machine in the form in which they predict fastest, one image a call.

    Their calls alternate, so other work on the machine slows all of them alike. Their weights are random.

    Args:
      modules: the networks.
      height: of the image, in pixels.
      width: of the image, in pixels.

    Returns:
      The median milliseconds of a call of each.
    """
    calls: list[Callable[[], Any]] = []
    with progress.bar(total=len(modules), unit="network", description="compiling") as bar:
        for module in modules:
            calls.append(_deployed_call(module, height, width))
            bar.update()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS * len(calls)
    while len(times[-1]) < FEWEST_CALLS or time.perf_counter() < end:
        for call, measured in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            measured.append(time.perf_counter() - start)
    return [1e3 * statistics.median(measured) for measured in times]


def _deployed_call(module: ShuffleNetV2, height: int, width: int) -> Callable[[], Any]:
    """Return a compiled network that predicts one image."""
    rng = np.random.default_rng(0)
    images = jax.device_put(rng.normal(size=(1, height, width, module.in_chans)).astype(np.float32))

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        if path[-1].key == "kernel":  # Activations neither vanish nor overflow, which would change the time.
            return (rng.normal(size=leaf.shape) * (2 / math.prod(leaf.shape[:-1])) ** 0.5).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    deployed, weights = deploy(module, jax.tree.map_with_path(draw, variable_shapes(module)))
    weights = jax.device_put(weights)
    predict = compile_deployed(partial(forward, deployed, None))
    jax.block_until_ready(predict(weights, images))
    return partial(predict, weights, images)


def _follow(jaxpr, values, operations):
    """What the outputs of a jaxpr are, if `values` are its inputs; adds what it does to `operations`.

    A value is the path of a parameter, the View of what depends on the images, or None for constants.
    """
    known = dict(zip(jaxpr.invars, values, strict=True))

    def value_of(atom):
        return None if isinstance(atom, Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        inputs = [value_of(atom) for atom in equation.invars]
        called = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if called:
            outputs = _follow(called.jaxpr, inputs, operations)
        else:
            outputs = [_result(equation, inputs, operations)] * len(equation.outvars)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _result(equation, inputs, operations):
    """What one equation makes of its inputs, in the words of `_follow`."""
    views = [value for value in inputs if isinstance(value, View)]
    if not views:  # Of parameters and constants, like a kernel that only changes its type.
        return next((value for value in inputs if value), None)
    view, name = max(views), equation.primitive.name
    if name in ("conv_general_dilated", "dot_general"):
        kernel, outputs = equation.invars[1].aval, equation.outvars[0].aval.size
        # (size, size, inputs of a group, outputs) or (inputs, outputs): each output costs all but the last axis.
        operations.append(Operation(inputs[1], outputs * kernel.size // kernel.shape[-1], outputs))
    if name == "conv_general_dilated":
        return _through(view, kernel.shape[0], equation.params["window_strides"][0])
    if name == "reduce_window_max":
        return _through(view, equation.params["window_dimensions"][1], equation.params["window_strides"][1])
    return WHOLE if name == "reduce_sum" else view


def _through(view, window, stride):
    return View(view.field + (window - 1) * view.stride, view.stride * stride)


def _join(path):
    return "/".join(key.key for key in path)


def _stage_of(path):
    """stage3 of "stage3_unit0/right_dw/conv/kernel"."""
    layer = path.partition("/")[0].partition("_")[0]
    return "stem" if layer == "conv1" else layer
