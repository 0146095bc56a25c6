import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest

from shufflenet_jax.architecture import Table
from shufflenet_jax.batch_groups import Epoch, plan_batch
from shufflenet_jax.model import ShuffleNetV2, variable_shapes
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.training.optimizer import decays, make_optimizer
from shufflenet_jax.training.packing import packing_for
from shufflenet_jax.training.state import create_state

EPOCH = Epoch(64, plan_batch(8, 8, 1))
TABLE = Table((5, 10, 8, 14, 9), (2, 1, 1))


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(0)
    shapes = variable_shapes(network("reference"))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def network(lowering):
    return ShuffleNetV2(channels=TABLE.channels, repeats=TABLE.repeats, num_classes=3, lowering=lowering)


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_state_is_the_same_to_the_bit_after_it_was_packed(variables):
    module, config = network("gpu"), dataclasses.replace(PRESETS["in1k"], ema_decay=0.9)
    packing, state = packing_for(module, config, variables), create_state(module, config, EPOCH, variables)
    packed = packing.pack_state(state)
    # Kernels and bias of the classifier decay, scales and biases do not; momentum and averages lie likewise.
    assert len(jax.tree.leaves(packed)) < 30 < 250 < len(jax.tree.leaves(state))
    assert_equal(packing.unpack_state(packed), state)


def test_only_the_lowering_for_gpus_packs(variables):
    state = create_state(network("cpu"), PRESETS["in1k"], EPOCH, variables)
    for lowering in ("auto", "cpu", "reference"):
        assert packing_for(network(lowering), PRESETS["in1k"], variables).pack_state(state) is state


@pytest.mark.parametrize("settings", [{}, {"decay": "all"}, {"decay": "matrices"}, {"freeze": "stage2,conv5"}])
def test_the_optimizer_does_with_packed_parameters_what_it_does_with_each(variables, settings):
    config = dataclasses.replace(PRESETS["in1k"], weight_decay=0.1, warmup_steps=0, steps=9, **settings)
    layout, optimizer = packing_for(network("gpu"), config, variables).params, make_optimizer(config, EPOCH)
    params, results = variables["params"], []
    grads = jax.tree.map(np.cos, params)
    flags = decays(layout.pack(params), config.decay, config.frozen)
    spread = jax.tree.map(lambda flag, flat: np.full(flat.shape, flag), flags, layout.pack(params))
    expected = jax.tree.map(
        lambda flag, leaf: np.full(leaf.shape, flag), decays(params, config.decay, config.frozen), params
    )
    assert_equal(layout.unpack(spread), expected)
    for pack in (layout.pack, partial(jax.tree.map, np.asarray)):
        updates, _ = optimizer.update(pack(grads), optimizer.init(pack(params)), pack(params))
        results.append(optax.apply_updates(pack(params), updates))
    assert_equal(layout.unpack(results[0]), results[1])
