"""Counts and losses over a data set as masked sums: every image once, whatever the batches and the devices."""

import jax
import jax.numpy as jnp
import numpy as np

from .data import transforms
from .errors import InputError
from .files import DAMAGED_ZIP, open_file, path_of


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
    losses = -jax.nn.logsumexp(_at(jax.nn.log_softmax(logits), labels), axis=1)
    return {
        "images": real.sum(),
        "top1_correct": (real & (ranks < 1)).sum(),
        "top5_correct": (real & (ranks < 5)).sum(),
        "loss": jnp.where(real, losses, 0).sum(),
    }, logits


def forward(module, preprocess, variables, images):
    """(logits, features) of images (B, H, W, C): uint8, which are normalised, or floats as the network takes them."""
    if images.dtype == jnp.uint8:
        images = transforms.normalize(images, preprocess, module.dtype)
    # Accelerators round matrix products to bfloat16 or TF32 unless told otherwise.
    with jax.default_matmul_precision("default" if module.dtype == jnp.bfloat16 else "highest"):
        return module.apply(variables, images.astype(module.dtype))


def likeliest(logits, labels):
    """The label (B,) with the highest logit of each row's labels (B,) or (B, K); missing ones are -1."""
    labels = labels.reshape(len(logits), -1)
    return jnp.take_along_axis(labels, _at(logits, labels).argmax(1, keepdims=True), axis=1)[:, 0]


def _at(values, labels):
    """The values (B, num_classes) at labels (B, K); -inf where there is none."""
    return jnp.where(labels >= 0, jnp.take_along_axis(values, jnp.maximum(labels, 0), axis=1), -jnp.inf)


def label_ranks(logits, labels):
    """How many classes come before each label, (B,): equal logits go by index, and NaN never comes behind."""
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)
    later = jnp.arange(logits.shape[1])[None] >= labels[:, None]
    return (~((logits < chosen) | ((logits == chosen) & later))).sum(1)


def evaluate(step, variables, batches, *, keep_logits=False):
    """Runs an evaluation over all batches.

    Args:
      step: `eval_step` over all devices: `parallel.map_eval_step(partial(eval_step, module, preprocess))`.
      variables: the network's, on those devices.
      batches: from `data.pipeline.eval_batches`, of any size.
      keep_logits: also return a row for each image.
    Returns:
      {"images", "top1_correct", "top5_correct": integers, "top1", "top5": percent, "loss": mean}, and
      {"name", "label", "logits"} in the order read, or None; labels are (N,) or (N, K) as the batches have them.
    """
    totals, kept, running = {}, [], None
    for batch in batches:
        arrays = {key: batch[key] for key in ("images", "labels", "mask")}
        previous, running = running, (batch, *step(variables, arrays))
        if previous:  # The device computes this batch while the one before is counted.
            _count(*previous, totals, kept, keep_logits)
    _count(*running, totals, kept, keep_logits)
    return _figures(totals), _join(kept) if keep_logits else None


def read_predictions(path, keys=("name", "label", "logits")):
    """{key: array} of a file that `eval.py --predictions` wrote. Raises InputError if it does not hold them."""
    try:
        with open_file(path_of(path)) as opened, np.load(opened) as file:
            found = {key: file[key] for key in keys}
    # What NumPy and zipfile raise of damaged files; the last of shapes that no memory holds.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, *DAMAGED_ZIP, MemoryError) as error:
        raise InputError(f"{path} holds no predictions of eval.py: {error}") from error
    label, logits, name = found["label"], found["logits"], found.get("name")
    if not (
        all(isinstance(array, np.ndarray) for array in found.values())
        and logits.ndim == 2
        and 0 not in logits.shape
        and np.issubdtype(logits.dtype, np.floating)
        and np.isfinite(logits.max(1)).all()  # Classes that did not compete have -inf.
        and label.ndim in (1, 2)
        and label.shape[:1] == logits.shape[:1]
        and 0 not in label.shape
        and np.issubdtype(label.dtype, np.integer)
        and label.reshape(len(logits), -1)[:, 0].min() >= 0
        and label.min() >= -1
        and label.max() < logits.shape[1]
        and (name is None or (name.shape == logits.shape[:1] and np.issubdtype(name.dtype, np.str_)))
    ):
        raise InputError(f"{path} holds no predictions of eval.py: a name, a label and finite logits for each image")
    return found


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
