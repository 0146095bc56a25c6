"""The rule that chooses what a TrainConfig leaves open, by the number and the size of the training images."""

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

LARGE = 128  # Pixels of a short side from which images are used at the network's own resolution.
ENLARGED = 6  # Times that smaller images are enlarged at most.
STRIDE = 32  # Of the network: sides are multiples of it.
TRAINED_AT = 11 / 14  # Of the side in evaluation, since random crops enlarge what they show: 176 of 224.
IMAGES = 40_000  # That a run shows to the network, over all its epochs.
FEWEST_EPOCHS, MOST_EPOCHS = 3, 60
BATCH = 32
STEPS_PER_EPOCH = 8  # Where the images are few, but for LEAST_BATCH.
LEAST_BATCH = 16  # Of which batch statistics are of use.
OF_NETWORK = ("layout", "small_stem", "preprocessing")  # What else is taken from the checkpoint to begin with.
RATE = 0.005  # For batches of BATCH; larger ones take a larger rate by the square root.


class Chosen(NamedTuple):
    """What the rule chose, and by what.

    Attributes:
      images: number of training images.
      side: the median of their short sides, in pixels.
      devices: how many share a batch.
      settings: {setting: value}.
    """

    images: int
    side: int
    devices: int
    settings: dict[str, Any]

    @property
    def text(self) -> str:
        """The choice in a line."""
        values = ", ".join(f"{name} {_in_words(value)}" for name, value in self.settings.items())
        return f"chosen for {self.images:,} training images with a short side of {self.side} pixels: {values}"


def _in_words(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if value is not None else "none"


def settle(
    config: TrainConfig, source: Source, stored: Mapping[str, Any], *, devices: int | None = None
) -> tuple[TrainConfig, Chosen | None]:
    """Choose what a TrainConfig leaves open.

    Args:
      config: the TrainConfig.
      source: the training examples.
      stored: the settings of the run that is to continue, which keeps what was chosen at its start; {} for a new run.
      devices: how many share a batch; None: all that JAX has here.
    Returns:
      The TrainConfig with nothing left open, and what was chosen; None if nothing was open, or it is known already.
    Raises:
      InputError: the checkpoint to begin with cannot be loaded, or no image can be read.
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
    """Return the names of the settings that are open; those of the rule in its order."""
    is_open = {name: config.rule != "none" and not getattr(config, name) for name in RULE}
    is_open["eval_size"] &= not config.image_size
    is_open["epochs"] &= not config.steps
    names = [name for name in RULE if is_open[name]]
    return names + ([*TABLE_FIELDS, *OF_NETWORK] if config.takes_network else [])


def _with_network(config: TrainConfig, info: ModelInfo) -> TrainConfig:
    """Return a TrainConfig of the network in a checkpoint, with the normalization that it knows, if it has a name."""
    network = {name: getattr(info, name) for name in (*TABLE_FIELDS, "layout")}
    network["small_stem"] = config.small_stem or info.small_stem
    if not _normalizes_as(PREPROCESSING[config.preprocessing], info.preprocess):
        known = (name for name, other in PREPROCESSING.items() if _normalizes_as(other, info.preprocess))
        network["preprocessing"] = next(known, config.preprocessing)
    return dataclasses.replace(config, **network)


def _normalizes_as(ours: Preprocess, theirs: Preprocess) -> bool:
    """Whether two Preprocess give a network the same colors in the same order, to 1 %."""

    def scaled(values: tuple[float, ...], preprocess: Preprocess) -> np.ndarray:
        return np.divide(values, preprocess.scale)

    return ours.channel_order == theirs.channel_order and all(
        np.allclose(scaled(getattr(ours, name), ours), scaled(getattr(theirs, name), theirs), rtol=0.01)
        for name in ("mean", "std")
    )


def _eval_size(config: TrainConfig, chosen: Chosen, own: int) -> int:
    """Choose the network's own resolution; small images are enlarged up to ENLARGED times."""
    if chosen.side >= LARGE * own / 224:
        return own
    return min(own, max(STRIDE, round(ENLARGED * chosen.side / STRIDE) * STRIDE))


def _image_size(config: TrainConfig, chosen: Chosen, own: int) -> int:
    """Choose a little less than in evaluation."""
    return max(STRIDE, round(min(sides_of(config.eval_size)) * TRAINED_AT / 16) * 16)


def _batch_size(config: TrainConfig, chosen: Chosen, own: int) -> int:
    """Choose about BATCH, fewer where images are few, so that the last batch of an epoch is as full as can be.

    Few images in it would make poor batch statistics.
    """
    wanted = min(BATCH, max(chosen.images // STEPS_PER_EPOCH, min(LEAST_BATCH, chosen.images)))
    unit = (8 if wanted >= BATCH else 1) * chosen.devices  # Of eights, for processors take eight numbers at once.
    around = range(-(-wanted * 3 // 4), wanted * 5 // 4 + 1)
    possible = [size for size in around if size % unit == 0] or [chosen.devices * -(-wanted // chosen.devices)]

    def emptiness(size: int) -> tuple[float, int]:
        return -chosen.images % size / size, abs(size - wanted)

    return min(possible, key=emptiness)


def _epochs(config: TrainConfig, chosen: Chosen, own: int) -> int:
    """Choose as many as show the network about IMAGES images."""
    return min(max(round(IMAGES / chosen.images), FEWEST_EPOCHS), MOST_EPOCHS)


def _learning_rate(config: TrainConfig, chosen: Chosen, own: int) -> float:
    """Choose RATE for batches of BATCH, and for others in proportion to the square root of their size."""
    return float(f"{RATE * (config.batch_size / BATCH) ** 0.5:.3g}")


RULE: dict[str, Callable[[TrainConfig, Chosen, int], Any]] = {  # In an order in which each knows what it needs.
    "eval_size": _eval_size,
    "image_size": _image_size,
    "batch_size": _batch_size,
    "epochs": _epochs,
    "learning_rate": _learning_rate,
}
