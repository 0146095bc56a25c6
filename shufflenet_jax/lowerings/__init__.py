"""The network's operations in several forms, and the choice between them.

A lowering is a module with the functions of the `Lowering` protocol. It may keep its arrays in any axis order. All
lowerings pad as PyTorch does and agree up to rounding: the tests compare each with `reference`.
"""

from typing import Protocol, cast

import jax

from ..batch_groups import BatchGroups
from ..config import RENAMED, LoweringName
from . import cpu, direct, gpu, reference


class Convolutions(Protocol):
    """What a trained network needs, on arrays (B, H, W, C)."""

    def conv(self, x: jax.Array, kernel: jax.Array, *, stride: int = 1, groups: int = 1) -> jax.Array:
        """Convolve without bias, padded by (size - 1) / 2 on every side; groups is 1 or the number of channels."""

    def max_pool(self, x: jax.Array) -> jax.Array:
        """Pool 3x3 windows with stride 2, padded by 1 with minus infinity."""


class Lowering(Convolutions, Protocol):
    """What training needs, on arrays in the lowering's own axis order, or on Pieces in `gpu`."""

    CHANNEL_AXIS: int

    def from_nhwc(self, images: jax.Array) -> jax.Array:
        """Bring images (B, H, W, C) into the lowering's axis order."""

    def to_nhwc(self, x: jax.Array) -> jax.Array:
        """Bring an array back to (B, H, W, C)."""

    def split(self, x: jax.Array, *, even_odd: bool) -> tuple[jax.Array, jax.Array]:
        """Split the channels into what a unit's left and right branch take: halves, or the even and the odd ones."""

    def join(self, left: jax.Array, right: jax.Array, *, shuffled: bool) -> jax.Array:
        """Join what the branches return; `shuffled` interleaves their channels."""

    def batch_norm(
        self,
        x: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        batch_groups: BatchGroups,
        *,
        epsilon: float,
        relu: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalize by the statistics of each example's group; also return their mean and unbiased variance, (C,)."""

    def normalize(
        self,
        x: jax.Array,
        mean: jax.Array,
        var: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        *,
        epsilon: float,
        relu: bool,
    ) -> jax.Array:
        """Normalize by given statistics, (C,) each."""

    def global_mean(self, x: jax.Array) -> jax.Array:
        """Return the mean over all pixels, (B, C)."""


MODULES = {"cpu": cpu, "gpu": gpu, "reference": reference}


def resolve(name: str) -> Lowering:
    """Return the lowering of a name; "auto" picks the fastest one for this backend.

    Raises:
      ValueError: no lowering has this name.
    """
    name = RENAMED.get(name, name)
    if name not in ("auto", *MODULES):
        raise ValueError(f"lowering is {name!r}, not one of auto, {', '.join(MODULES)}")
    if name == "auto":
        name = fastest_on(jax.default_backend())
    return cast(Lowering, MODULES[name])


def fastest_on(platform: str) -> LoweringName:
    """Return the name of the fastest lowering on a platform, as JAX names it."""
    # docs/faster.md has what each gains there; for TPUs nothing has been measured.
    fastest: dict[str, LoweringName] = {"cpu": "cpu", "gpu": "gpu"}
    return fastest.get(platform, "reference")


def for_inference(name: str) -> Convolutions:
    """Return the convolutions of a deployed network (see deploy.py) for a lowering."""
    return cast(Convolutions, reference if resolve(name) is reference else direct)
