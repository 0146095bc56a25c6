"""Fine-tuning from Python: a folder of images in, a model that predicts out."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import Unchecked
from ..inference import Model
from ..loading import load_model
from ..recipes import PRESETS
from .loop import train


def finetune(data: str | Path, workdir: str | Path | None = None, **settings: Unchecked) -> Model:
    """Train a published network on your own images, as `train.py` does with the preset finetune.

    Args:
      data: a folder or an archive of images, or anything else that a TrainConfig's `data` can be.
      workdir: folder of the run, which the same call continues; by default a temporary one.
      settings: fields of TrainConfig that replace the preset's, like `init_from`, `epochs`, `linear_probe` or
        `image_size=(192, 256)`.

    Returns:
      The Model of the checkpoint with the highest accuracy on the held-out images; `info.metrics` has the figures of
      that evaluation.

    Raises:
      InputError: the data, the settings or the workdir are unusable, or a signal stopped the run before its end.
    """
    config = dataclasses.replace(PRESETS["finetune"], **{"data": str(data), **settings})
    with _folder_of(workdir) as folder:
        result = train(config, folder)
        module, variables, info = load_model(folder)
    metrics = result.best._asdict() if result.best else None
    return Model(module, variables, dataclasses.replace(info, metrics=metrics))


@contextlib.contextmanager
def _folder_of(workdir: str | Path | None) -> Iterator[Path]:
    """Yield the given folder, or a temporary one."""
    if workdir is not None:
        yield Path(workdir)
        return
    with tempfile.TemporaryDirectory(prefix="shufflenet_jax-") as folder:
        yield Path(folder) / "run"
