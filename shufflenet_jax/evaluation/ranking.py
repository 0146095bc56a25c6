"""The ranks of labels among the logits of their images."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from ..shapes import Array, Labels, Logits


def likeliest(logits: Logits, labels: Labels | Int[Array, "batch labels"]) -> Labels:
    """Return the label with the highest logit of each image's labels.

    Args:
      logits: (B, num_classes).
      labels: (B,) or (B, K); missing ones are -1.

    Returns:
      (B,).
    """
    labels = labels.reshape(len(logits), -1)
    return jnp.take_along_axis(labels, values_at(logits, labels).argmax(1, keepdims=True), axis=1)[:, 0]


def values_at(
    values: Float[Array, "batch classes"], labels: Int[Array, "batch labels"]
) -> Float[Array, "batch labels"]:
    """Return the values at labels; -inf where a label is -1.

    Args:
      values: (B, num_classes).
      labels: (B, K).

    Returns:
      (B, K).
    """
    return jnp.where(labels >= 0, jnp.take_along_axis(values, jnp.maximum(labels, 0), axis=1), -jnp.inf)


def label_ranks(logits: Logits, labels: Labels) -> Labels:
    """Count the classes that come before each label. Equal logits are in the order of the classes; NaN comes first.

    Args:
      logits: (B, num_classes).
      labels: (B,).

    Returns:
      (B,).
    """
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)
    later = jnp.arange(logits.shape[1])[None] >= labels[:, None]
    return (~((logits < chosen) | ((logits == chosen) & later))).sum(1)
