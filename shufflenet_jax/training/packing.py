"""A State in a few flat arrays, for devices on which each kernel counts: a step then updates it in a few kernels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .. import lowerings
from ..config import TrainConfig
from ..lowerings import gpu
from ..model import ShuffleNetV2
from .optimizer import is_frozen
from .state import State

Path = tuple[str, ...]


class Layout(NamedTuple):
    """Which leaves of a tree lie in which flat array.

    The leaves of an array are those that the optimizer treats alike. It lies under the path of the first of them and
    has as many axes as they have, so that the optimizer need not know.

    Attributes:
      paths: of the tree's leaves, in its order.
      shapes: of the leaves.
      members: for the path of each flat array, which leaves it has.
    """

    paths: tuple[Path, ...]
    shapes: tuple[tuple[int, ...], ...]
    members: dict[Path, tuple[int, ...]]

    def pack(self, tree: Any) -> Any:
        """Return the tree of flat arrays, (numbers, 1, ...), that hold a tree's leaves."""
        leaves, packed = flatten_dict(tree), {}
        for path, members in self.members.items():
            flat = jnp.concatenate([leaves[self.paths[index]].reshape(-1) for index in members])
            packed[path] = flat.reshape(-1, *(1,) * (len(self.shapes[members[0]]) - 1))
        return unflatten_dict(packed)

    def unpack(self, packed: Any) -> Any:
        """Return the tree again."""
        leaves = {}
        for path, flat in flatten_dict(packed).items():
            start, flat = 0, flat.reshape(-1)
            for index in self.members[path]:
                end = start + int(np.prod(self.shapes[index]))
                leaves[self.paths[index]], start = flat[start:end].reshape(self.shapes[index]), end
        return unflatten_dict({path: leaves[path] for path in self.paths})

    def is_tree(self, node: Any) -> bool:
        """Whether a node of a larger tree has leaves at all the paths of this one."""
        return isinstance(node, dict) and set(flatten_dict(node)) == set(self.paths)

    def is_packed(self, node: Any) -> bool:
        """Whether a node of a larger tree holds such a tree in flat arrays."""
        return isinstance(node, dict) and set(flatten_dict(node)) == set(self.members)


class Packing(NamedTuple):
    """How a State lies in flat arrays; without layouts it stays as it is."""

    params: Layout | None = None
    batch_stats: Layout | None = None

    def pack(self, variables: Any) -> Any:
        """Pack {"params", "batch_stats"}, or gradients of such a kind."""
        return {name: layout.pack(variables[name]) for name, layout in self._layouts()} if self.params else variables

    def unpack(self, packed: Any) -> Any:
        """Return {"params", "batch_stats"} again."""
        return {name: layout.unpack(packed[name]) for name, layout in self._layouts()} if self.params else packed

    def pack_state(self, state: State) -> State:
        """Return a State of flat arrays, which a training step takes."""
        return self._changed(state, Layout.is_tree, Layout.pack) if self.params else state

    def unpack_state(self, state: State) -> State:
        """Return the State that checkpoints hold."""
        return self._changed(state, Layout.is_packed, Layout.unpack) if self.params else state

    def _layouts(self):
        return self._asdict().items()

    def _changed(self, state, fits, change):
        """Change all trees in a State that have the leaves of the parameters or of the statistics."""

        def layout_of(node):
            return next((layout for layout in self if fits(layout, node)), None)

        def changed(node):
            return change(layout, node) if (layout := layout_of(node)) else node

        def on_devices(state):
            return jax.tree.map(changed, state, is_leaf=lambda node: layout_of(node) is not None)

        return jax.jit(on_devices)(state)


UNPACKED = Packing()


def packing_for(module: ShuffleNetV2, config: TrainConfig, variables: Any) -> Packing:
    """Return how the State of a training lies in arrays: flat ones in the lowering for GPUs."""
    if lowerings.resolve(module.lowering) is not gpu:
        return UNPACKED
    return Packing(*(_layout(variables[name], config.frozen) for name in Packing._fields))


def _layout(tree, frozen):
    paths, shapes, groups = [], [], {}
    for index, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        names = tuple(entry.key for entry in path)
        paths.append(names)
        shapes.append(leaf.shape)
        alike = names[0] == "fc", is_frozen(path, frozen), "bn" in names, names[-1], leaf.ndim
        groups.setdefault(alike, []).append(index)
    members = {paths[indices[0]]: tuple(indices) for indices in groups.values()}
    return Layout(tuple(paths), tuple(shapes), members)
