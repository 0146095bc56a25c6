"""What a function with its own gradient rule (`jax.custom_vjp`) needs so that JAX can transform it."""

from typing import Any, NoReturn

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..shapes import Array, Tree

Saved = tuple[Any, ...]  # What a gradient rule keeps of its inputs; each rule keeps something else.


def prepare(arrays: Tree) -> Tree:
    """Prepare a tree of arrays as the arguments of a function with a gradient rule.

    Inside `jax.shard_map` a gradient must vary over the same axes as its argument, so all arrays are marked as varying
    over every axis over which one of them does. The mark's own gradient is a sum over the devices, which is what
    weights need that all devices share. Forward-mode differentiation raises a TypeError that says what helps.

    Args:
      arrays: a tree of arrays.

    Returns:
      The same tree with the same values.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves(arrays)]
    axes = sorted(frozenset().union(*varying), key=str)

    def prepared(array: Array) -> Array:
        missing = (axis for axis in axes if axis not in jax.typeof(array).manual_axis_type.varying)
        return _reverse_mode_only(lax.pcast(array, tuple(missing), to="varying"))

    return jax.tree.map(prepared, arrays)


@jax.custom_jvp
def _reverse_mode_only(x: Array) -> Array:
    return x


@_reverse_mode_only.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], _tangent.bind(tangents[0])


def _refuse(*_: object, **__: object) -> NoReturn:
    raise TypeError(
        'the lowerings "cpu" and "gpu", which "auto" picks there, have no forward-mode derivatives (jax.jvp, '
        'jax.jacfwd, jax.linearize); use lowering="reference"'
    )


# The identity on tangents. Reverse mode transposes it and never evaluates it; only forward mode does.
_tangent = Primitive("reverse_mode_only")
_tangent.def_abstract_eval(lambda tangent: tangent)
_tangent.def_impl(_refuse)
mlir.register_lowering(_tangent, _refuse)
batching.defvectorized(_tangent)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
