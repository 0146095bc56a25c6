"""A trained network's weights without its graph: safetensors with our names, PyTorch files with those of others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..checkpoint import Loaded, require_sound, stored_module
from ..config import ModelInfo
from ..errors import InputError, Unchecked
from ..model import ShuffleNetV2, variable_shapes
from ..shapes import Variables
from .agreement import nchw, nhwc


@runtime_checkable
class Trained(Protocol):
    """A network with its weights: inference.Model, whose module imports this one.

    Attributes:
      module: the network.
      variables: its {"params", "batch_stats"}.
      info: the model description.
    """

    module: ShuffleNetV2
    variables: Variables
    info: ModelInfo


def metadata_of(info: ModelInfo) -> dict[str, str]:
    """Return the contents of model.json as {field: JSON text}, for formats that store text beside the weights.

    Args:
      info: the model description.
    """
    return {name: json.dumps(value) for name, value in json.loads(info.to_json()).items()}


def save_safetensors(path: str | Path, model: Trained) -> None:
    """Write a network's variables, `params/stage2_unit0/right_dw/conv/kernel` and so on, with its model.json.

    Args:
      path: of the file.
      model: the network.
    """
    save_tensors(path, model.variables, model.info)


def save_tensors(path: str | Path, variables: Variables, info: ModelInfo) -> None:
    """Write the variables of a network under their paths, and what model.json holds as metadata."""
    flat = {name: np.ascontiguousarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    Path(path).write_bytes(save(flat, {"format": "flax", **metadata_of(info)}))


def read_safetensors(path: str | Path, **settings: Unchecked) -> Loaded:
    """Read a file from `save_safetensors`.

    Args:
      path: of the file.
      settings: fields of ShuffleNetV2 to change, as in `loading.load_model`.

    Returns:
      (module, variables, ModelInfo).

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
    module = stored_module(Path(path), info, **settings)
    variables = fill_module(path, tensors, module)
    require_sound(Path(path), variables, info)
    return module, variables, info


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata.

    Raises:
      InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or no safetensors file of ours: {error}; export it again") from error


def fill_module(path: str | Path, tensors: dict[str, np.ndarray], module: ShuffleNetV2) -> Variables:
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


def save_torch(path: str | Path, model: Trained, dialect: str) -> None:
    """Write a network as a PyTorch file.

    Args:
      path: of the file.
      model: the network.
      dialect: whose names it has.
    """
    from ..porting import convert

    convert.save_torch(convert.back_to_torch(model.module, model.variables, model.info, dialect), dialect, path)


def load_torch(
    path: str | Path, model: Trained, dialect: str
) -> Callable[[np.ndarray], tuple[np.ndarray | None, dict[str, np.ndarray]]]:
    """Return a function from normalized images (B, H, W, C) to the outputs of a PyTorch file.

    The file's tensors must have exactly the names of the dialect's network.

    Args:
      path: of the file.
      model: the network from which the file was written.
      dialect: whose names it has.
    """
    import torch

    from ..porting import reference

    content = torch.load(path, weights_only=True)
    network = reference.network_like(model.module, dialect)
    network.load_state_dict(content.get("state_dict", content))
    network.eval()

    def run(images: np.ndarray) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
        with torch.inference_mode():
            logits, features = network(torch.tensor(nchw(images)))
        logits = None if logits is None else logits.numpy()
        return logits, {name: nhwc(feature.numpy()) for name, feature in features.items()}

    return run
