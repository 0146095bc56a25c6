"""A State in a few flat arrays, which a step updates in a few kernels, for devices on which each kernel costs time."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .. import lowerings
from ..config import TrainConfig
from ..lowerings import gpu
from ..model import ShuffleNetV2
from ..shapes import Params, Variables
from .optimizer import is_frozen
from .state import State

Path = tuple[str, ...]


class Layout(NamedTuple):
    """The assignment of a tree's leaves to flat arrays.

    A flat array holds leaves that the optimizer treats alike. It has the path of the first one and as many axes as
    they have, so that the optimizer treats it in the same way.

    Attributes:
      paths: of the tree's leaves, in its order.
      shapes: of the leaves.
      members: {path of a flat array: the numbers of its leaves}.
    """

    paths: tuple[Path, ...]
    shapes: tuple[tuple[int, ...], ...]
    members: dict[Path, tuple[int, ...]]

    def pack(self, tree: Params) -> Params:
        """Copy a tree's leaves into flat arrays.

        Args:
          tree: a tree with the leaves of this layout.

        Returns:
          A tree of flat arrays, (numbers, 1, ...).
        """
        leaves, packed = flatten_dict(tree), {}
        for path, members in self.members.items():
            flat = jnp.concatenate([leaves[self.paths[index]].reshape(-1) for index in members])
            packed[path] = flat.reshape(-1, *(1,) * (len(self.shapes[members[0]]) - 1))
        return unflatten_dict(packed)

    def unpack(self, packed: Params) -> Params:
        """Return the tree of leaves.

        Args:
          packed: from `pack`.
        """
        leaves = {}
        for path, flat in flatten_dict(packed).items():
            start, flat = 0, flat.reshape(-1)
            for index in self.members[path]:
                end = start + int(np.prod(self.shapes[index]))
                leaves[self.paths[index]], start = flat[start:end].reshape(self.shapes[index]), end
        return unflatten_dict({path: leaves[path] for path in self.paths})

    def is_tree(self, node: object) -> bool:
        """Return whether a node of a larger tree is a tree of this layout.

        Args:
          node: any node.
        """
        return isinstance(node, dict) and set(flatten_dict(node)) == set(self.paths)

    def is_packed(self, node: object) -> bool:
        """Return whether a node of a larger tree is a tree of this layout's flat arrays.

        Args:
          node: any node.
        """
        return isinstance(node, dict) and set(flatten_dict(node)) == set(self.members)


class Packing(NamedTuple):
    """The flat arrays of a State; without layouts it stays as it is.

    Attributes:
      params: layout of the parameters.
      batch_stats: layout of the running statistics.
    """

    params: Layout | None = None
    batch_stats: Layout | None = None

    def pack(self, variables: Variables) -> Variables:
        """Pack variables, or gradients in the same tree.

        Args:
          variables: {"params", "batch_stats"}.
        """
        return {name: layout.pack(variables[name]) for name, layout in self._layouts()} if self.params else variables

    def unpack(self, packed: Variables) -> Variables:
        """Return {"params", "batch_stats"}.

        Args:
          packed: from `pack`.
        """
        return {name: layout.unpack(packed[name]) for name, layout in self._layouts()} if self.params else packed

    def pack_state(self, state: State) -> State:
        """Return a State of flat arrays, for the training step.

        Args:
          state: as checkpoints hold it.
        """
        return self._changed(state, Layout.is_tree, Layout.pack) if self.params else state

    def unpack_state(self, state: State) -> State:
        """Return the State as checkpoints hold it.

        Args:
          state: from `pack_state`, or from a later step.
        """
        return self._changed(state, Layout.is_packed, Layout.unpack) if self.params else state

    def _layouts(self) -> Iterable[tuple[str, Layout]]:
        return self._asdict().items()

    def _changed(
        self, state: State, fits: Callable[[Layout, object], bool], change: Callable[[Layout, Params], Params]
    ) -> State:
        """Change all trees in a State that have the leaves of the parameters or of the statistics."""

        def layout_of(node: object) -> Layout | None:
            return next((layout for layout in self if layout and fits(layout, node)), None)

        def changed(node: Any) -> Any:  # noqa: ANN401 - any node of the State.
            return change(layout, node) if (layout := layout_of(node)) else node

        def on_devices(state: State) -> State:
            return jax.tree.map(changed, state, is_leaf=lambda node: layout_of(node) is not None)

        return jax.jit(on_devices)(state)


UNPACKED = Packing()


def packing_for(module: ShuffleNetV2, config: TrainConfig, variables: Variables) -> Packing:
    """Return the Packing of a run: flat arrays in the lowering for GPUs, else none.

    Args:
      module: the network.
      config: whose `frozen` layers the optimizer treats differently.
      variables: the network's {"params", "batch_stats"}, or their shapes.
    """
    if lowerings.resolve(module.lowering) is not gpu:
        return UNPACKED
    return Packing(*(_layout(variables[name], config.frozen) for name in Packing._fields))


def _layout(tree: Params, frozen: tuple[str, ...]) -> Layout:
    paths, shapes = [], []
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        names = tuple(entry.key for entry in path)
        paths.append(names)
        shapes.append(leaf.shape)
        alike = names[0] == "fc", is_frozen(path, frozen), "bn" in names, names[-1], leaf.ndim
        groups.setdefault(alike, []).append(index)
    members = {paths[indices[0]]: tuple(indices) for indices in groups.values()}
    return Layout(tuple(paths), tuple(shapes), members)
