"""Averages over steps: batch norm's statistics estimated again, and moving averages of the network."""

import jax
import jax.numpy as jnp

from ..model import MOMENTUM
from .schedule import count_steps, count_warmup


def recalibrate(number, before, after):
    """Estimate running statistics as the mean over the batches from `number` 0 on; earlier steps keep theirs.

    Args:
      number: of this step, counted from the first that takes part; negative before it.
      before, after: the statistics before and after they moved by 1 - MOMENTUM to those of the batch.
    """
    share = 1 / ((1 - MOMENTUM) * jnp.maximum(number + 1, 1))
    return jax.tree.map(lambda old, new: jnp.where(number < 0, new, old + (new - old) * share), before, after)


def average_weights(config, epoch, step, old, new):
    """Return the moving average after a step: PyTorch's AveragedModel, as torchvision's script updates it.

    It is a copy until the warm-up is over, and at the first update after that.
    """
    place = step % epoch.steps
    due = (place % config.ema_every == 0) & (step < count_steps(config, epoch))
    # That of the update before, which the end of an epoch may have brought nearer; of the first one it is below 0.
    last = step - jnp.where(place > 0, config.ema_every, (epoch.steps - 1) % config.ema_every + 1)
    kept = jnp.where(last < count_warmup(config, epoch), 0, config.ema_decay)
    return jax.tree.map(lambda a, b: jnp.where(due, kept * a + (1 - kept) * b, a), old, new)
