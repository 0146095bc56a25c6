"""ShuffleNetV2 in JAX/Flax: the network, PyTorch checkpoints, training, evaluation and export.

Conversion compares each checkpoint of MMPretrain, torchvision, Megvii or ericsun99 with PyTorch, stage by stage.

>>> import shufflenet_jax as snet
>>> model = snet.get_model("shufflenet_v2_x1_0", pretrained=True)
>>> snet.inference_model(model, "bird.jpg")["pred_class"]
>>> module, variables = snet.load("shufflenet_v2_x1_0")
>>> logits, features = module.apply(variables, images)
>>> snet.finetune("FOLDER")  # a Model for your own classes
>>> snet.train(snet.PRESETS["digits"], "runs/digits").best.top1
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .installation import require_system

if TYPE_CHECKING:
    from . import nnx
    from .config import TrainConfig
    from .environment import enable_compilation_cache
    from .inference import Backbone, Model, get_model, inference_model, list_models
    from .model import ShuffleNetV2
    from .recipes import PRESETS
    from .training.finetuning import finetune
    from .training.loop import TrainResult, train

__version__ = "0.1.0"  # pyproject.toml reads it here.
__all__ = [
    "PRESETS",
    "Backbone",
    "Model",
    "ShuffleNetV2",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "enable_compilation_cache",
    "finetune",
    "get_model",
    "inference_model",
    "list_models",
    "load",
    "nnx",
    "train",
]

_PLACES = {
    "PRESETS": "recipes",
    "Backbone": "inference",
    "Model": "inference",
    "ShuffleNetV2": "model",
    "TrainConfig": "config",
    "TrainResult": "training.loop",
    "enable_compilation_cache": "environment",
    "finetune": "training.finetuning",
    "get_model": "inference",
    "inference_model": "inference",
    "list_models": "inference",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name.
    # The libraries take seconds to import, so import only those of this name.
    if name in _PLACES:
        require_system()
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    if name == "nnx":
        require_system()
        return import_module(".nnx", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    checkpoint: Any,  # noqa: ANN401 - a path or a name; get_model checks it.
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    **settings: Any,  # noqa: ANN401 - of several types.
) -> tuple["ShuffleNetV2", dict[str, Any]]:
    """Load the network of a checkpoint, for your own Flax loop.

    Args:
      checkpoint: a published name, a model directory, a training workdir (its best checkpoint, else the latest), one
        of its numbered checkpoints or a .pth file.
      num_classes: of a new classifier; None means the checkpoint's, 0 none.
      in_chans: channels of the images, as in `get_model`; None means the checkpoint's.
      settings: `conv5`, the `seed` of a new classifier, `features_only` and `out_indices`, or fields of ShuffleNetV2
        like `dtype`, `lowering` or `remat`.

    Returns:
      (module, variables): a ShuffleNetV2 and its {"params", "batch_stats"} as NumPy arrays.

    Raises:
      InputError: a ValueError whose message is one line: the checkpoint or a setting is unusable.
    """
    require_system()
    from .inference import get_model

    model = get_model(checkpoint, True, num_classes=num_classes, in_chans=in_chans, **settings)
    return model.module, model.variables
