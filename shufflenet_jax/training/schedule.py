"""The length of a run, and the learning rate of each of its steps."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike

from ..batch_groups import Epoch
from ..config import MOST_STEPS, TrainConfig
from ..errors import InputError
from ..shapes import Array


def count_steps(config: TrainConfig, epoch: Epoch) -> int:
    """Return the number of steps that change the parameters, without those of `recalibrate`; a linear probe has one.

    Args:
      config: the settings.
      epoch: number of steps of a pass.

    Raises:
      InputError: there are more than an int32 can count.
    """
    steps = 1 if config.linear_probe else config.steps or config.epochs * epoch.steps
    if steps + config.recalibrate > MOST_STEPS:
        raise InputError(f"the run takes {steps + config.recalibrate:,} steps, but {MOST_STEPS:,} are the most")
    return steps


def peak_rate(config: TrainConfig) -> float:
    """Return the learning rate at the top of the schedule, or 0 for a linear probe.

    Args:
      config: the settings.
    """
    if config.linear_probe:
        return 0.0
    return config.learning_rate * (config.batch_size / config.scale_lr_from if config.scale_lr_from else 1)


def count_warmup(config: TrainConfig, epoch: Epoch) -> int:
    """Return the number of steps at the start with a reduced learning rate.

    Args:
      config: the settings.
      epoch: number of steps of a pass.
    """
    steps = 0 if config.linear_probe else config.warmup_steps + config.warmup_epochs * epoch.steps
    return min(steps, MOST_STEPS)  # Longer than any run.


def make_schedule(config: TrainConfig, epoch: Epoch) -> Callable[[ArrayLike], Array]:
    """Return a pure function from a step, from 0, to its learning rate.

    Args:
      config: the settings.
      epoch: number of steps of a pass.

    Raises:
      InputError: the warm-up leaves no steps for the schedule.
    """
    total, warmup, peak = count_steps(config, epoch), count_warmup(config, epoch), peak_rate(config)
    length = total - (warmup if config.warmup_first else 0)
    if length < 1:
        raise InputError(f"the warm-up takes {warmup} steps of {total}; shorten it or train for longer")
    falling = {
        # In this order of operations it stays exact in float32.
        "linear": lambda left: peak * left / length,
        "cosine": lambda left: peak * (1 - jnp.cos(math.pi * left / length)) / 2,
        "constant": lambda _: peak,
    }[config.schedule]

    def schedule(step: ArrayLike) -> Array:
        at = step // epoch.steps * epoch.steps if config.lr_every == "epoch" else step
        grown = config.warmup_factor
        if config.warmup == "linear":
            grown += (1 - grown) * at / max(warmup, 1)
        rate = falling(jnp.clip(total - at, 0, length)) * jnp.where(at < warmup, grown, 1.0)
        return jnp.where(step < total, rate, 0.0)

    return schedule
