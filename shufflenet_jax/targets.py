"""What a network learns beside its labels: the weights of classes, and a teacher's predictions."""

import io
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .deploy import deploy
from .errors import InputError
from .evaluation import read_predictions
from .files import path_of, read_file
from .loading import load_model
from .training import Teacher


class Extras(NamedTuple):
    """What the settings name by files, read."""

    fixed: dict  # Arrays for `train_step`.
    teacher: Teacher | None = None
    stored: dict | None = None  # {"label": (N,), "logits": (N, num_classes)} of the training examples.


def load_extras(config, source, info):
    """The Extras of a TrainConfig, for a source and a network's ModelInfo. Raises InputError if they do not fit."""
    fixed, teacher, stored = {}, None, None
    if config.class_weights:
        fixed["class_weights"] = load_class_weights(config.class_weights, source.num_classes)
    if config.teacher and Path(config.teacher).suffix == ".npz":
        stored = load_predictions(config.teacher, source)
    elif config.teacher:
        teacher, fixed["teacher"] = load_teacher(config, info)
    return Extras(fixed, teacher, stored)


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
    if config.lowering != "plain":
        module, variables = deploy(module, variables)
    return Teacher(module, known.preprocess), variables


def load_predictions(path, source):
    """{"label", "logits"} of `eval.py --predictions` for each example of a source."""
    stored = read_predictions(path, ("label", "logits"))
    shape = (len(source), source.num_classes)
    if stored["logits"].shape != shape or stored["label"].shape != shape[:1]:
        raise InputError(
            f"teacher {path} has logits of shape {stored['logits'].shape}, but the training data {shape}: make them "
            "with eval.py --predictions on the same data and split"
        )
    if not np.isfinite(stored["logits"]).all():
        raise InputError(f"teacher {path} chose among some classes only; make its logits without --subset")
    return stored
