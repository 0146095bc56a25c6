"""Counts and losses over a data set as masked sums: every image once, whatever the batches and the devices."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from ..config import Preprocess
from ..deploy import Deployed
from ..forward import forward
from ..model import ShuffleNetV2
from ..shapes import Array, Batch, Logits, Metrics, Variables
from .predictions import Predictions
from .ranking import label_ranks, likeliest, values_at

Evaluated = tuple[Mapping[str, np.ndarray], Metrics, Array]  # A batch, its sums and its logits.


def eval_step(
    module: ShuffleNetV2 | Deployed,
    preprocess: Preprocess,
    variables: Variables,
    batch: Batch,
    *,
    flip: bool = False,
    among: Bool[Array, " classes"] | None = None,
) -> tuple[Metrics, Logits]:
    """Evaluate one device's share of a batch: sums over its real images, and their logits.

    Args:
      module: a network with a classifier.
      preprocess: how to normalize uint8 images.
      variables: the network's {"params", "batch_stats"}, or the weights of its Deployed form.
      batch: {"images": uint8 (B, H, W, C), "labels": int (B,), "mask": (B,)}. Of labels (B, K) each one is right;
        missing ones are -1.
      flip: average the class probabilities of each image and its mirror image.
      among: (num_classes,), the classes that compete; by default all.

    Returns:
      ({"images", "top1_correct", "top5_correct", "loss"}, logits (B, num_classes)). With `flip`, logits are the
      logarithms of the averaged probabilities. Classes that do not compete have -inf.
    """
    images = batch["images"]
    logits, _ = forward(module, preprocess, variables, images)
    assert logits is not None  # The network has a classifier.
    if flip:
        both = jnp.stack([logits, forward(module, preprocess, variables, images[:, :, ::-1])[0]])
        logits = jax.nn.logsumexp(jax.nn.log_softmax(both), axis=0) - jnp.log(2)

    if among is not None:
        logits = jnp.where(among[None], logits, -jnp.inf)
    labels = batch["labels"].reshape(len(logits), -1)
    real, ranks = batch["mask"] > 0, label_ranks(logits, likeliest(logits, labels))
    # Of several labels, the probability of any of them counts.
    losses = -jax.nn.logsumexp(values_at(jax.nn.log_softmax(logits), labels), axis=1)
    return {
        "images": real.sum(),
        "top1_correct": (real & (ranks < 1)).sum(),
        "top5_correct": (real & (ranks < 5)).sum(),
        "loss": jnp.where(real, losses, 0).sum(),
    }, logits


def predict_classes(
    evaluate: Callable[[Variables, Batch], tuple[Metrics, Logits]], variables: Variables, batch: Batch
) -> tuple[Metrics, Int32[Array, "batch 2"]]:
    """Evaluate one device's share of a batch, and reduce its logits to classes.

    Args:
      evaluate: `(variables, batch) -> (sums, logits)`, like `partial(eval_step, module, preprocess)`.
      variables: as in `eval_step`.
      batch: as in `eval_step`.

    Returns:
      (sums, pairs (B, 2)): for each image its label, the likeliest one of several, and the predicted class; -1 and -1
      for padding.
    """
    sums, logits = evaluate(variables, batch)
    pairs = jnp.stack([likeliest(logits, batch["labels"]), logits.argmax(1)], axis=1).astype(jnp.int32)
    return sums, jnp.where((batch["mask"] > 0)[:, None], pairs, -1)


def evaluate(
    step: Callable[[Variables, Batch], tuple[Metrics, Array]],
    variables: Variables,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    keep_logits: bool = False,
) -> tuple[dict[str, Any], Predictions | None]:
    """Evaluate all batches.

    Args:
      step: `eval_step` over all devices: `parallel.map_eval_step(partial(eval_step, module, preprocess))`.
      variables: the network's, on those devices.
      batches: from `data.pipeline.eval_batches`, of any size.
      keep_logits: also return a row for each image.

    Returns:
      ({"images", "top1_correct", "top5_correct": integers, "top1", "top5": percent, "loss": mean}, the Predictions, or
      None without `keep_logits`).
    """
    totals: dict[str, Any] = {}
    rows: list[Predictions] | None = [] if keep_logits else None
    running: Evaluated | None = None
    for batch in batches:
        arrays = {key: batch[key] for key in ("images", "labels", "mask")}
        previous, running = running, (batch, *step(variables, arrays))
        if previous:  # The device computes this batch while the one before is counted.
            _count(previous, totals, rows)
    assert running is not None  # A data set has at least one batch.
    _count(running, totals, rows)
    return _figures(totals), _join(rows) if rows is not None else None


def _count(evaluated: Evaluated, totals: dict[str, Any], rows: list[Predictions] | None) -> None:
    """Add a batch to the totals and, unless they are None, to the rows."""
    batch, sums, logits = evaluated
    for key, value in sums.items():
        # Python's integers never overflow, however many images there are.
        totals[key] = totals.get(key, 0) + np.asarray(value).item()
    if rows is not None:
        real = batch["mask"] > 0
        own = np.asarray(logits).reshape(-1, logits.shape[-1])[: len(real)]
        rows.append(Predictions(batch["labels"][real], own[real], batch["names"][real]))


def _join(rows: list[Predictions]) -> Predictions:
    return Predictions(*map(np.concatenate, zip(*rows, strict=True)))


def _figures(totals: dict[str, Any]) -> dict[str, Any]:
    """Convert sums over images to the usual figures."""
    images = totals["images"]
    counts = {key: totals[key] for key in ("images", "top1_correct", "top5_correct")}
    percent = {key: 100 * totals[f"{key}_correct"] / images for key in ("top1", "top5")}
    return {**counts, **percent, "loss": totals["loss"] / images}
