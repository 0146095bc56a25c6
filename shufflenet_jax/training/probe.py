"""The linear probe: a classifier alone, by logistic regression on features that are computed once."""

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

from .. import parallel, progress
from ..config import BALANCED, TrainConfig
from ..data.pipeline import eval_batches
from ..data.sources import Source
from ..deploy import deploy
from ..errors import InputError
from ..forward import forward
from ..model import ShuffleNetV2
from .supervision import balanced_weights

logger = logging.getLogger(__name__)

BATCH = 32
PENALTY = 0.03  # Of half the squared weights of standardized features, against the mean loss of an image.
MOST_STEPS = 1000


def probe(module: ShuffleNetV2, config: TrainConfig, variables: Any, source: Source, class_weights: Any) -> Any:
    """Fit the classifier of a network.

    Args:
      module: a ShuffleNetV2.
      config: its TrainConfig.
      variables: its {"params", "batch_stats"}; only the classifier changes.
      source: the training images, which are prepared as evaluation does.
      class_weights: (num_classes,), or None.
    Returns:
      The variables with the new classifier.
    Raises:
      InputError: the images are all of one class.
    """
    features, labels = compute_features(module, config, variables, source)
    weights = np.ones(module.num_classes) if class_weights is None else np.asarray(class_weights)
    if config.sampling == BALANCED:
        weights = weights * balanced_weights(np.bincount(labels, minlength=module.num_classes))
    kernel, bias = fit_classifier(features, labels, module.num_classes, weights[labels])
    logger.info("fitted a classifier to %d features of %s images", features.shape[1], f"{len(labels):,}")
    fc = {"kernel": kernel, "bias": bias}
    fc = {name: np.asarray(value, variables["params"]["fc"][name].dtype) for name, value in fc.items()}
    return {**variables, "params": {**variables["params"], "fc": fc}}


def compute_features(
    module: ShuffleNetV2, config: TrainConfig, variables: Any, source: Source
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pooled features (N, C) and labels (N,) of a source's images, by the network's fastest form."""
    network = (module, variables) if config.lowering == "reference" else deploy(module, variables)
    step = parallel.map_eval_step(partial(_features_step, network[0], config.preprocess))
    weights = parallel.replicate(network[1])
    batch_size = parallel.shared_equally(min(BATCH * jax.device_count(), len(source)))
    batches = eval_batches(source, config.preprocess, batch_size=batch_size, **parallel.own_slice())
    found = []
    with progress.bar(total=len(source), unit="image", description="computing features") as bar:
        for batch in batches:
            arrays = {name: batch[name] for name in ("images", "labels", "mask")}
            rows = np.asarray(step(weights, arrays)[1])
            rows = rows.reshape(-1, rows.shape[-1])[: len(batch["mask"])]
            found.append((rows, batch["labels"], batch["mask"]))
            bar.update(int(batch["mask"].sum()))
    features, labels, mask = (parallel.gather(np.concatenate(column)) for column in zip(*found, strict=True))
    return features[mask > 0], labels[mask > 0]


def _features_step(module: Any, preprocess: Any, variables: Any, batch: Any) -> tuple[Any, jax.Array]:
    _, features = forward(module, preprocess, variables, batch["images"])
    return {"images": batch["mask"].sum()}, features["pooled"].astype(jnp.float32)


def fit_classifier(
    features: np.ndarray, labels: np.ndarray, num_classes: int, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a linear classifier by logistic regression on standardized features.

    Args:
      features: (N, C).
      labels: int (N,).
      num_classes: that the classifier shall have.
      weights: (N,), of the images.
    Returns:
      (kernel (C, num_classes), bias (num_classes,)), for the features as they are. A class without images is never
      the first one.
    Raises:
      InputError: all images are of one class.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError("all training images are of one class; `linear_probe` needs images of two")
    features = np.asarray(features, np.float64)
    mean, deviation = features.mean(0), np.maximum(features.std(0), 1e-6)
    regression = LogisticRegression(C=1 / (PENALTY * weights.sum()), max_iter=MOST_STEPS)
    regression.fit((features - mean) / deviation, labels, sample_weight=weights)
    slopes, offsets = regression.coef_, regression.intercept_
    if len(present) == 2:  # One logit of two.
        slopes, offsets = (np.concatenate([-values, values]) / 2 for values in (slopes, offsets))
    kernel, bias = np.zeros((features.shape[1], num_classes)), np.zeros(num_classes)
    kernel[:, present] = slopes.T / deviation[:, None]
    bias[present] = offsets - mean @ kernel[:, present]
    # So that classes without images are never predicted.
    bias[np.setdiff1d(np.arange(num_classes), present)] = bias.min() - 1000
    return kernel, bias
