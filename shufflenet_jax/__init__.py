"""ShuffleNetV2 in JAX/Flax, with every published weight importable and proven equal.

>>> import shufflenet_jax as snet
>>> module, variables = snet.load("shufflenet_v2_x1_0")
>>> logits, features = module.apply(variables, images)
"""

__all__ = ["ShuffleNetV2", "load"]


def __getattr__(name):
    # The libraries take seconds to import: only what is asked for is.
    if name == "ShuffleNetV2":
        from .model import ShuffleNetV2

        return ShuffleNetV2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(checkpoint, **settings):
    """The network in a checkpoint, for a Flax loop of your own.

    Args:
      checkpoint: a model directory, a training workdir (its best checkpoint, else the latest) or a .pth file.
      settings: fields of ShuffleNetV2 to change, like `dtype`, `lowering` or `remat`.
    Returns:
      (module, variables): a ShuffleNetV2 and its {"params", "batch_stats"} as NumPy arrays.
    Raises:
      InputError: a ValueError whose message is one line; nothing usable lies there.
    """
    from .loading import load_model

    module, variables, _ = load_model(checkpoint, **settings)
    return module, variables
