"""A trained network as StableHLO by `jax.export`: one file for CPUs, GPUs and TPUs, which plain JAX runs."""

from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from ..deploy import Deployed, deploy
from ..forward import forward
from .network import outputs_of

PLATFORMS = ("cpu", "cuda", "tpu")


def save(path, model, *, batch=None, size=None, with_preprocessing=False, features=False):
    """Writes a Model: float32 images (batch, height, width, C), or uint8 crops with preprocessing, to logits.

    The file holds one set of weights, batch norm folded, and two lowerings of their network: the platform that it runs
    on takes the one that is faster there. A `batch` of None leaves the number of images open, a `size` of None is the
    preprocessing's square, and with `features` it returns {stage: its output} instead of logits.
    """
    preprocess, module = model.info.preprocess, model.module
    names = outputs_of(module, features=features)
    weights = deploy(module, model.variables)[1]

    def predict(lowering, weights, images):
        deployed = Deployed(module.clone(lowering=lowering))
        logits, stages = forward(deployed, preprocess, weights, images)
        outputs = {name: {**stages, "logits": logits}[name] for name in names}
        return outputs if features else outputs[names[0]]

    def network(images):
        direct, reference = partial(predict, "cpu"), partial(predict, "reference")  # That of GPUs is that of CPUs here.
        return lax.platform_dependent(weights, images, cpu=direct, cuda=direct, default=reference)

    (rows,) = jax.export.symbolic_shape("batch") if batch is None else (batch,)
    shape = (rows, *(size or preprocess.size), preprocess.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if with_preprocessing else jnp.float32)
    Path(path).write_bytes(jax.export.export(jax.jit(network), platforms=PLATFORMS)(images).serialize())


def load(path):
    """The function in a file, as plain JAX loads it."""
    return jax.jit(jax.export.deserialize(Path(path).read_bytes()).call)
