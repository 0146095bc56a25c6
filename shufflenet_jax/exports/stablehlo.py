"""A trained network as StableHLO by `jax.export`: one file for CPUs, GPUs and TPUs, which plain JAX runs."""

from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from ..deploy import Deployed, deploy
from ..forward import forward
from .agreement import last

PLATFORMS = ("cpu", "cuda", "tpu")


def save(path, model, *, batch=None, with_preprocessing=False):
    """Writes a Model: float32 images (batch, side, side, C), or uint8 crops with preprocessing, to logits.

    The file holds one set of weights, batch norm folded, and two lowerings of their network: the platform that it runs
    on takes the one that is faster there. A `batch` of None leaves the number of images open.
    """
    preprocess, module = model.info.preprocess, model.module
    weights = deploy(module, model.variables)[1]

    def predict(lowering, weights, images):
        deployed = Deployed(module.clone(lowering=lowering))
        logits, features = forward(deployed, preprocess, weights, images)
        return last(logits, features)

    def network(images):
        lowerings = {"cpu": partial(predict, "cpu"), "default": partial(predict, "reference")}
        return lax.platform_dependent(weights, images, **lowerings)

    (rows,) = jax.export.symbolic_shape("batch") if batch is None else (batch,)
    shape = (rows, preprocess.crop, preprocess.crop, preprocess.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if with_preprocessing else jnp.float32)
    Path(path).write_bytes(jax.export.export(jax.jit(network), platforms=PLATFORMS)(images).serialize())


def load(path):
    """The function in a file, as plain JAX loads it."""
    return jax.jit(jax.export.deserialize(Path(path).read_bytes()).call)
