"""The costs of a ShuffleNetV2 per stage: parameters, multiply-adds, activations, receptive field; and its time.

All except the time come from a trace of the network itself in the reference lowering, which computes nothing.
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
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from . import progress
from .architecture import FEATURES
from .deploy import compile_deployed, deploy
from .forward import forward
from .model import ShuffleNetV2, variable_shapes

SECONDS, FEWEST_CALLS = 1.0, 5  # Shortest time, and fewest calls, over which each network is timed.


class Stage(NamedTuple):
    """The costs of a part of the network for one image.

    Attributes:
      name: "stem" is conv1 and the max pool, "fc" the global mean and the classifier.
      parameters: without batch norm's running statistics.
      multiply_adds: of convolutions and the classifier.
      multiply_adds_with_norms: the same plus two for each output of a batch norm, as fvcore and MMPretrain count.
      activations: number of outputs of convolutions and the classifier, as timm, fvcore and MMPretrain count.
      receptive_field: side, in pixels, of the square that one output depends on; None means the whole image.
      stride: from one output to the next, in pixels of the image; None if there is only one.
      output: (H, W, C), or (num_classes,) of the classifier.
    """

    name: str
    parameters: int
    multiply_adds: int
    multiply_adds_with_norms: int
    activations: int
    receptive_field: int | None
    stride: int | None
    output: tuple[int, ...]


class View(NamedTuple):
    """The part of the images on which the pixels of an array depend: squares at equal distances.

    Attributes:
      field: side of a square, in pixels.
      stride: distance between two squares, in pixels.
    """

    field: float
    stride: float


WHOLE = View(math.inf, math.inf)  # Of a mean over all pixels.
Value = str | View | None  # The path of a parameter, the View of what depends on the images, or None for constants.


class Operation(NamedTuple):
    """A convolution or matrix product.

    Attributes:
      kernel: path of its weights.
      multiply_adds: for one image.
      outputs: number of outputs for one image.
    """

    kernel: str
    multiply_adds: int
    outputs: int


def count(module: ShuffleNetV2, height: int, width: int) -> list[Stage]:
    """Count the costs of a ShuffleNetV2 for one image.

    A multiply-add is one multiplication and one addition. Products with the padding count too; biases and everything
    else do not. The receptive field follows the longest branch, reaches beyond the borders of small images and includes
    the max pool.

    Args:
      module: the network.
      height: of the image, in pixels.
      width: of the image, in pixels.

    Returns:
      The costs of stem, stage2, stage3, stage4 and, if the module has them, conv5 and fc.
    """
    module = module.clone(lowering="reference", remat=False)
    variables = variable_shapes(module)
    images = jax.ShapeDtypeStruct((1, height, width, module.in_chans), jnp.float32)
    jaxpr, shapes = jax.make_jaxpr(module.apply, return_shape=True)(variables, images)
    sizes = {_join(path): leaf.size for path, leaf in jax.tree.leaves_with_path(variables["params"])}

    operations: list[Operation] = []
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


def total(stages: Sequence[Stage]) -> dict[str, int]:
    """Return the sums of the costs, by name.

    Args:
      stages: from `count`.
    """
    names = ("parameters", "multiply_adds", "multiply_adds_with_norms", "activations")
    return {name: sum(getattr(stage, name) for stage in stages) for name in names}


def measure_milliseconds(modules: Sequence[ShuffleNetV2], height: int, width: int) -> list[float]:
    """Time networks on this machine in their fastest form, with one image per call.

    Their calls alternate, so other work on the machine slows all of them equally. Their weights are random.

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

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "kernel":  # Activations neither vanish nor overflow, which would change the time.
            return (rng.normal(size=leaf.shape) * (2 / math.prod(leaf.shape[:-1])) ** 0.5).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    deployed, weights = deploy(module, jax.tree.map_with_path(draw, variable_shapes(module)))
    weights = jax.device_put(weights)
    predict = compile_deployed(partial(forward, deployed, None))
    jax.block_until_ready(predict(weights, images))
    return partial(predict, weights, images)


def _follow(jaxpr: Jaxpr, inputs_of_all: Sequence[Value], operations: list[Operation]) -> list[Value]:
    """Return the values of a jaxpr's outputs for those of its inputs; add its operations to the list."""
    values = dict(zip(jaxpr.invars, inputs_of_all, strict=True))

    def value_of(atom: Var | Literal) -> Value:
        return None if isinstance(atom, Literal) else values.get(atom)

    for equation in jaxpr.eqns:
        inputs = [value_of(atom) for atom in equation.invars]
        called = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if called:
            outputs = _follow(called.jaxpr, inputs, operations)
        else:
            outputs = [_result(equation, inputs, operations)] * len(equation.outvars)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _result(equation: JaxprEqn, inputs: list[Value], operations: list[Operation]) -> Value:
    """Return the value of one equation's outputs, and add its operation to the list."""
    views = [value for value in inputs if isinstance(value, View)]
    if not views:  # It depends on parameters and constants only, like a kernel that changes its type.
        return next((value for value in inputs if value), None)
    view, name = max(views), equation.primitive.name
    if name in ("conv_general_dilated", "dot_general"):
        kernel, outputs = equation.invars[1].aval, equation.outvars[0].aval.size
        # (size, size, inputs of a group, outputs) or (inputs, outputs): each output costs all axes except the last.
        operations.append(Operation(str(inputs[1]), outputs * kernel.size // kernel.shape[-1], outputs))
    if name == "conv_general_dilated":
        return _through(view, kernel.shape[0], equation.params["window_strides"][0])
    if name == "reduce_window_max":
        return _through(view, equation.params["window_dimensions"][1], equation.params["window_strides"][1])
    return WHOLE if name == "reduce_sum" else view


def _through(view: View, window: int, stride: int) -> View:
    return View(view.field + (window - 1) * view.stride, view.stride * stride)


def _join(path: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in path)


def _stage_of(path: str) -> str:
    """Return the stage of a path: stage3 of "stage3_unit0/right_dw/conv/kernel"."""
    layer = path.partition("/")[0].partition("_")[0]
    return "stem" if layer == "conv1" else layer
