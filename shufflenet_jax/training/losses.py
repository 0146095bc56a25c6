"""The losses of each image: PyTorch's cross-entropy, and Hinton's distillation."""

from typing import NamedTuple

import jax
import optax
from jaxtyping import Float

from ..config import TrainConfig
from ..shapes import Array, Labels, Logits

Losses = Float[Array, " batch"]
ClassWeights = Float[Array, " classes"]


class Targets(NamedTuple):
    """The targets of the images (R,) of a part of a batch.

    Attributes:
      labels: (R,), of the images.
      main: (R,), the label with the larger share, which decides the accuracy.
      following: (R,), labels of the images mixed in; None without mixing.
      share: (R,), of `labels` in the mix; None without mixing.
      teacher: (R, num_classes), logits of a teacher; None without one.
      teacher_following: (R, num_classes), stored logits for the images mixed in; None without them.
    """

    labels: Labels
    main: Labels
    following: Labels | None = None
    share: Float[Array, " batch"] | None = None
    teacher: Logits | None = None
    teacher_following: Logits | None = None


def image_losses(
    config: TrainConfig, logits: Logits, targets: Targets, class_weights: ClassWeights | None = None
) -> Losses:
    """Return the loss of each image: towards its label and, with a teacher, towards the teacher's prediction.

    Args:
      config: the settings of the losses.
      logits: (B, num_classes).
      targets: the Targets.
      class_weights: (num_classes,), factors on the losses of each class, or None.

    Returns:
      (B,).
    """

    def towards(labels: Labels) -> Losses:
        return cross_entropy(logits, labels, config.label_smoothing, class_weights)

    def joined(own: Array, following: Array) -> Array:
        assert targets.share is not None  # Mixed images have shares.
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


def cross_entropy(
    logits: Logits, labels: Labels, smoothing: float = 0.0, class_weights: ClassWeights | None = None
) -> Losses:
    """Return the loss of each image, as PyTorch has it before it takes the mean.

    Args:
      logits: (B, num_classes).
      labels: (B,).
      smoothing: s makes the target 1 - s at the label, plus s / num_classes at every class.
      class_weights: (num_classes,), factors on each class's term, or None.

    Returns:
      (B,).
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    weighted = losses if class_weights is None else losses * class_weights[labels]
    if not smoothing:
        return weighted
    each = -jax.nn.log_softmax(logits)
    evenly = (each if class_weights is None else each * class_weights[None]).mean(1)
    return (1 - smoothing) * weighted + smoothing * evenly


def distillation(logits: Logits, taught: Logits, temperature: float) -> Losses:
    """Return Hinton's loss of each image: the divergence from probabilities at a temperature, times its square.

    Args:
      logits: (B, num_classes), of the network that learns.
      taught: (B, num_classes), probabilities of the teacher at this temperature.
      temperature: divides the logits.

    Returns:
      (B,).
    """
    learned = jax.nn.log_softmax(logits / temperature)
    return optax.losses.kl_divergence(learned, taught) * temperature**2
