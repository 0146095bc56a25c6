"""What a checkpoint may be, and how each of its forms becomes a network."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import hub
from .checkpoint import Loaded, load_directory, save_model, stored_module
from .config import ModelInfo, Preprocess
from .errors import InputError, Unchecked
from .exports.repository import CONFIG, WEIGHTS, is_repository_folder, read_config, read_repository
from .exports.tensors import read_safetensors
from .files import UnwritableError, cache_dir, hash_of, locked, path_of
from .installation import require_packages
from .model import ShuffleNetV2
from .published import PUBLISHED, file_of, is_at_hand
from .shapes import Variables

logger = logging.getLogger(__name__)


def load_model(checkpoint: Unchecked, *, ema: bool = False, **settings: Unchecked) -> Loaded:
    """Load a network from a checkpoint of any form.

    Args:
      checkpoint: a model directory; a training workdir (its best checkpoint, else the latest) or one of its numbered
        checkpoints, WORKDIR/checkpoints/N; a published name, whose file is downloaded, or a .pth file; both are
        converted once and kept in the cache; a .safetensors file that `export` wrote; a folder that `publish` wrote, or
        its repository on the Hugging Face Hub, hf-hub:OWNER/NAME, where @REVISION may follow.
      ema: take the moving averages that a training or an MMPretrain file stores beside the weights.
      settings: fields of ShuffleNetV2 to change, like `dtype`, `lowering` or `remat`.

    Returns:
      (module, variables, ModelInfo): a ShuffleNetV2, its {"params", "batch_stats"} as NumPy arrays, and the model
      description.

    Raises:
      InputError: there is no checkpoint, or it cannot be used.
    """
    if hub.is_repository(checkpoint):
        _require_no_ema(str(checkpoint), ema=ema)
        return _load_from_hub(str(checkpoint), settings)
    path = path_of(checkpoint)
    if str(checkpoint) in PUBLISHED and not path.exists():
        return _load_published(str(checkpoint), ema, settings)
    if not path.exists():
        raise InputError(
            f"no model at {path}, and none is published under this name; give a model directory, a training workdir, a "
            f".pth or .safetensors file, hf-hub:OWNER/NAME, or one of {', '.join(PUBLISHED)}"
        )
    if path.suffix == ".safetensors" and path.is_file():
        _require_no_ema(path, ema=ema)
        return read_safetensors(path, **settings)
    if is_repository_folder(path):
        _require_no_ema(path, ema=ema)
        return read_repository(path, **settings)
    return _load_file(path, ema, settings) if path.is_file() else load_directory(path, ema=ema, **settings)


def _require_no_ema(checkpoint: str | Path, *, ema: bool) -> None:
    """Raise InputError where averages are asked of a checkpoint of weights alone."""
    if ema:
        raise InputError(f"{checkpoint} holds no moving averages; leave `ema` out")


def _load_from_hub(address: str, settings: dict[str, Any]) -> tuple[ShuffleNetV2, Any, ModelInfo]:
    """Load a repository on the Hugging Face Hub: the weights after config.json says that they are ours."""
    repository = hub.repository_of(address)
    folder = hub.download(repository, CONFIG).parent
    with _errors_naming(address):
        read_config(folder)
    # Of the same commit, even if the branch moves meanwhile.
    hub.download(repository._replace(revision=folder.name), WEIGHTS)
    with _errors_naming(address):
        return read_repository(folder, **settings)


@contextlib.contextmanager
def _errors_naming(address: str) -> Iterator[None]:
    """Put the name of a repository before the errors of the block, which name files of the Hub's cache."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{address}: {error}") from error


def adapt_channels(variables: Variables, preprocess: Preprocess, in_chans: int) -> tuple[Variables, Preprocess]:
    """Give a trained network's first convolution another number of input channels.

    Grey takes the sum of the weights, which sees a grey image as the network saw it in colors. Other numbers repeat the
    weights, those of colors in the order red, green, blue, and divide them by how many more there are, which is timm's
    rule: if all channels are equal, nothing changes.

    Args:
      variables: {"params", "batch_stats"} as NumPy arrays; not changed.
      preprocess: how to prepare the network's images.
      in_chans: new number of channels, 1 or more.

    Returns:
      (variables, preprocess) for images of `in_chans` channels.
    """
    adapted = preprocess.with_channels(in_chans)
    if adapted is preprocess:
        return variables, preprocess
    params = dict(variables["params"])
    kernel = np.asarray(params["conv1"]["conv"]["kernel"])  # (3, 3, channels, 24)
    if in_chans == 1:
        kernel = kernel.sum(2, keepdims=True)
    else:
        before = kernel.shape[2]
        if preprocess.channel_order == "BGR":
            kernel = kernel[:, :, ::-1]
        kernel = kernel[:, :, np.arange(in_chans) % before] * np.asarray(before / in_chans, kernel.dtype)
    params["conv1"] = {**params["conv1"], "conv": {**params["conv1"]["conv"], "kernel": kernel}}
    return {**variables, "params": params}, adapted


def _load_published(name: str, ema: bool, settings: dict[str, Any]) -> Loaded:
    """Load a published file, which is downloaded on first use; without a cache it stays in memory."""
    if not is_at_hand(name):
        require_packages("torch")  # Before a download that could not be converted.
    try:
        path = file_of(name)
    except UnwritableError as error:
        logger.warning("%s; until then it is downloaded each time", error)
        with tempfile.TemporaryDirectory() as folder:
            return _load_file(file_of(name, Path(folder)), ema, settings)
    return _load_file(path, ema, settings)


def _load_file(path: Path, ema: bool, settings: dict[str, Any]) -> Loaded:
    """Load a .pth file, converted and verified on first use and then kept in the cache, if there is one."""
    directory = cache_dir() / "converted" / f"{path.stem[:100]}-{hash_of(path)[:16]}{'-ema' if ema else ''}"
    if directory.exists():
        return load_directory(directory, **settings)
    require_packages("torch")
    from .porting import convert

    conversion = None
    try:
        with locked(directory):
            if not directory.exists():
                conversion = convert.verified(path, ema=ema)
                save_model(directory, conversion.info, conversion.variables, overwrite=True)
    except UnwritableError as error:
        logger.warning("%s; until then %s is converted each time", error, path.name)
        conversion = conversion or convert.verified(path, ema=ema)
        return stored_module(path, conversion.info, **settings), conversion.variables, conversion.info
    return load_directory(directory, **settings)
