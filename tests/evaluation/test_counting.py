import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from conftest import convert_network, lively_network
from numpy.testing import assert_allclose, assert_array_equal

from shufflenet_jax import parallel
from shufflenet_jax.config import TORCHVISION_EVAL
from shufflenet_jax.data import normalization
from shufflenet_jax.data.pipeline import eval_batches
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.evaluation.counting import eval_step, evaluate
from shufflenet_jax.evaluation.ranking import label_ranks

SMALL_EVAL = dataclasses.replace(TORCHVISION_EVAL, resize=64, crop=64)


@pytest.fixture(scope="module")
def network():
    """(module, variables) of a network whose logits differ from image to image: fresh ones are nearly constant."""
    return convert_network(lively_network("torchvision"), "torchvision")


def test_ranks_count_the_classes_in_front_and_break_ties_by_index():
    logits = np.float32([[3, 1, 2], [1, 1, 1], [1, 1, 1], [0, np.nan, 1], [np.nan] * 3])
    labels = np.int32([2, 0, 2, 1, 0])
    ranks = np.asarray(label_ranks(logits, labels))
    assert list(ranks[:3]) == [1, 0, 2]
    assert (ranks[3:] > 0).all(), "NaN must never count as correct"


def run(network, *, batch_size, devices=1, **settings):
    module, variables = network
    devices = jax.devices()[:devices]
    step = parallel.map_eval_step(partial(eval_step, module, SMALL_EVAL, **settings), devices)
    batches = eval_batches(open_source("digits"), SMALL_EVAL, batch_size=batch_size, limit=40)
    return evaluate(step, parallel.replicate(variables, devices), batches, keep_logits=True)


def test_counts_and_loss_are_those_of_the_logits(network):
    figures, rows = run(network, batch_size=16)
    order = np.argsort(-rows.logits, axis=1)
    assert figures["images"] == len(rows.label) == 40
    assert figures["top1_correct"] == (order[:, 0] == rows.label).sum()
    assert figures["top5_correct"] == (order[:, :5] == rows.label[:, None]).any(1).sum()
    assert figures["top1"] == 100 * figures["top1_correct"] / 40
    logits = rows.logits.astype(np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(40), rows.label]
    assert_allclose(figures["loss"], losses.mean(), rtol=1e-6)  # float32 sums of 40 values
    assert 0 < figures["top1_correct"] < 40 and rows.logits.std(0).min() > 1e-3


def test_devices_and_batch_sizes_change_nothing(network):
    expected, rows = run(network, batch_size=40)
    for devices, batch_size in [(1, 7), (3, 16), (4, 1)]:
        figures, others = run(network, batch_size=batch_size, devices=devices)
        assert [figures[key] for key in ("images", "top1_correct", "top5_correct")] == [
            expected[key] for key in ("images", "top1_correct", "top5_correct")
        ]
        assert_array_equal(others.name, rows.name)
        # Matrix products of another shape may sum in another order.
        assert_allclose(others.logits, rows.logits, atol=1e-4)


def test_flip_averages_the_probabilities_of_both_sides(network):
    module, variables = network
    _, rows = run(network, batch_size=40, flip=True)
    batch = next(iter(eval_batches(open_source("digits"), SMALL_EVAL, batch_size=40, limit=40)))
    sides = [normalization.normalize(side, SMALL_EVAL) for side in (batch["images"], batch["images"][:, :, ::-1])]
    forward = jax.jit(lambda side: jax.nn.softmax(module.apply(variables, side)[0]))
    assert_allclose(np.exp(rows.logits), (forward(sides[0]) + forward(sides[1])) / 2, atol=1e-5)


def test_a_network_that_gives_nan_gets_nothing_right(network):
    module, variables = network
    figures, _ = run((module, jax.tree.map(lambda leaf: leaf * np.nan, variables)), batch_size=40)
    assert figures["top1_correct"] == figures["top5_correct"] == 0
