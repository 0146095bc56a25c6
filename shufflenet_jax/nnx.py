"""ShuffleNetV2 as a `flax.nnx` module: a wrapper around the Linen module, which computes everything.

Importing it imports flax.nnx, which takes seconds; `snet.nnx` does so at its first use.
"""

from pathlib import Path
from typing import Any

import flax.nnx
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from . import model as linen
from .batch_groups import BatchGroups
from .errors import Unchecked
from .inference import get_model
from .shapes import Variables

FIELDS = (*linen.SETTINGS, "outputs")  # What a Linen module is made from.


class ShuffleNetV2(flax.nnx.Module):
    """The whole network: `logits, features = net(images)`, as the Linen module of this name returns them.

    Each layer is an attribute by its Linen name, like `net.conv1` and `net.stage2_unit0`, and holds nnx.Param and
    nnx.BatchStat in Linen's nesting: `net.conv1["conv"]["kernel"]`, `net.conv1["bn"]["mean"]`. Paths of `nnx.state` are
    therefore Linen's.

    Attributes:
      module: the Linen module.
      use_running_average: whether batch norm predicts with its running statistics, and dropout is off. True at first;
        `net.train()` and `net.eval()` switch it.
      dropout: the stream of dropout's keys; None without dropout.
    """

    def __init__(
        self,
        width: float | None = 1.0,
        *,
        rngs: flax.nnx.Rngs | None = None,
        variables: Variables | None = None,
        **settings: Unchecked,
    ) -> None:
        """Make a network with fresh weights, those of Linen's `module.init(rngs.params(), images)`.

        Args:
          width: the published width, 0.5, 1.0, 1.5 or 2.0; `channels` and `repeats` describe other tables.
          rngs: the streams `params`, for fresh weights, and `dropout`, or a default for both; by default `nnx.Rngs(0)`.
          variables: Linen's {"params", "batch_stats"}, instead of fresh ones.
          settings: the other fields of the Linen module, like `num_classes`, `dtype`, `frozen` or `dropout`.

        Raises:
          InputError: a setting has a value that it cannot have.
        """
        rngs = flax.nnx.Rngs(0) if rngs is None else rngs
        self.module = linen.ShuffleNetV2(width, **settings)
        self.use_running_average = True
        self.dropout = rngs.dropout.fork() if self.module.dropout else None
        if variables is None:
            variables = linen.init_variables(self.module, key=rngs.params())
        kinds = {"params": flax.nnx.Param, "batch_stats": flax.nnx.BatchStat}
        leaves = {}
        for (kind, *path), leaf in flatten_dict(variables).items():
            leaves[tuple(path)] = kinds[kind](jnp.array(leaf))
        for name, layer in unflatten_dict(leaves).items():
            setattr(self, name, flax.nnx.data(layer))
        self.layers = tuple(sorted({name for name, *_ in leaves}))

    def __call__(
        self,
        images: Float[Array | np.ndarray, "batch height width channels"],
        *,
        train: bool | None = None,
        batch_groups: BatchGroups | None = None,
    ) -> tuple[Float[Array, "batch num_classes"] | None, dict[str, Float[Array, "batch *height_width features"]]]:
        """Return (logits, features) of images; in training also move the running statistics.

        Args:
          images: normalized as the weights expect.
          train: whether to normalize by the statistics of the batch, and apply dropout; by default what `net.train()`
            or `net.eval()` set last.
          batch_groups: which images share batch statistics in training; by default all do.
        """
        train = not self.use_running_average if train is None else train
        variables = self.linen_variables()
        if not train:
            return self.module.apply(variables, images)
        rngs = None if self.dropout is None else {"dropout": self.dropout()}
        settings = {"train": True, "batch_groups": batch_groups, "mutable": ["batch_stats"], "rngs": rngs}
        outputs, updates = self.module.apply(variables, images, **settings)
        held = self._held()
        for path, statistic in flatten_dict(updates["batch_stats"]).items():
            held[path].set_value(statistic)
        return outputs

    def linen_variables(self) -> dict[str, Any]:
        """Return Linen's {"params", "batch_stats"}, for `net.module.apply` or a `snet.Model`, which can be saved."""
        variables: dict[tuple[str, ...], Any] = {}
        for path, leaf in self._held().items():
            kind = "batch_stats" if isinstance(leaf, flax.nnx.BatchStat) else "params"
            variables[kind, *path] = leaf.get_value()
        return unflatten_dict(variables)

    def _held(self) -> dict[tuple[str, ...], flax.nnx.Variable]:
        """Return {path: its Param or BatchStat} of all layers."""
        return flatten_dict({name: getattr(self, name) for name in self.layers})


def load(checkpoint: str | Path, *, rngs: flax.nnx.Rngs | None = None, **settings: Unchecked) -> ShuffleNetV2:
    """Return the network in a checkpoint as a flax.nnx module, which predicts until `net.train()`.

    Args:
      checkpoint: a published name, a model directory, a training workdir or a .pth file, as `snet.load` takes them.
      rngs: the stream `dropout`, or a default, where `dropout` is set; by default `nnx.Rngs(0)`.
      settings: those of `snet.load`: `num_classes`, `in_chans`, `conv5`, the `seed` of a new classifier,
        `features_only` and `out_indices`, or fields of the Linen module like `dtype` or `frozen`.

    Raises:
      InputError: nothing usable lies there, or it cannot be changed so.
    """
    loaded = get_model(checkpoint, True, **settings)
    fields = {name: getattr(loaded.module, name) for name in FIELDS}
    return ShuffleNetV2(rngs=rngs, variables=loaded.variables, **fields)
