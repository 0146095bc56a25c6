"""Predictions of a network on a data set, and the files that keep them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ..errors import InputError
from ..files import DAMAGED_ZIP, open_file, path_of
from .ranking import likeliest


class Predictions(NamedTuple):
    """The predictions of a network for N images, in the order of the data.

    Attributes:
      label: int (N,), or (N, K) if each of several labels is right, filled up with -1.
      logits: float (N, num_classes); classes that do not compete have -inf.
      name: str (N,), names of the images, or None if nothing needs them.
    """

    label: np.ndarray
    logits: np.ndarray
    name: np.ndarray | None = None

    def first_classes(self) -> tuple[Int[np.ndarray, " images"], Int[np.ndarray, " images"]]:
        """Return the label, the likeliest one of several, and the predicted class of each image, int (N,) both."""
        return np.asarray(likeliest(self.logits, self.label)), self.logits.argmax(1)


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """Write Predictions as an .npz file with `name`, `label` and `logits`.

    Args:
      path: of the file.
      predictions: with names.
    """
    with open(path, "wb") as file:
        np.savez(file, name=np.asarray(predictions.name), label=predictions.label, logits=predictions.logits)


def read_predictions(path: str | Path, *, named: bool = True) -> Predictions:
    """Read a file from `write_predictions`.

    Args:
      path: of the file.
      named: also read the names, which must be there.

    Raises:
      InputError: the file holds something else, or is damaged.
    """
    try:
        with open_file(path_of(path)) as opened, np.load(opened) as file:
            arrays = {key: file[key] for key in ("label", "logits", *(["name"] if named else []))}
    # NumPy and zipfile raise these for damaged files; the last one for shapes that no memory holds.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, *DAMAGED_ZIP, MemoryError) as error:
        raise InputError(f"{path} holds no predictions of eval.py: {error}") from error
    label, logits, name = arrays["label"], arrays["logits"], arrays.get("name")
    if not (
        all(isinstance(array, np.ndarray) for array in arrays.values())
        and logits.ndim == 2
        and 0 not in logits.shape
        and np.issubdtype(logits.dtype, np.floating)
        and np.isfinite(logits.max(1)).all()  # Classes that did not compete have -inf.
        and label.ndim in (1, 2)
        and label.shape[:1] == logits.shape[:1]
        and 0 not in label.shape
        and np.issubdtype(label.dtype, np.integer)
        and label.reshape(len(logits), -1)[:, 0].min() >= 0
        and label.min() >= -1
        and label.max() < logits.shape[1]
        and (name is None or (name.shape == logits.shape[:1] and np.issubdtype(name.dtype, np.str_)))
    ):
        raise InputError(f"{path} holds no predictions of eval.py: a name, a label and finite logits for each image")
    return Predictions(label, logits, name)
