"""The channels of an image in several arrays: how the lowering for GPUs never shuffles."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import own_gradients

Places = tuple[int, ...]
Piece = tuple[jax.Array, Places]


@dataclass(frozen=True)
class Pieces:
    """An array (B, H, W, C) whose channels lie in several arrays and in any order.

    Attributes:
      arrays: (B, H, W, c) each.
      places: for each of the arrays, which channels of the whole it has, in its order.
    """

    arrays: tuple[jax.Array, ...]
    places: tuple[Places, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, W, C) of the whole."""
        return (*self.arrays[0].shape[:-1], sum(map(len, self.places)))

    @property
    def size(self) -> int:
        """Numbers of the whole."""
        return sum(array.size for array in self.arrays)

    @property
    def dtype(self) -> Any:
        """The type of all arrays."""
        return self.arrays[0].dtype

    def astype(self, dtype: Any) -> "Pieces":
        """Convert all arrays."""
        return Pieces(tuple(array.astype(dtype) for array in self.arrays), self.places)

    @property
    def order(self) -> Places:
        """Which channel of the whole each one of `joined` is."""
        return tuple(place for places in self.places for place in places)

    def joined(self) -> jax.Array:
        """Join the arrays, (B, H, W, C): the channels of the whole in the order above."""
        return self.arrays[0] if len(self.arrays) == 1 else jnp.concatenate(self.arrays, -1)


jax.tree_util.register_dataclass(Pieces, data_fields=["arrays"], meta_fields=["places"])


def as_pieces(x: jax.Array | Pieces) -> Pieces:
    """Return an array (B, H, W, C) as Pieces; Pieces stay as they are."""
    return x if isinstance(x, Pieces) else Pieces((x,), (tuple(range(x.shape[-1])),))


def as_array(x: jax.Array | Pieces) -> jax.Array:
    """Return the array (B, H, W, C) that Pieces stand for."""
    if not isinstance(x, Pieces):
        return x
    return x.joined() if is_natural(x.order) else x.joined()[..., np.argsort(x.order)]


def is_natural(order: Places) -> bool:
    """Whether channels lie in their own order."""
    return order == tuple(range(len(order)))


def split(x: jax.Array | Pieces, *, even_odd: bool) -> tuple[Pieces, Pieces]:
    """Return what the left and the right branch of a unit take, as `shuffle.split` has it."""
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


def join(left: jax.Array | Pieces, right: jax.Array | Pieces, *, shuffled: bool) -> Pieces:
    """Join what the branches of a unit return, as `shuffle.join` has it; only the places of the channels change."""
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


def _parts(array: jax.Array, goes_right: np.ndarray) -> list[jax.Array]:
    """The channels of an array that stay and those that go right; both are evenly spaced."""
    first = int(goes_right.argmax()) if goes_right.any() else len(goes_right)
    if goes_right[first:].all():
        # Unlike that of slices, its gradient is one concatenation.
        return jnp.split(array, [first], -1)
    return [array[..., _as_slice(np.flatnonzero(chosen))] for chosen in (~goes_right, goes_right)]


def _as_slice(indices: np.ndarray) -> slice:
    step = int(indices[1] - indices[0]) if len(indices) > 1 else 1
    return slice(int(indices[0]), int(indices[-1]) + 1, step)


def take(array: jax.Array, order: Places, axis: int = -1) -> jax.Array:
    """Take all entries along an axis in another order; the gradient takes them back, for which XLA would scatter."""
    if is_natural(order):
        return array
    (array,) = own_gradients.prepare((array,))
    return _take(array, order, axis)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _take(array, order, axis):
    return jnp.take(array, np.array(order), axis, unique_indices=True, mode="clip")


def _take_forward(array, order, axis):
    return _take(array, order, axis), None


def _take_backward(order, axis, _, gradient):
    return (_take(gradient, tuple(np.argsort(order).tolist()), axis),)


_take.defvjp(_take_forward, _take_backward)
