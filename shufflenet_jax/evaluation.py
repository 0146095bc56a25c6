"""Counts and losses over a data set as masked sums: every image once, whatever the batches and the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import parallel
from .data import transforms


def eval_step(module, preprocess, variables, batch, *, flip=False):
    """One device's share of a batch: sums over its real images, and their logits.

    Args:
      module: a ShuffleNetV2 with a classifier.
      preprocess: a Preprocess: how the uint8 images are normalised.
      variables: its {"params", "batch_stats"}.
      batch: {"images": uint8 (B, H, W, C), "labels": (B,), "mask": (B,)}.
      flip: average the class probabilities of each image and its mirror image.
    Returns:
      ({"images", "top1_correct", "top5_correct", "loss"}, logits (B, num_classes)). With `flip`, logits are the
      logarithms of the averaged probabilities.
    """

    def forward(images):
        inputs = transforms.normalize(images, preprocess, module.dtype)
        return module.apply(variables, inputs)[0]

    images = batch["images"]
    logits = forward(images)
    if flip:
        both = jnp.stack([logits, forward(images[:, :, ::-1])])
        logits = jax.nn.logsumexp(jax.nn.log_softmax(both), axis=0) - jnp.log(2)

    real, ranks = batch["mask"] > 0, label_ranks(logits, batch["labels"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return {
        "images": real.sum(),
        "top1_correct": (real & (ranks < 1)).sum(),
        "top5_correct": (real & (ranks < 5)).sum(),
        "loss": jnp.where(real, losses, 0).sum(),
    }, logits


def label_ranks(logits, labels):
    """How many classes come before each label, (B,): equal logits go by index, and NaN never comes behind."""
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)
    later = jnp.arange(logits.shape[1])[None] >= labels[:, None]
    return (~((logits < chosen) | ((logits == chosen) & later))).sum(1)


class Evaluator:
    """Evaluates variables of one module: compiled once, called as often as a training run needs it."""

    def __init__(self, module, preprocess, *, flip=False, devices=None):
        # Accelerators round matrix products to bfloat16 or TF32 unless told otherwise.
        precision = "default" if module.dtype == jnp.bfloat16 else "highest"

        def step(variables, batch):
            with jax.default_matmul_precision(precision):
                return eval_step(module, preprocess, variables, batch, flip=flip)

        self._step = parallel.map_eval_step(step, devices)
        self._devices = devices

    def __call__(self, variables, batches, *, keep_logits=False):
        """Runs over batches from `data.pipeline.eval_batches`, whatever their size.

        Returns:
          {"images", "top1_correct", "top5_correct": integers, "top1", "top5": percent, "loss": mean}, and, when
          `keep_logits`, {"name", "label", "logits"} with a row for each image in the order read, else None.
        """
        variables = parallel.replicate(variables, self._devices)
        totals, kept, running = {}, [], None
        for batch in batches:
            arrays = {key: batch[key] for key in ("images", "labels", "mask")}
            previous, running = running, (batch, *self._step(variables, arrays))
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
        kept.append({"name": batch["names"][real], "label": batch["labels"][real], "logits": rows[real]})


def _join(kept):
    return {key: np.concatenate([part[key] for part in kept]) for key in kept[0]}


def _figures(totals):
    """Sums over images as the figures people compare."""
    images = totals["images"]
    counts = {key: totals[key] for key in ("images", "top1_correct", "top5_correct")}
    percent = {key: 100 * totals[f"{key}_correct"] / images for key in ("top1", "top5")}
    return {**counts, **percent, "loss": totals["loss"] / images}
