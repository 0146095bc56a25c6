"""What a `--checkpoint` may be, and how each of its forms becomes a network."""

from pathlib import Path

from .checkpoint import load_directory


def load_model(checkpoint, **settings):
    """The network in a checkpoint of any form.

    Args:
      checkpoint: a model directory, a training workdir (its best checkpoint, else the latest), or a .pth file, which is
        converted once and kept in the cache.
      settings: fields of ShuffleNetV2 to change, like `dtype`, `lowering` or `remat`.
    Returns:
      (module, variables, ModelInfo): a ShuffleNetV2, its {"params", "batch_stats"} as NumPy arrays, and what is known.
    Raises:
      InputError: nothing usable lies there.
    """
    path = Path(checkpoint).expanduser()
    if path.is_file():
        from .porting import convert  # Needs torch, which nothing else here does.

        path = convert.cached(path)
    return load_directory(path, **settings)
