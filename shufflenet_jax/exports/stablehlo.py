"""A trained network as StableHLO by `jax.export`: one file for CPUs, GPUs and TPUs, which plain JAX runs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from ..deploy import Deployed, deploy
from ..forward import forward
from ..inference import Model
from ..shapes import Array, Features, Variables
from .network import outputs_of

PLATFORMS = ("cpu", "cuda", "tpu")


def save(
    path: str | Path,
    model: Model,
    *,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    with_preprocessing: bool = False,
    features: bool = False,
) -> None:
    """Write a network as a function from images to logits.

    The file holds one set of weights, with folded batch norm, and two lowerings of their network; each platform runs
    the faster one.

    Args:
      path: of the file.
      model: the network.
      batch: images per call; None means any number.
      size: (height, width) of the images; None means those of the preprocessing.
      with_preprocessing: take uint8 crops (batch, height, width, C) instead of normalized float32.
      features: return {stage: its output} instead of logits.
    """
    preprocess, module = model.info.preprocess, model.module
    names = outputs_of(module, features=features)
    weights = deploy(module, model.variables)[1]

    def predict(lowering: str, weights: Variables, images: Array) -> Array | Features:
        deployed = Deployed(module.clone(lowering=lowering))
        logits, stages = forward(deployed, preprocess, weights, images)
        outputs: dict[str, Any] = {name: {**stages, "logits": logits}[name] for name in names}
        return outputs if features else outputs[names[0]]

    def network(images: Array) -> Array | Features:
        direct, reference = partial(predict, "cpu"), partial(predict, "reference")  # GPUs use the one of CPUs.
        return lax.platform_dependent(weights, images, cpu=direct, cuda=direct, default=reference)

    (rows,) = jax.export.symbolic_shape("batch") if batch is None else (batch,)
    shape = (rows, *(size or preprocess.size), preprocess.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if with_preprocessing else jnp.float32)
    Path(path).write_bytes(jax.export.export(jax.jit(network), platforms=PLATFORMS)(images).serialize())


def load(path: str | Path) -> Callable[[Array], Array | Features]:
    """Load the function in a file with plain JAX.

    Args:
      path: of the file.
    """
    return jax.jit(jax.export.deserialize(Path(path).read_bytes()).call)
