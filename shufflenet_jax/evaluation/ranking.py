"""Where labels rank among the logits of their images."""

import jax.numpy as jnp


def likeliest(logits, labels):
    """Return the label (B,) with the highest logit of each row's labels (B,) or (B, K); missing ones are -1."""
    labels = labels.reshape(len(logits), -1)
    return jnp.take_along_axis(labels, values_at(logits, labels).argmax(1, keepdims=True), axis=1)[:, 0]


def values_at(values, labels):
    """Return the values (B, num_classes) at labels (B, K); -inf where a label is -1."""
    return jnp.where(labels >= 0, jnp.take_along_axis(values, jnp.maximum(labels, 0), axis=1), -jnp.inf)


def label_ranks(logits, labels):
    """Count the classes that come before each label, (B,). Equal logits go by index; NaN counts as before it."""
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)
    later = jnp.arange(logits.shape[1])[None] >= labels[:, None]
    return (~((logits < chosen) | ((logits == chosen) & later))).sum(1)
