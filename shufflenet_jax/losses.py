"""What training minimises, image by image: cross-entropy as PyTorch has it, and Hinton's distillation."""

import jax
import optax


def image_losses(config, logits, targets, class_weights=None):
    """The loss of each image, (B,): towards its label and, with a teacher, towards what that predicts.

    Args:
      config: a TrainConfig.
      logits: (B, num_classes).
      targets: from `training.mixed`.
      class_weights: (num_classes,), or None.
    """

    def towards(labels):
        return cross_entropy(logits, labels, config.label_smoothing, class_weights)

    def joined(own, following):
        share = targets["share"].astype(logits.dtype).reshape(-1, *(1,) * (own.ndim - 1))
        return share * own + (1 - share) * following

    losses = towards(targets["labels"])
    if "following" in targets:
        losses = joined(losses, towards(targets["following"]))
    if "teacher" in targets:
        taught = jax.nn.softmax(targets["teacher"] / config.temperature)
        if "teacher following" in targets:
            taught = joined(taught, jax.nn.softmax(targets["teacher following"] / config.temperature))
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
