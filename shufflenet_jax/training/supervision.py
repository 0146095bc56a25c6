"""Supervision beside the labels: the weights of classes, and a teacher's predictions."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from ..config import BALANCED, ModelInfo, TrainConfig
from ..data.sources import Source
from ..deploy import deploy
from ..errors import InputError
from ..evaluation.predictions import Predictions, read_predictions
from ..files import path_of, read_file
from ..loading import load_model
from ..shapes import Variables
from .step import Constants, Teacher

ClassWeights = Float32[np.ndarray, " classes"]


class Supervision(NamedTuple):
    """Supervision beside the labels, from the files that the settings name.

    Attributes:
      constants: class weights, and weights of a teacher.
      teacher: a network to learn from, or None.
      stored: a teacher's stored logits of the training examples, or None.
    """

    constants: Constants
    teacher: Teacher | None = None
    stored: Predictions | None = None


def load_supervision(config: TrainConfig, source: Source, info: ModelInfo) -> Supervision:
    """Read the Supervision of a run.

    Args:
      config: the settings.
      source: the training examples.
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


def class_weights(setting: str, source: Source) -> ClassWeights:
    """Return the class weights of a run.

    Args:
      setting: a TrainConfig's `class_weights`: a file, or "balanced".
      source: the training examples.

    Raises:
      InputError: the file cannot be read, or does not fit the data.
    """
    if setting != BALANCED:
        return load_class_weights(setting, source.num_classes)
    return balanced_weights(np.bincount(np.fromiter(source.labels(), np.int64), minlength=source.num_classes))


def balanced_weights(counts: Int[np.ndarray, " classes"]) -> ClassWeights:
    """Return weights with which all classes count equally.

    Args:
      counts: (num_classes,), number of images of each class.
    """
    present = np.maximum(counts, 1)  # A class without images has no loss that its weight could change.
    return (counts.sum() / (max(1, (counts > 0).sum()) * present)).astype(np.float32)


def load_class_weights(path: str | Path, num_classes: int) -> ClassWeights:
    """Read class weights from a text file with one number per line.

    Args:
      path: of the file.
      num_classes: number of classes of the data.

    Raises:
      InputError: the file cannot be read, or has other numbers than it should.
    """
    try:
        weights = np.loadtxt(io.BytesIO(read_file(path_of(path))), dtype=np.float32, ndmin=1)
    except (OSError, ValueError) as error:
        raise InputError(f"class weights {path} cannot be read: {error}; give one number per line") from error
    if weights.shape != (num_classes,):
        raise InputError(f"class weights {path} have shape {weights.shape}, but the data has {num_classes} classes")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise InputError(f"class weights {path} must be finite and 0 or more, and not all 0")
    return weights


def load_teacher(config: TrainConfig, info: ModelInfo) -> tuple[Teacher, Variables]:
    """Load the teacher of a run.

    Args:
      config: the settings.
      info: the ModelInfo of the network to train.

    Returns:
      (the teacher, its weights).

    Raises:
      InputError: the checkpoint cannot be read, or has other channels or classes than the network to train.
    """
    settings: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "lowering": config.lowering}
    module, variables, theirs = load_model(config.teacher, **settings)
    for name in ("in_chans", "num_classes"):
        if getattr(theirs, name) != getattr(info, name):
            raise InputError(
                f"teacher {config.teacher} has {name} {getattr(theirs, name)}, but the network to train "
                f"{getattr(info, name)}; choose another one"
            )
    if None not in (theirs.classes, info.classes) and theirs.classes != info.classes:
        raise InputError(f"teacher {config.teacher} has other classes than the data; choose another one")
    if config.lowering == "reference":
        return Teacher(module, theirs.preprocess), variables
    deployed, weights = deploy(module, variables)
    return Teacher(deployed, theirs.preprocess), weights


def load_predictions(path: str | Path, source: Source) -> Predictions:
    """Read a teacher's stored predictions of all examples.

    Args:
      path: of the .npz file.
      source: the training examples.

    Raises:
      InputError: the predictions belong to other data, or omit classes.
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
