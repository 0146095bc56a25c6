"""The channels of images in several arrays: how the lowering for GPUs avoids shuffles."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..shapes import Array, Images
from . import own_gradients

Places = tuple[int, ...]
Piece = tuple[Array, Places]


@dataclass(frozen=True)
class Pieces:
    """An array (B, H, W, C) whose channels lie in several arrays and in any order.

    Attributes:
      arrays: (B, H, W, c) each.
      places: for each array the places of its channels in the joined one.
    """

    arrays: tuple[Array, ...]
    places: tuple[Places, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (B, H, W, C) of all channels together."""
        return (*self.arrays[0].shape[:-1], sum(map(len, self.places)))

    @property
    def size(self) -> int:
        """How many numbers the arrays hold together."""
        return sum(array.size for array in self.arrays)

    @property
    def dtype(self) -> np.dtype:
        """Type of all arrays."""
        return self.arrays[0].dtype

    def astype(self, dtype: DTypeLike) -> "Pieces":
        """Convert all arrays."""
        return Pieces(tuple(array.astype(dtype) for array in self.arrays), self.places)

    @property
    def order(self) -> Places:
        """For each channel of `joined` its place in the shuffled array."""
        return tuple(place for places in self.places for place in places)

    def joined(self) -> Images:
        """Join the arrays, (B, H, W, C), with their channels in the order above."""
        return self.arrays[0] if len(self.arrays) == 1 else jnp.concatenate(self.arrays, -1)


jax.tree_util.register_dataclass(Pieces, data_fields=["arrays"], meta_fields=["places"])


def as_pieces(x: Images | Pieces) -> Pieces:
    """Convert an array (B, H, W, C) to Pieces; return Pieces as they are."""
    return x if isinstance(x, Pieces) else Pieces((x,), (tuple(range(x.shape[-1])),))


def as_array(x: Images | Pieces) -> Images:
    """Convert Pieces to the array (B, H, W, C) that they stand for; return an array as it is."""
    if not isinstance(x, Pieces):
        return x
    return x.joined() if is_natural(x.order) else x.joined()[..., np.argsort(x.order)]


def is_natural(order: Places) -> bool:
    """Return whether channels lie in their own order."""
    return order == tuple(range(len(order)))


def split(x: Images | Pieces, *, even_odd: bool) -> tuple[Pieces, Pieces]:
    """Return the inputs of a unit's left and right branch, as `shuffle.split` does."""
    pieces = as_pieces(x)
    half = len(pieces.order) // 2
    left: list[Piece] = []
    right: list[Piece] = []
    for array, places in zip(pieces.arrays, pieces.places, strict=True):
        goes_right = np.array(places) % 2 == 1 if even_odd else np.array(places) >= half
        moved = np.array(places) // 2 if even_odd else np.array(places) % half
        for side, part, chosen in zip((left, right), _parts(array, goes_right), (~goes_right, goes_right), strict=True):
            if chosen.any():
                side.append((part, tuple(moved[chosen].tolist())))
    return _pieces(left), _pieces(right)


def join(left: Images | Pieces, right: Images | Pieces, *, shuffled: bool) -> Pieces:
    """Join the outputs of a unit's branches, as `shuffle.join` does; only the places of the channels change."""
    sides = as_pieces(left), as_pieces(right)
    first = 1 if shuffled else len(sides[0].order)
    joined: list[Piece] = []
    for start, side in zip((0, first), sides, strict=True):
        for array, places in zip(side.arrays, side.places, strict=True):
            joined.append((array, tuple(start + place * (1 + shuffled) for place in places)))
    return _pieces(joined)


def _pieces(pairs: list[Piece]) -> Pieces:
    arrays, places = zip(*pairs, strict=True)
    return Pieces(arrays, places)


def _parts(array: Images, goes_right: np.ndarray) -> list[Array]:
    """Return the channels of an array that stay and those that go right; both are evenly spaced."""
    first = int(goes_right.argmax()) if goes_right.any() else len(goes_right)
    if goes_right[first:].all():
        # Unlike that of slices, its gradient is one concatenation.
        return jnp.split(array, [first], -1)
    return [array[..., _as_slice(np.flatnonzero(chosen))] for chosen in (~goes_right, goes_right)]


def _as_slice(indices: np.ndarray) -> slice:
    step = int(indices[1] - indices[0]) if len(indices) > 1 else 1
    return slice(int(indices[0]), int(indices[-1]) + 1, step)


def take(array: Array, order: Places, axis: int = -1) -> Array:
    """Take all entries along an axis in another order.

    The gradient takes them back, where XLA's own would scatter.
    """
    if is_natural(order):
        return array
    (array,) = own_gradients.prepare((array,))
    return _take(array, order, axis)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _take(array: Array, order: Places, axis: int) -> Array:
    return jnp.take(array, np.array(order), axis, unique_indices=True, mode="clip")


def _take_forward(array: Array, order: Places, axis: int) -> tuple[Array, None]:
    return _take(array, order, axis), None


def _take_backward(order: Places, axis: int, _: None, gradient: Array) -> tuple[Array]:
    return (_take(gradient, tuple(np.argsort(order).tolist()), axis),)


_take.defvjp(_take_forward, _take_backward)
