"""The state of a training: all that the next step depends on."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.training import train_state

from .optimizer import make_optimizer


class State(train_state.TrainState):
    """Everything that the next step depends on: step, params, opt_state, batch_stats and, where kept, averages."""

    batch_stats: Any
    ema: Any  # {"params", "batch_stats"}, moving averages of both, or None.

    @property
    def variables(self):
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def optimizer(self):
        return {"step": self.step, "opt_state": self.opt_state}


def create_state(module, config, epoch, variables):
    """The state before the first step of a run, from a network's {"params", "batch_stats"}."""
    return State.create(
        apply_fn=module.apply,
        tx=make_optimizer(config, epoch),
        **variables,
        # Copy: the step donates the state, so the average must not alias it.
        ema=jax.tree.map(jnp.array, variables) if config.ema_decay else None,
    ).replace(step=jnp.zeros((), jnp.int32))
