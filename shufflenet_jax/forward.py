"""From images to logits and features: normalization and the network, at full precision."""

import jax
import jax.numpy as jnp

from .data import normalization


def forward(module, preprocess, variables, images):
    """Run a network on images.

    Args:
      module: a ShuffleNetV2, or its Deployed form.
      preprocess: a Preprocess: how uint8 images are normalized.
      variables: the module's variables, or the Deployed form's weights.
      images: (B, H, W, C): uint8, which are normalized, or floats as the network takes them.
    Returns:
      (logits, features), as the module returns them.
    """
    if images.dtype == jnp.uint8:
        images = normalization.normalize(images, preprocess, module.dtype)
    # Accelerators round matrix products to bfloat16 or TF32 unless told otherwise.
    with jax.default_matmul_precision("default" if module.dtype == jnp.bfloat16 else "highest"):
        return module.apply(variables, images.astype(module.dtype))
