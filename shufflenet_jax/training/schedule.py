"""How long a run takes, and the learning rate of each of its steps."""

import math

import jax.numpy as jnp

from ..errors import InputError


def count_steps(config, epoch):
    """The steps of a run that move the parameters; `recalibrate` comes on top. A linear probe counts as one."""
    return 1 if config.linear_probe else config.steps or config.epochs * epoch.steps


def peak_rate(config):
    """The learning rate from which the schedule falls; a linear probe has none."""
    if config.linear_probe:
        return 0.0
    return config.learning_rate * (config.batch_size / config.scale_lr_from if config.scale_lr_from else 1)


def count_warmup(config, epoch):
    """The steps at the start in which the learning rate is reduced."""
    return 0 if config.linear_probe else config.warmup_steps + config.warmup_epochs * epoch.steps


def make_schedule(config, epoch):
    """The learning rate of step t = 0, 1, ...: a pure function.

    Args:
      config: a TrainConfig.
      epoch: the Epoch of its data: how many steps a pass has.
    """
    total, warmup, peak = count_steps(config, epoch), count_warmup(config, epoch), peak_rate(config)
    length = total - (warmup if config.warmup_first else 0)
    if length < 1:
        raise InputError(f"the warm-up takes {warmup} steps of {total}; shorten it or train for longer")
    falling = {
        # Written so, it stays exact in float32.
        "linear": lambda left: peak * left / length,
        "cosine": lambda left: peak * (1 - jnp.cos(math.pi * left / length)) / 2,
        "constant": lambda left: peak,
    }[config.schedule]

    def schedule(step):
        at = step // epoch.steps * epoch.steps if config.lr_every == "epoch" else step
        grown = config.warmup_factor
        if config.warmup == "linear":
            grown += (1 - grown) * at / max(warmup, 1)
        rate = falling(jnp.clip(total - at, 0, length)) * jnp.where(at < warmup, grown, 1.0)
        return jnp.where(step < total, rate, 0.0)

    return schedule
