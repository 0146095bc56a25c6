"""From images to logits and features: normalization and the network, at full precision."""

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from .config import Preprocess
from .data import normalization
from .deploy import Deployed
from .model import ShuffleNetV2
from .shapes import Array, Features, Logits, Variables


def forward(
    module: ShuffleNetV2 | Deployed,
    preprocess: Preprocess | None,
    variables: Variables,
    images: Shaped[Array, "batch height width channels"],
) -> tuple[Logits | None, Features]:
    """Run a network on images.

    Args:
      module: a ShuffleNetV2, or its Deployed form.
      preprocess: how to normalize uint8 images; None if the images are floats.
      variables: the module's variables, or the Deployed form's weights.
      images: (B, H, W, C): uint8, which are normalized, or floats as the network takes them.

    Returns:
      (logits, features), as the module returns them.
    """
    if images.dtype == jnp.uint8:
        assert preprocess is not None  # uint8 images need it.
        images = normalization.normalize(images, preprocess, module.dtype)
    # By default accelerators round matrix products to bfloat16 or TF32.
    with jax.default_matmul_precision("default" if module.dtype == jnp.bfloat16 else "highest"):
        return module.apply(variables, images.astype(module.dtype))
