"""What training minimizes, for each image: cross-entropy as PyTorch has it, and Hinton's distillation."""

from typing import NamedTuple

import jax
import optax


class Targets(NamedTuple):
    """What a network should predict for the images (R,) of a part of a batch.

    Attributes:
      labels: (R,), of the images.
      main: (R,), the label with the larger share, by which accuracy counts.
      following: (R,), labels of the images mixed in; None without mixing.
      share: (R,), of `labels` where images are mixed.
      teacher: (R, num_classes), logits of a teacher; None without one.
      teacher_following: (R, num_classes), the same for the images mixed in, where the logits are stored ones.
    """

    labels: jax.Array
    main: jax.Array
    following: jax.Array | None = None
    share: jax.Array | None = None
    teacher: jax.Array | None = None
    teacher_following: jax.Array | None = None


def image_losses(config, logits, targets, class_weights=None):
    """Return the loss of each image, (B,): towards its label and, with a teacher, towards the teacher's prediction.

    Args:
      config: a TrainConfig.
      logits: (B, num_classes).
      targets: the Targets.
      class_weights: (num_classes,), or None.
    """

    def towards(labels):
        return cross_entropy(logits, labels, config.label_smoothing, class_weights)

    def joined(own, following):
        share = targets.share.astype(logits.dtype).reshape(-1, *(1,) * (own.ndim - 1))
        return share * own + (1 - share) * following

    losses = towards(targets.labels)
    if targets.following is not None:
        losses = joined(losses, towards(targets.following))
    if targets.teacher is not None:
        taught = jax.nn.softmax(targets.teacher / config.temperature)
        if targets.teacher_following is not None:
            taught = joined(taught, jax.nn.softmax(targets.teacher_following / config.temperature))
        distilled = distillation(logits, taught, config.temperature)
        losses = (1 - config.teacher_weight) * losses + config.teacher_weight * distilled
    return losses


def cross_entropy(logits, labels, smoothing=0.0, class_weights=None):
    """The loss of each image, (B,), as PyTorch has it before it takes the mean.

    With smoothing s the target is 1 - s at the label, and s / C at every class; weights multiply each class's term.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    weighted = losses if class_weights is None else losses * class_weights[labels]
    if not smoothing:
        return weighted
    each = -jax.nn.log_softmax(logits)
    evenly = (each if class_weights is None else each * class_weights[None]).mean(1)
    return (1 - smoothing) * weighted + smoothing * evenly


def distillation(logits, taught, temperature):
    """Hinton's loss of each image, (B,): the divergence from probabilities at a temperature, times its square."""
    learned = jax.nn.log_softmax(logits / temperature)
    return optax.losses.kl_divergence(learned, taught) * temperature**2
