"""The state of a training: everything that the next step depends on."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.training import train_state

from ..batch_groups import Epoch
from ..config import TrainConfig
from ..model import ShuffleNetV2
from ..shapes import Variables
from .optimizer import make_optimizer


class State(train_state.TrainState):
    """Everything that the next step depends on.

    All fields are trees of arrays, in whose place JAX puts other objects when it transforms the state, so they have no
    types.

    Attributes:
      step: number of steps so far.
      params: the network's parameters.
      opt_state: of the optimizer.
      batch_stats: the running statistics.
      ema: {"params", "batch_stats"}, moving averages of both, or None.
    """

    step: Any
    params: Any
    opt_state: Any
    batch_stats: Any
    ema: Any

    @property
    def variables(self) -> Variables:
        """{"params", "batch_stats"}."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def optimizer(self) -> dict[str, Any]:
        """{"step", "opt_state"}."""
        return {"step": self.step, "opt_state": self.opt_state}


def create_state(module: ShuffleNetV2, config: TrainConfig, epoch: Epoch, variables: Variables) -> State:
    """Create the state before the first step of a run.

    Args:
      module: the network.
      config: the settings.
      epoch: number of steps of a pass.
      variables: the network's {"params", "batch_stats"}.
    """
    return State.create(
        apply_fn=module.apply,
        tx=make_optimizer(config, epoch),
        **variables,
        # Copy: the step donates the state, so the average must not alias it.
        ema=jax.tree.map(jnp.array, variables) if config.ema_decay else None,
    ).replace(step=jnp.zeros((), jnp.int32))
