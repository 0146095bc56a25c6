"""A model as repositories on the Hugging Face Hub hold it: model.safetensors, and config.json by timm's conventions."""

import json
from pathlib import Path
from typing import Any

from ..architecture import width_of
from ..checkpoint import Loaded, require_sound, stored_module
from ..config import ModelInfo
from ..data.labels import imagenet_classes
from ..errors import InputError, Unchecked
from ..files import read_file
from ..shapes import Variables
from .tensors import fill_module, read_tensors, save_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OWN = "shufflenet_jax"  # The field of config.json for what timm's fields do not say.


def save_repository(folder: Path, variables: Variables, info: ModelInfo, licence: str) -> None:
    """Write model.safetensors and config.json.

    Args:
      folder: where to write them; it exists.
      variables: {"params", "batch_stats"} of the network.
      info: description of the network.
      licence: under which others may use the weights.
    """
    save_tensors(folder / WEIGHTS, variables, info)
    config = config_of(info, licence)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def config_of(info: ModelInfo, licence: str) -> dict[str, Any]:
    """Return what config.json holds.

    `architecture`, `num_classes`, `label_names` and `pretrained_cfg` mean what they mean to timm. The number and the
    names of the classes are read from there; all else that model.json holds stands below `shufflenet_jax`.

    Args:
      info: description of the network.
      licence: under which others may use the weights.
    """
    own = json.loads(info.to_json())
    num_classes, names = own.pop("num_classes"), own.pop("classes")
    width, channels = width_of(info.table), info.table.channels
    config = {
        "architecture": "shufflenet_v2" + (f"_x{width}".replace(".", "_") if width else ""),
        "num_classes": num_classes,
        "num_features": channels[-1] if info.conv5 else channels[-2],
        "global_pool": "avg",
        "label_names": names,
        "pretrained_cfg": pretrained_cfg_of(info, licence),
        OWN: own,
    }
    if names == list(imagenet_classes()):
        config["label_descriptions"] = imagenet_classes()
    return {name: value for name, value in config.items() if value is not None}


def pretrained_cfg_of(info: ModelInfo, licence: str) -> dict[str, Any]:
    """Return timm's description of the input. It knows no decoders and no order of channels, so nobody reads it here.

    Args:
      info: description of the network.
      licence: under which others may use the weights.
    """
    preprocess, stride = info.preprocess, 8 if info.small_stem else 32
    in_rgb = slice(None, None, -1 if preprocess.channel_order == "BGR" else 1)

    def scaled(values: tuple[float, ...]) -> list[float]:
        """Return values for pixels from 0 to 1, in the order of RGB."""
        return [round(value / (255 * preprocess.scale), 6) for value in values][in_rgb]

    return {
        "custom_load": False,
        "input_size": [info.in_chans, *preprocess.size],
        "fixed_input_size": False,
        "interpolation": preprocess.interpolation,
        "crop_pct": round(min(preprocess.size) / preprocess.resize, 6),
        "crop_mode": "center",
        "mean": scaled(preprocess.mean),
        "std": scaled(preprocess.std),
        "num_classes": info.num_classes,
        "pool_size": [-(-side // stride) for side in preprocess.size],
        "first_conv": "conv1.conv",
        "classifier": "fc" if info.num_classes else None,
        "license": licence.lower(),
    }


def is_repository_folder(folder: Path) -> bool:
    """Whether a folder holds the weights of a repository."""
    return (folder / WEIGHTS).is_file()


def read_config(folder: Path) -> ModelInfo:
    """Read the description of a network from config.json.

    Raises:
      InputError: config.json is missing or damaged, or describes another network.
    """
    path = folder / CONFIG
    try:
        config = json.loads(read_file(path))
        own = config.get(OWN)
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds {WEIGHTS}, but no {CONFIG}; fetch both files") from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}; fetch it again") from error
    if not isinstance(own, dict):
        names = [config.get("architecture"), config.get("model_type"), *_listed(config.get("architectures"))]
        named = next((name for name in names if isinstance(name, str)), "another network")
        raise InputError(f"{path} describes {named}, not a network that `publish` wrote; give one of those")
    try:
        fields = {**own, "num_classes": config.get("num_classes"), "classes": config.get("label_names")}
        return ModelInfo.from_json(json.dumps(fields))
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}; fetch it again") from error


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def read_repository(folder: Path, **settings: Unchecked) -> Loaded:
    """Read a folder that `save_repository` wrote: see `loading.load_model`.

    Raises:
      InputError: a file is missing or damaged, or describes another network.
    """
    info = read_config(folder)
    module = stored_module(folder, info, **settings)
    tensors, _ = read_tensors(folder / WEIGHTS)
    variables = fill_module(folder / WEIGHTS, tensors, module)
    require_sound(folder / WEIGHTS, variables, info)
    return module, variables, info
