"""Counts and losses over a data set as masked sums: every image once, whatever the batches and the devices."""

import jax
import jax.numpy as jnp
import numpy as np

from ..forward import forward
from .predictions import Predictions
from .ranking import label_ranks, likeliest, values_at


def eval_step(module, preprocess, variables, batch, *, flip=False, among=None):
    """One device's share of a batch: sums over its real images, and their logits.

    Args:
      module: a ShuffleNetV2 with a classifier, or its Deployed form.
      preprocess: a Preprocess: how the uint8 images are normalised.
      variables: its {"params", "batch_stats"}, or its weights.
      batch: {"images": uint8 (B, H, W, C), "labels": (B,), "mask": (B,)}. Of labels (B, K) any is right; those that
        are not there are -1.
      flip: average the class probabilities of each image and its mirror image.
      among: bool (num_classes,): the classes that compete; by default all.
    Returns:
      ({"images", "top1_correct", "top5_correct", "loss"}, logits (B, num_classes)). With `flip`, logits are the
      logarithms of the averaged probabilities; those of classes that do not compete are -inf.
    """
    images = batch["images"]
    logits, _ = forward(module, preprocess, variables, images)
    if flip:
        both = jnp.stack([logits, forward(module, preprocess, variables, images[:, :, ::-1])[0]])
        logits = jax.nn.logsumexp(jax.nn.log_softmax(both), axis=0) - jnp.log(2)

    if among is not None:
        logits = jnp.where(among[None], logits, -jnp.inf)
    labels = batch["labels"].reshape(len(logits), -1)
    real, ranks = batch["mask"] > 0, label_ranks(logits, likeliest(logits, labels))
    # The probability that any of the labels has.
    losses = -jax.nn.logsumexp(values_at(jax.nn.log_softmax(logits), labels), axis=1)
    return {
        "images": real.sum(),
        "top1_correct": (real & (ranks < 1)).sum(),
        "top5_correct": (real & (ranks < 5)).sum(),
        "loss": jnp.where(real, losses, 0).sum(),
    }, logits


def predict_classes(evaluate, variables, batch):
    """Take an evaluation's share of a batch on one device, and of its logits keep what counts for classes.

    Args:
      evaluate: `(variables, batch) -> (sums, logits)`, such as `partial(eval_step, module, preprocess)`.
      variables, batch: as in `eval_step`.
    Returns:
      (sums, int32 (B, 2): of each image its label, of several the likeliest, and the class that comes first; -1 twice
      for padding).
    """
    sums, logits = evaluate(variables, batch)
    pairs = jnp.stack([likeliest(logits, batch["labels"]), logits.argmax(1)], axis=1).astype(jnp.int32)
    return sums, jnp.where((batch["mask"] > 0)[:, None], pairs, -1)


def evaluate(step, variables, batches, *, keep_logits=False):
    """Runs an evaluation over all batches.

    Args:
      step: `eval_step` over all devices: `parallel.map_eval_step(partial(eval_step, module, preprocess))`.
      variables: the network's, on those devices.
      batches: from `data.pipeline.eval_batches`, of any size.
      keep_logits: also return a row for each image.
    Returns:
      {"images", "top1_correct", "top5_correct": integers, "top1", "top5": percent, "loss": mean}, and
      the Predictions, or None without `keep_logits`.
    """
    totals, kept, running = {}, [], None
    for batch in batches:
        arrays = {key: batch[key] for key in ("images", "labels", "mask")}
        previous, running = running, (batch, *step(variables, arrays))
        if previous:  # The device computes this batch while the one before is counted.
            _count(*previous, totals, kept, keep_logits)
    _count(*running, totals, kept, keep_logits)
    return _figures(totals), _join(kept) if keep_logits else None


def _count(batch, sums, logits, totals, kept, keep_logits):
    for key, value in sums.items():
        # Python's numbers: no count is lost, however many images there are.
        totals[key] = totals.get(key, 0) + np.asarray(value).item()
    if keep_logits:
        real = batch["mask"] > 0
        rows = np.asarray(logits).reshape(-1, logits.shape[-1])[: len(real)]
        kept.append(Predictions(batch["labels"][real], rows[real], batch["names"][real]))


def _join(kept):
    return Predictions(*map(np.concatenate, zip(*kept, strict=True)))


def _figures(totals):
    """Sums over images as the figures people compare."""
    images = totals["images"]
    counts = {key: totals[key] for key in ("images", "top1_correct", "top5_correct")}
    percent = {key: 100 * totals[f"{key}_correct"] / images for key in ("top1", "top5")}
    return {**counts, **percent, "loss": totals["loss"] / images}
