"""Initial weights: how each begins, and all of them drawn by one small program.

Deviations follow MMPretrain and the authors' code, or PyTorch's own layers.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import LazyRng
from jax.extend.random import threefry2x32_p

from .config import Initialization

Path = tuple[str, ...]
ABOVE = np.nextafter(np.float32(-1), np.float32(0))  # The least number from which a finite normal one is made.


class Draw(NamedTuple):
    """How a weight begins: random numbers times a scale. It is an initializer for `nn.Module.param`."""

    normal: bool  # Of the standard normal distribution; else evenly from -1 to 1.
    scale: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        numbers = jax.random.normal(key, shape, dtype) if self.normal else jax.random.uniform(key, shape, dtype, -1)
        return numbers * jnp.asarray(self.scale, dtype)


def draw_of(path: Path, kernel: tuple[int, ...], initial: Initialization) -> Draw:
    """Return how a weight of a convolution or of the classifier begins.

    Args:
      path: of the weight, ending like `conv1/conv/kernel` or `fc/bias`.
      kernel: shape of the layer's kernel, (H, W, I / groups, O) or (I, O).
      initial: whose initial weights.
    """
    if initial == "pytorch":
        return Draw(normal=False, scale=1 / math.sqrt(math.prod(kernel[:-1])))
    if path[-2:-1] == ("fc",) or path[-3:-2] == ("conv1",):
        return Draw(normal=True, scale=0.01)
    return Draw(normal=True, scale=1 / kernel[-2])


def can_draw_together(dtype: Any) -> bool:
    """Whether `draw_together` gives the numbers that Flax would draw: with JAX's usual generator, in float32."""
    usual = jax.config.jax_default_prng_impl == "threefry2x32" and jax.config.jax_threefry_partitionable
    return bool(usual and dtype == jnp.float32)


def draw_together(key: jax.Array, draws: Mapping[Path, tuple[Draw, tuple[int, ...]]]) -> dict[Path, np.ndarray]:
    """Draw the numbers that Flax would draw, without compiling a program for each shape.

    Args:
      key: that `module.init` would take.
      draws: {path of a parameter: (how it begins, its shape)}, all of one distribution.
    Returns:
      {path: its float32 numbers}.
    """
    if not draws:
        return {}
    (normal,) = {draw.normal for draw, _ in draws.values()}
    sizes = [math.prod(shape) for _, shape in draws.values()]
    # Flax's key for each parameter: by the names on its path, and which parameter of its layer it is.
    suffixes = [(*path[:-1], 2 if path[-1] == "bias" else 1) for path in draws]
    keys = np.stack([jax.random.key_data(LazyRng.create(key, *suffix).as_jax_rng()) for suffix in suffixes])
    places = np.concatenate([np.arange(size, dtype=np.uint32) for size in sizes])
    numbers = np.asarray(_draw(np.repeat(keys, sizes, axis=0), places, normal))
    # XLA multiplies a draw's constants first; so do we, to the same bits.
    constant = np.float32(math.sqrt(2) if normal else 1)
    return {
        path: part.reshape(shape) * (constant * np.float32(draw.scale))
        for (path, (draw, shape)), part in zip(draws.items(), np.split(numbers, np.cumsum(sizes)[:-1]), strict=True)
    }


@partial(jax.jit, static_argnums=2)
def _draw(keys: jax.Array, places: jax.Array, normal: bool) -> jax.Array:
    """Draw a number for each key and place in its array as `jax.random` does: even ones from -1 to 1, or normal ones.

    Args:
      keys: (N, 2) uint32.
      places: (N,) uint32.
    Returns:
      (N,) float32; normal ones are divided by the root of 2.
    """
    high, low = threefry2x32_p.bind(keys[:, 0], keys[:, 1], jnp.zeros_like(places), places)
    bits = (high ^ low) >> 9 | np.uint32(0x3F800000)  # A float32 from 1 to 2.
    least = ABOVE if normal else np.float32(-1)
    even = (jax.lax.bitcast_convert_type(bits, jnp.float32) - 1) * (1 - least) + least
    even = jnp.maximum(least, even)
    return jax.lax.erf_inv(even) if normal else even
