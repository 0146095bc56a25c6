"""A trained network's weights alone: safetensors under our own names, PyTorch files under those of its projects."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..checkpoint import require_sound, stored_module
from ..config import ModelInfo
from ..errors import InputError
from ..model import ShuffleNetV2, variable_shapes
from .agreement import nchw, nhwc


def metadata_of(info):
    """What model.json holds as {field: JSON text}, for formats that keep text beside the weights."""
    return {name: json.dumps(value) for name, value in json.loads(info.to_json()).items()}


def save_safetensors(path, model):
    """Writes a Model's variables, `params/stage2_unit0/right_dw/conv/kernel` and so on, with what model.json holds."""
    save_tensors(path, model.variables, model.info)


def save_tensors(path: Path, variables: Any, info: ModelInfo) -> None:
    """Write the variables of a network under their paths, and what model.json holds as metadata."""
    flat = {name: np.ascontiguousarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    Path(path).write_bytes(save(flat, {"format": "flax", **metadata_of(info)}))


def read_safetensors(path, **settings):
    """(module, variables, ModelInfo) of a file that `save_safetensors` wrote: see `loading.load_model`.

    Raises:
      InputError: the file is damaged, or another one.
    """
    tensors, described = read_tensors(path)
    try:
        fields = {name: json.loads(text) for name, text in described.items() if name != "format"}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged or no safetensors file of ours: {error}; export it again") from error
    try:
        info = ModelInfo.from_json(json.dumps(fields))
    except InputError as error:
        raise InputError(f"{path} does not describe its network as our exports do; give a .pth file") from error
    module = stored_module(path, info, **settings)
    variables = fill_module(path, tensors, module)
    require_sound(path, variables, info)
    return module, variables, info


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata.

    Raises:
      InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or no safetensors file of ours: {error}; export it again") from error


def fill_module(path: Path, tensors: dict[str, np.ndarray], module: ShuffleNetV2) -> Any:
    """Return the variables of a module from tensors under their paths.

    Args:
      path: the tensors' file, for messages.
      tensors: {path of a variable: its value}.
      module: the network.
    Raises:
      InputError: the network has other tensors.
    """
    shapes = {name: leaf.shape for name, leaf in flatten_dict(variable_shapes(module), sep="/").items()}
    if {name: array.shape for name, array in tensors.items()} != shapes:
        raise InputError(f"{path} holds other tensors than the network that it describes; export it again")
    return unflatten_dict(tensors, sep="/")


def save_torch(path, model, dialect):
    """Writes a Model as a PyTorch file of a dialect."""
    from ..porting import convert

    convert.save_torch(convert.back_to_torch(model.module, model.variables, model.info, dialect), dialect, path)


def load_torch(path, model, dialect):
    """A function of normalised images (B, H, W, C) that runs a PyTorch file in the network of its dialect.

    The tensors must have the names that the network gives them, all of them and no others.
    """
    import torch

    from ..porting import reference

    content = torch.load(path, weights_only=True)
    network = reference.network_like(model.module, dialect)
    network.load_state_dict(content.get("state_dict", content))
    network.eval()

    def run(images):
        with torch.inference_mode():
            logits, features = network(torch.tensor(nchw(images)))
        return logits, {name: nhwc(feature.numpy()) for name, feature in features.items()}

    return run
