"""The rule that chooses open settings of a TrainConfig, by the number and the size of the training images."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..architecture import TABLE_FIELDS
from ..config import PREPROCESSING, ModelInfo, Preprocess, TrainConfig, sides_of
from ..data.sources import Source
from ..data.survey import usual_side
from ..loading import load_model

LARGE = 128  # Short side in pixels from which images keep the network's own resolution.
ENLARGED = 6  # Largest factor by which smaller images are enlarged.
STRIDE = 32  # Of the network: sides are multiples of it.
TRAINED_AT = 11 / 14  # Side in training as a share of that in evaluation, since random crops enlarge: 176 of 224.
IMAGES = 40_000  # Images that a run shows to the network, over all its epochs.
FEWEST_EPOCHS, MOST_EPOCHS = 3, 60
BATCH = 32
STEPS_PER_EPOCH = 8  # If there are few images, unless batches would be smaller than LEAST_BATCH.
LEAST_BATCH = 16  # The smallest batch with useful statistics.
OF_NETWORK = ("layout", "small_stem", "preprocessing")  # Settings that also come from the checkpoint of `init_from`.
RATE = 0.005  # For batches of BATCH; the rate grows with the square root of the batch size.


class Chosen(NamedTuple):
    """The choice of the rule, and the reasons for it.

    Attributes:
      images: number of training images.
      side: the median of their short sides, in pixels.
      devices: number of devices that share a batch.
      settings: {setting: value}.
    """

    images: int
    side: int
    devices: int
    settings: dict[str, Any]

    @property
    def text(self) -> str:
        """The choice in one line."""
        values = ", ".join(f"{name} {_in_words(value)}" for name, value in self.settings.items())
        return f"chosen for {self.images:,} training images with a short side of {self.side} pixels: {values}"


def _in_words(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if value is not None else "none"


def settle(
    config: TrainConfig, source: Source, stored: Mapping[str, Any], *, devices: int | None = None
) -> tuple[TrainConfig, Chosen | None]:
    """Choose the open settings of a TrainConfig.

    Args:
      config: the TrainConfig.
      source: the training examples.
      stored: the settings of the run that continues, which keeps the choice of its start; {} for a new run.
      devices: number of devices that share a batch; None means all that JAX has here.

    Returns:
      (the TrainConfig without open settings, the choice). The choice is None if nothing was open, or the run continues.

    Raises:
      InputError: the checkpoint of `init_from` cannot be loaded, or no image can be read.
    """
    names = _open_names(config)
    if stored:
        return dataclasses.replace(config, **{name: stored[name] for name in names}), None
    own = min(PREPROCESSING[config.preprocessing].size)
    if config.takes_network:
        _, _, info = load_model(config.init_from)
        config, own = _with_network(config, info), min(info.preprocess.size)
    names = [name for name in names if name in RULE]
    if not names:
        return config, None
    chosen = Chosen(len(source), usual_side(source), devices or jax.device_count(), {})
    for name in names:
        chosen.settings[name] = RULE[name](config, chosen, own)
        config = dataclasses.replace(config, **{name: chosen.settings[name]})
    return config, chosen


def _open_names(config: TrainConfig) -> list[str]:
    """Return the names of the open settings; those of the rule in its order."""
    is_open = {name: config.rule != "none" and not getattr(config, name) for name in RULE}
    is_open["eval_size"] &= not config.image_size
    is_open["epochs"] &= not config.steps
    names = [name for name in RULE if is_open[name]]
    return names + ([*TABLE_FIELDS, *OF_NETWORK] if config.takes_network else [])


def _with_network(config: TrainConfig, info: ModelInfo) -> TrainConfig:
    """Return a TrainConfig for the network of a checkpoint, with its normalization if that has a name."""
    network = {name: getattr(info, name) for name in (*TABLE_FIELDS, "layout")}
    network["small_stem"] = config.small_stem or info.small_stem
    if not _normalizes_as(PREPROCESSING[config.preprocessing], info.preprocess):
        matches = (name for name, other in PREPROCESSING.items() if _normalizes_as(other, info.preprocess))
        network["preprocessing"] = next(matches, config.preprocessing)
    return dataclasses.replace(config, **network)


def _normalizes_as(ours: Preprocess, theirs: Preprocess) -> bool:
    """Return whether two Preprocess give a network the same colors in the same order, to 1 %."""

    def scaled(values: tuple[float, ...], preprocess: Preprocess) -> np.ndarray:
        return np.divide(values, preprocess.scale)

    return ours.channel_order == theirs.channel_order and all(
        np.allclose(scaled(getattr(ours, name), ours), scaled(getattr(theirs, name), theirs), rtol=0.01)
        for name in ("mean", "std")
    )


def _eval_size(_config: TrainConfig, chosen: Chosen, own: int) -> int:
    """Choose the network's own resolution, or less for small images: up to ENLARGED times their size."""
    if chosen.side >= LARGE * own / 224:
        return own
    return min(own, max(STRIDE, round(ENLARGED * chosen.side / STRIDE) * STRIDE))


def _image_size(config: TrainConfig, _chosen: Chosen, _own: int) -> int:
    """Choose a little less than in evaluation."""
    return max(STRIDE, round(min(sides_of(config.eval_size)) * TRAINED_AT / 16) * 16)


def _batch_size(_config: TrainConfig, chosen: Chosen, _own: int) -> int:
    """Choose about BATCH, or less for few images, so that the last batch of an epoch is as full as possible.

    With few images in it, its batch statistics would be poor.
    """
    wanted = min(BATCH, max(chosen.images // STEPS_PER_EPOCH, min(LEAST_BATCH, chosen.images)))
    unit = (8 if wanted >= BATCH else 1) * chosen.devices  # Processors compute eight numbers at once.
    around = range(-(-wanted * 3 // 4), wanted * 5 // 4 + 1)
    possible = [size for size in around if size % unit == 0] or [chosen.devices * -(-wanted // chosen.devices)]

    def emptiness(size: int) -> tuple[float, int]:
        return -chosen.images % size / size, abs(size - wanted)

    return min(possible, key=emptiness)


def _epochs(_config: TrainConfig, chosen: Chosen, _own: int) -> int:
    """Choose the number that shows the network about IMAGES images."""
    return min(max(round(IMAGES / chosen.images), FEWEST_EPOCHS), MOST_EPOCHS)


def _learning_rate(config: TrainConfig, _chosen: Chosen, _own: int) -> float:
    """Choose RATE for batches of BATCH, and for others in proportion to the square root of their size."""
    return float(f"{RATE * (config.batch_size / BATCH) ** 0.5:.3g}")


RULE: dict[str, Callable[[TrainConfig, Chosen, int], Any]] = {  # Each comes after the settings that it needs.
    "eval_size": _eval_size,
    "image_size": _image_size,
    "batch_size": _batch_size,
    "epochs": _epochs,
    "learning_rate": _learning_rate,
}
