"""What a network learns beside its labels: the weights of classes, and a teacher's predictions."""

import io
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..config import BALANCED
from ..data.sources import Source
from ..deploy import deploy
from ..errors import InputError
from ..evaluation.predictions import Predictions, read_predictions
from ..files import path_of, read_file
from ..loading import load_model
from .step import Constants, Teacher


class Supervision(NamedTuple):
    """What a network learns from beside its labels, read from the files that the settings name."""

    constants: Constants
    teacher: Teacher | None = None
    stored: Predictions | None = None  # A teacher's stored logits of the training examples.


def load_supervision(config, source, info):
    """Read the Supervision of a TrainConfig.

    Args:
      config: the TrainConfig.
      source: the Source of the training examples.
      info: the ModelInfo of the network to train.
    Raises:
      InputError: a file cannot be read, or does not fit the data or the network.
    """
    weights = class_weights(config.class_weights, source) if config.class_weights else None
    if not config.teacher:
        return Supervision(Constants(weights))
    if Path(config.teacher).suffix == ".npz":
        return Supervision(Constants(weights), stored=load_predictions(config.teacher, source))
    teacher, variables = load_teacher(config, info)
    return Supervision(Constants(weights, variables), teacher)


def class_weights(setting: str, source: Source) -> np.ndarray:
    """Return (num_classes,) float32 by a TrainConfig's `class_weights`: from a file, or the counts of a source."""
    if setting != BALANCED:
        return load_class_weights(setting, source.num_classes)
    return balanced_weights(np.bincount(np.fromiter(source.labels(), np.int64), minlength=source.num_classes))


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """Return weights (num_classes,), float32, with which classes of these numbers of images count alike."""
    present = np.maximum(counts, 1)  # A class without images has no loss that its weight could change.
    return (counts.sum() / (max(1, (counts > 0).sum()) * present)).astype(np.float32)


def load_class_weights(path, num_classes):
    """(num_classes,) float32 from a text file with a number a line."""
    try:
        weights = np.loadtxt(io.BytesIO(read_file(path_of(path))), dtype=np.float32, ndmin=1)
    except (OSError, ValueError) as error:
        raise InputError(f"class weights {path} cannot be read: {error}; give a number a line") from error
    if weights.shape != (num_classes,):
        raise InputError(f"class weights {path} have shape {weights.shape}, but the data has {num_classes} classes")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise InputError(f"class weights {path} must be finite, none below 0 and some above")
    return weights


def load_teacher(config, info):
    """(Teacher, its weights) of a checkpoint that knows the same channels and classes as the network to train."""
    settings = {"dtype": jnp.dtype(config.dtype), "lowering": config.lowering}
    module, variables, known = load_model(config.teacher, **settings)
    for name in ("in_chans", "num_classes"):
        if getattr(known, name) != getattr(info, name):
            raise InputError(
                f"teacher {config.teacher} has {name} {getattr(known, name)}, but the network to train "
                f"{getattr(info, name)}; choose another one"
            )
    if None not in (known.classes, info.classes) and known.classes != info.classes:
        raise InputError(f"teacher {config.teacher} knows other classes than the data; choose another one")
    if config.lowering != "reference":
        module, variables = deploy(module, variables)
    return Teacher(module, known.preprocess), variables


def load_predictions(path, source):
    """Read a teacher's Predictions of all examples of a source.

    Raises:
      InputError: they belong to other data, or leave classes out.
    """
    stored = read_predictions(path, named=False)
    shape = (len(source), source.num_classes)
    if stored.logits.shape != shape or stored.label.shape != shape[:1]:
        raise InputError(
            f"teacher {path} has logits of shape {stored.logits.shape}, but the training data {shape}; store "
            "the predictions of the same data and split",
            command=("eval", {"checkpoint": "TEACHER", "data": "DATA", "split": "SPLIT", "predictions": "FILE.npz"}),
        )
    if not np.isfinite(stored.logits).all():
        raise InputError(f"teacher {path} predicts some classes only; store predictions without `subset`")
    return stored
