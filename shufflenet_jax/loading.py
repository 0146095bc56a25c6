"""What a checkpoint may be, and how each of its forms becomes a network."""

from .checkpoint import load_directory
from .errors import InputError
from .exports.tensors import read_safetensors
from .files import cache_dir, hash_of, locked, path_of
from .published import PUBLISHED, file_of


def load_model(checkpoint, *, ema=False, **settings):
    """The network in a checkpoint of any form.

    Args:
      checkpoint: a model directory, a training workdir (its best checkpoint, else the latest), a published name, whose
        file is downloaded, or a .pth file; both are converted once and kept in the cache; or a .safetensors file that
        `export` wrote.
      ema: take the moving averages that a training or an MMPretrain file keeps beside the weights.
      settings: fields of ShuffleNetV2 to change, like `dtype`, `lowering` or `remat`.
    Returns:
      (module, variables, ModelInfo): a ShuffleNetV2, its {"params", "batch_stats"} as NumPy arrays, and what is known.
    Raises:
      InputError: nothing usable lies there.
    """
    path = path_of(checkpoint)
    if str(checkpoint) in PUBLISHED and not path.exists():
        path = file_of(str(checkpoint))
    if not path.exists():
        raise InputError(
            f"no model at {path}, and none is published under this name; give a model directory, a training workdir, a "
            f".pth or .safetensors file, or one of {', '.join(PUBLISHED)}"
        )
    if path.suffix == ".safetensors" and path.is_file():
        if ema:
            raise InputError(f"{path} holds no moving averages; leave `ema` out")
        return read_safetensors(path, **settings)
    if path.is_file():
        return load_directory(_converted(path, ema), **settings)
    return load_directory(path, ema=ema, **settings)


def _converted(path, ema):
    """The model directory of a .pth file in the cache; converted, and verified, on first use."""
    directory = cache_dir() / "converted" / f"{path.stem[:100]}-{hash_of(path)[:16]}{'-ema' if ema else ''}"
    if not directory.exists():
        from .porting import convert

        with locked(directory):
            if not directory.exists():
                convert.into_cache(path, directory, ema=ema)
    return directory
