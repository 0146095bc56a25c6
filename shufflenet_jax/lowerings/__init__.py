"""The network's operations in several forms, and the choice between them.

A lowering is a module with the functions of the `Lowering` protocol. It may keep its arrays in any axis order. All
lowerings pad as PyTorch does and agree up to rounding: the tests compare each with `reference`.
"""

from typing import Protocol, cast, runtime_checkable

import jax
from jaxtyping import Float

from ..batch_groups import BatchGroups
from ..config import RENAMED, LoweringName
from ..shapes import Array, Images, Kernel, Vector
from . import cpu, direct, gpu, reference
from .pieces import Pieces

Maps = Array | Pieces  # A layer's input or output, in the lowering's own axis order.


@runtime_checkable
class Convolutions(Protocol):
    """The operations of a trained network, on arrays (B, H, W, C)."""

    def conv(self, x: Maps, kernel: Kernel, *, stride: int = 1, groups: int = 1) -> Maps:
        """Convolve without bias, padded by (size - 1) / 2 on every side; groups is 1 or the number of channels."""

    def max_pool(self, x: Maps) -> Maps:
        """Pool 3x3 windows with stride 2, padded by 1 with minus infinity."""


@runtime_checkable
class Lowering(Convolutions, Protocol):
    """The operations of training, on arrays in the lowering's own axis order, or on Pieces in `gpu`.

    Attributes:
      CHANNEL_AXIS: where the channels lie in that axis order.
    """

    CHANNEL_AXIS: int

    def from_nhwc(self, images: Images) -> Maps:
        """Bring images (B, H, W, C) into the lowering's axis order."""

    def to_nhwc(self, x: Maps) -> Images:
        """Bring an array back to (B, H, W, C)."""

    def split(self, x: Maps, *, even_odd: bool) -> tuple[Maps, Maps]:
        """Split the channels for a unit's left and right branch: halves, or the even and the odd channels."""

    def join(self, left: Maps, right: Maps, *, shuffled: bool) -> Maps:
        """Join the outputs of the branches; `shuffled` interleaves their channels."""

    def batch_norm(
        self, x: Maps, scale: Vector, bias: Vector, batch_groups: BatchGroups, *, epsilon: float, relu: bool
    ) -> tuple[Maps, Vector, Vector]:
        """Normalize by the statistics of each example's group; also return their mean and unbiased variance, (C,)."""

    def normalize(
        self, x: Maps, mean: Vector, var: Vector, scale: Vector, bias: Vector, *, epsilon: float, relu: bool
    ) -> Maps:
        """Normalize by given statistics, (C,) each."""

    def global_mean(self, x: Maps) -> Float[Array, "batch channels"]:
        """Return the mean over all pixels, (B, C)."""


MODULES = {"cpu": cpu, "gpu": gpu, "reference": reference}


def resolve(name: str) -> Lowering:
    """Return the lowering of a name; "auto" picks the fastest one for this backend.

    Args:
      name: "auto" or a key of MODULES.

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
    # docs/faster.md reports the speed of each; on TPUs nothing has been measured.
    fastest: dict[str, LoweringName] = {"cpu": "cpu", "gpu": "gpu"}
    return fastest.get(platform, "reference")


def for_inference(name: str) -> Convolutions:
    """Return the convolutions of a deployed network (see deploy.py) for a lowering."""
    return cast(Convolutions, reference if resolve(name) is reference else direct)
