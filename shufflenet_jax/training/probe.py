"""The linear probe: it trains only the classifier, by logistic regression on features that are computed once."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression

from .. import parallel, progress
from ..config import BALANCED, Preprocess, TrainConfig
from ..data.pipeline import eval_batches
from ..data.sources import Source
from ..deploy import Deployed, deploy
from ..errors import InputError
from ..forward import forward
from ..model import ShuffleNetV2
from ..shapes import Array, Batch, Metrics, Variables
from .losses import ClassWeights
from .supervision import balanced_weights

logger = logging.getLogger(__name__)

BATCH = 32
PENALTY = 0.03  # Of half the squared weights of standardized features, against the mean loss of an image.
MOST_STEPS = 1000


def probe(
    module: ShuffleNetV2,
    config: TrainConfig,
    variables: Variables,
    source: Source,
    class_weights: ClassWeights | None,
) -> Variables:
    """Fit the classifier of a network.

    Args:
      module: the network.
      config: the settings of the run.
      variables: its {"params", "batch_stats"}; only the classifier changes.
      source: the training images, which are prepared as in evaluation.
      class_weights: (num_classes,), factors on the losses of each class, or None.

    Returns:
      The variables with the new classifier.

    Raises:
      InputError: all images are of one class.
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
    module: ShuffleNetV2, config: TrainConfig, variables: Variables, source: Source
) -> tuple[Float[np.ndarray, "images channels"], Int[np.ndarray, " images"]]:
    """Compute the pooled features of a source's images, by the network's fastest form.

    Args:
      module: the network.
      config: whose `preprocess` prepares the images.
      variables: the network's {"params", "batch_stats"}.
      source: the images.

    Returns:
      (features (N, C), labels (N,)).
    """
    network = (module, variables) if config.lowering == "reference" else deploy(module, variables)
    step = parallel.map_eval_step(partial(_features_step, network[0], config.preprocess))
    weights = parallel.replicate(network[1])
    batch_size = parallel.shared_equally(min(BATCH * jax.device_count(), len(source)))
    batches = eval_batches(source, config.preprocess, batch_size=batch_size, **parallel.own_slice())
    computed = []
    with progress.bar(total=len(source), unit="image", description="computing features") as bar:
        for batch in batches:
            arrays = {name: batch[name] for name in ("images", "labels", "mask")}
            rows = np.asarray(step(weights, arrays)[1])
            rows = rows.reshape(-1, rows.shape[-1])[: len(batch["mask"])]
            computed.append((rows, batch["labels"], batch["mask"]))
            bar.update(int(batch["mask"].sum()))
    features, labels, mask = (parallel.gather(np.concatenate(column)) for column in zip(*computed, strict=True))
    return features[mask > 0], labels[mask > 0]


def _features_step(
    module: ShuffleNetV2 | Deployed, preprocess: Preprocess, variables: Variables, batch: Batch
) -> tuple[Metrics, Array]:
    _, features = forward(module, preprocess, variables, batch["images"])
    return {"images": batch["mask"].sum()}, features["pooled"].astype(jnp.float32)


def fit_classifier(
    features: Float[np.ndarray, "images channels"],
    labels: Int[np.ndarray, " images"],
    num_classes: int,
    weights: Float[np.ndarray, " images"],
) -> tuple[Float[np.ndarray, "channels classes"], Float[np.ndarray, " classes"]]:
    """Fit a linear classifier by logistic regression on standardized features.

    Args:
      features: (N, C).
      labels: (N,).
      num_classes: of the classifier.
      weights: (N,), of the images.

    Returns:
      (kernel (C, num_classes), bias (num_classes,)), for features that are not standardized. A class without images is
      never predicted.

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
    if len(present) == 2:  # Then scikit-learn has one logit, that of the second class.
        slopes, offsets = (np.concatenate([-values, values]) / 2 for values in (slopes, offsets))
    kernel, bias = np.zeros((features.shape[1], num_classes)), np.zeros(num_classes)
    kernel[:, present] = slopes.T / deviation[:, None]
    bias[present] = offsets - mean @ kernel[:, present]
    # Classes without images are never predicted.
    bias[np.setdiff1d(np.arange(num_classes), present)] = bias.min() - 1000
    return kernel, bias
