"""Averages over steps: recalibrated batch-norm statistics, and moving averages of the network."""

import jax
import jax.numpy as jnp
from jaxtyping import Int

from ..batch_groups import Epoch
from ..config import TrainConfig
from ..model import MOMENTUM
from ..shapes import Array, Tree
from .schedule import count_steps, count_warmup


def recalibrate(number: Int[Array, ""], before: Tree, after: Tree) -> Tree:
    """Estimate running statistics as the mean over the batches from `number` 0 on; earlier steps keep theirs.

    Args:
      number: of this step, counted from the first one of the recalibration; negative before it.
      before: the statistics before this step.
      after: the statistics after they moved by 1 - MOMENTUM to those of the batch.
    """
    share = 1 / ((1 - MOMENTUM) * jnp.maximum(number + 1, 1))
    return jax.tree.map(lambda old, new: jnp.where(number < 0, new, old + (new - old) * share), before, after)


def average_weights(config: TrainConfig, epoch: Epoch, step: Int[Array, ""], old: Tree, new: Tree) -> Tree:
    """Return the moving average after a step: PyTorch's AveragedModel, as torchvision's script updates it.

    It is a copy until the warm-up is over, and at the first update after that.

    Args:
      config: the settings.
      epoch: number of steps of a pass.
      step: number of the step, from 0.
      old: the average before.
      new: the variables after the step.
    """
    place = step % epoch.steps
    due = (place % config.ema_every == 0) & (step < count_steps(config, epoch))
    # The step of the update before, which is closer across the end of an epoch; negative at the first update.
    last = step - jnp.where(place > 0, config.ema_every, (epoch.steps - 1) % config.ema_every + 1)
    decay = jnp.where(last < count_warmup(config, epoch), 0, config.ema_decay)
    return jax.tree.map(lambda a, b: jnp.where(due, decay * a + (1 - decay) * b, a), old, new)
