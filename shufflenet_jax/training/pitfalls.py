"""Warnings of settings and data that make a training pointless although it runs, with the numbers behind them."""

import logging
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ..batch_groups import Epoch
from ..config import TrainConfig
from ..data.inventory import some
from ..data.labels import class_name
from ..data.sources import Source
from .schedule import count_steps, count_warmup, make_schedule, peak_rate

logger = logging.getLogger(__name__)


def warn_of_pitfalls(config: TrainConfig, epoch: Epoch, train: Source, evaluated: Source) -> None:
    """Warn of settings and data that keep a run from its goal.

    Args:
      config: the settings.
      epoch: number of steps of a pass.
      train: the training examples.
      evaluated: the evaluation examples.
    """
    for message in (
        *_long_warmup(config, epoch),
        *_large_batch(config, epoch),
        *_classes_without_images(train, evaluated),
    ):
        logger.warning(message)


def warn_of_collapse(
    step: int, predicted: np.ndarray, top1: float, rate: float, classes: tuple[str, ...] | None
) -> None:
    """Warn if a network predicts one class for all images.

    Args:
      step: after which it was evaluated.
      predicted: (num_classes,), how often each class was predicted.
      top1: the share of images with the right class, in percent; if all have one class, the prediction is right.
      rate: the learning rate of the step.
      classes: the names of the classes, if they have any.
    """
    label, images = int(predicted.argmax()), int(predicted.sum())
    if predicted[label] == images > 1 and top1 < 100:
        logger.warning(
            "step %d: the network predicts class %s for all %s evaluation images, %.2f %% of which are of that class, "
            "at a learning rate of %.3g; if the next evaluations are no better, lower `learning_rate` and look at the "
            "labels",
            step,
            class_name(classes, label),
            f"{images:,}",
            top1,
            rate,
        )


def _long_warmup(config: TrainConfig, epoch: Epoch) -> Iterator[str]:
    total, warmup, peak = count_steps(config, epoch), count_warmup(config, epoch), peak_rate(config)
    if warmup >= total:
        highest = float(jax.vmap(make_schedule(config, epoch))(jnp.arange(total)).max())
        yield (
            f"the warm-up takes {warmup:,} steps, the run only {total:,}: its learning rate reaches {highest:.3g} "
            f"instead of {peak:.3g}; shorten the warm-up (`warmup_steps`, `warmup_epochs`) or train for longer"
        )


def _large_batch(config: TrainConfig, epoch: Epoch) -> Iterator[str]:
    if config.batch_size > epoch.size and not config.linear_probe:
        yield (
            f"batch_size is {config.batch_size:,}, but there are only {epoch.size:,} training images: each of the "
            f"{count_steps(config, epoch):,} steps takes {epoch.left:,} images; lower `batch_size` to take more steps"
        )


def _classes_without_images(train: Source, evaluated: Source) -> Iterator[str]:
    """Yield a warning for each kind of class that lacks images, if the labels are known without reading the data."""
    if not (train.labels_at_hand and evaluated.labels_at_hand):
        return
    trained, counts = set(train.labels()), Counter(evaluated.labels())
    missing = [label for label in range(train.num_classes) if label not in trained]
    hopeless = sum(counts[label] for label in missing)
    if hopeless:
        names = [class_name(train.classes, label) for label in missing if counts[label]]
        yield (
            f"{hopeless:,} of {len(evaluated):,} evaluation images are of classes without training images: "
            f"{some(names)}; top-1 cannot exceed {100 - 100 * hopeless / len(evaluated):.2f} %"
        )
    names = [class_name(train.classes, label) for label in missing if not counts[label]]
    if names:
        yield f"of {train.num_classes:,} classes these have no images at all: {some(names)}"
