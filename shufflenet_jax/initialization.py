"""Initial weights: their distributions, and one small program that draws all of them.

Deviations follow MMPretrain and the authors' code, or PyTorch's own layers.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import LazyRng
from jax.extend.random import threefry2x32_p
from jax.typing import DTypeLike
from jaxtyping import Float32, UInt32

from .config import Initialization

Path = tuple[str, ...]
ABOVE = np.nextafter(np.float32(-1), np.float32(0))  # The least uniform number that gives a finite normal one.


class Draw(NamedTuple):
    """The initial distribution of a weight, as an initializer for `nn.Module.param`.

    Attributes:
      normal: whether it is the normal distribution, or else the uniform one from -1 to 1.
      scale: factor on the random numbers.
    """

    normal: bool
    scale: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Draw the weight."""
        numbers = jax.random.normal(key, shape, dtype) if self.normal else jax.random.uniform(key, shape, dtype, -1)
        return numbers * jnp.asarray(self.scale, dtype)


def draw_of(path: Path, kernel: tuple[int, ...], initial: Initialization) -> Draw:
    """Return the initial distribution of a weight of a convolution or of the classifier.

    Args:
      path: of the weight, which ends like `conv1/conv/kernel` or `fc/bias`.
      kernel: shape of the layer's kernel, (H, W, I / groups, O) or (I, O).
      initial: whose initial weights.
    """
    if initial == "pytorch":
        return Draw(normal=False, scale=1 / math.sqrt(math.prod(kernel[:-1])))
    if path[-2:-1] == ("fc",) or path[-3:-2] == ("conv1",):
        return Draw(normal=True, scale=0.01)
    return Draw(normal=True, scale=1 / kernel[-2])


def can_draw_together(dtype: DTypeLike) -> bool:
    """Return whether `draw_together` gives Flax's numbers: with JAX's usual generator, in float32."""
    usual = jax.config.jax_default_prng_impl == "threefry2x32" and jax.config.jax_threefry_partitionable
    return bool(usual and dtype == jnp.float32)


def draw_together(key: jax.Array, draws: Mapping[Path, tuple[Draw, tuple[int, ...]]]) -> dict[Path, np.ndarray]:
    """Draw the numbers that Flax would draw, without compiling a program for each shape.

    With JAX 0.10 they are Flax's to the bit; the XLA of JAX 0.12 rounds the last bit of some numbers otherwise.

    Args:
      key: the one for `module.init`.
      draws: {path of a parameter: (distribution, shape)}, all normal or all uniform.

    Returns:
      {path: its float32 numbers}.
    """
    if not draws:
        return {}
    (normal,) = {draw.normal for draw, _ in draws.values()}
    sizes = [math.prod(shape) for _, shape in draws.values()]
    # Flax derives the key of a parameter from the names on its path and its number within the layer.
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
def _draw(
    keys: UInt32[jax.Array, "numbers 2"], places: UInt32[jax.Array, " numbers"], normal: bool
) -> Float32[jax.Array, " numbers"]:
    """Draw a number for each key and place in its array as `jax.random` does.

    Args:
      keys: (N, 2), the key of each number's array.
      places: (N,), the number's place in that array.
      normal: whether to draw normal numbers, or else uniform ones from -1 to 1.

    Returns:
      (N,); normal numbers are divided by the root of 2.
    """
    high, low = threefry2x32_p.bind(keys[:, 0], keys[:, 1], jnp.zeros_like(places), places)
    bits = (high ^ low) >> 9 | np.uint32(0x3F800000)  # A float32 from 1 to 2.
    least = ABOVE if normal else np.float32(-1)
    even = (jax.lax.bitcast_convert_type(bits, jnp.float32) - 1) * (1 - least) + least
    even = jnp.maximum(least, even)
    return jax.lax.erf_inv(even) if normal else even
