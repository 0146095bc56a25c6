import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import convert_network, lively_network
from numpy.testing import assert_allclose, assert_array_equal
from small_training import few_units

from shufflenet_jax.deploy import CPU_OPTIONS, compile_deployed, deploy, plan
from shufflenet_jax.lowerings import shuffle
from shufflenet_jax.model import ShuffleNetV2, init_variables


def trained(**settings):
    """(module, variables) in float64 whose every scale, bias and statistic is random."""
    module = ShuffleNetV2(dtype=jnp.float64, **settings)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        low, high = {"scale": (0.5, 1.5), "var": (0.5, 2), "bias": (-0.5, 0.5), "mean": (-0.5, 0.5)}[path[-1].key]
        return rng.uniform(low, high, leaf.shape)

    def lively(path, leaf):
        return leaf if path[-1].key == "kernel" else draw(path, leaf)

    return module, jax.tree.map_with_path(lively, init_variables(module))


@pytest.mark.parametrize("layout", ["torchvision", "megvii"])
@pytest.mark.parametrize("units", [4, 8])
def test_following_the_channels_gives_what_splitting_and_shuffling_gives(layout, units):
    features, left = 12, {"torchvision": 6, "megvii": 4}[layout]
    steps, positions = plan(features, left, units, layout)
    # Channels are numbers; the right branch of unit u adds 100 u to the numbers of its input, in their order.
    x = np.arange(features)
    pieces = [x[:left], x[left:]]
    x = x if layout == "megvii" else shuffle.channel_shuffle(x)
    for index, step in enumerate(steps, start=1):
        halves = shuffle.split_even_odd(x) if layout == "megvii" else np.split(x, 2)
        x = np.concatenate([halves[0], halves[1] + 100 * index])
        x = np.asarray(x if layout == "megvii" else shuffle.channel_shuffle(x))

        gathered = np.concatenate([pieces[piece][channels] for piece, channels in step.right])
        right = np.empty_like(gathered)
        right[step.order] = gathered
        pieces = [*(pieces[piece][channels] for piece, channels in step.left), right + 100 * index]
    assert_array_equal(np.concatenate(pieces)[np.argsort(positions)], x)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (9, 65, 49, 3)),
        ({"layout": "megvii"}, (1, 64, 64, 3)),
        ({"small_stem": True, "in_chans": 1, "num_classes": 10}, (2, 16, 17, 1)),
        ({"conv5": False, "num_classes": 0}, (1, 33, 32, 3)),
        ({"num_classes": 0}, (1, 33, 32, 3)),
    ],
)
@pytest.mark.parametrize("lowering", ["cpu", "reference"])
def test_the_deployed_form_gives_the_networks_numbers(x64, settings, shape, lowering):
    with few_units():
        assert_deployed_is_the_same(settings, shape, lowering)


@pytest.mark.parametrize("layout", ["torchvision", "megvii"])
def test_the_deployed_form_gives_the_networks_numbers_and_features_on_gpus(x64, layout):
    with few_units():
        assert_deployed_is_the_same({"layout": layout}, (2, 33, 32, 3), "gpu")


def assert_deployed_is_the_same(settings, shape, lowering):
    module, variables = trained(width=0.5, lowering=lowering, **settings)
    images = np.random.default_rng(0).normal(size=shape)
    expected = jax.jit(module.apply)(variables, images)
    deployed, weights = deploy(module, variables)
    found = jax.jit(deployed.apply)(weights, images)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # float64 through up to 20 layers, in which a batch norm became part of the weights.
        assert_allclose(ours, theirs, atol=1e-11 * np.abs(theirs).max())


def test_in_float32_logits_stay_within_1e_5_of_the_largest():
    module, variables = convert_network(lively_network("torchvision", 1.0, 1000), "torchvision")
    images = np.random.default_rng(0).normal(size=(8, 96, 96, 3)).astype(np.float32)
    expected = jax.jit(module.apply)(variables, images)[0]
    deployed, weights = deploy(module, variables)
    found = jax.jit(deployed.apply)(weights, images)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {np.dtype("float32")}
    # 1e-5 is what users are promised.
    assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_runs_and_stays_close():
    module, variables = convert_network(lively_network("torchvision"), "torchvision")
    images = np.random.default_rng(0).normal(size=(8, 64, 64, 3)).astype(np.float32)
    expected = jax.jit(module.apply)(variables, images)[1]["stage2"]
    deployed, weights = deploy(module.clone(dtype=jnp.bfloat16), variables)
    logits, features = jax.jit(deployed.apply)(weights, images)
    assert logits.dtype == jnp.float32 and features["stage2"].dtype == jnp.bfloat16
    difference = np.sqrt(np.mean((np.float32(features["stage2"]) - expected) ** 2) / np.mean(np.square(expected)))
    assert difference < 0.05  # Some 15 roundings to 8 bits deep: a few percent of the typical value.


@pytest.mark.parametrize(
    "options",
    [CPU_OPTIONS, {"xla_cpu_no_such_option": ""}, dict.fromkeys(CPU_OPTIONS, "no such value")],
    ids=["known", "unknown option", "unknown value"],
)
def test_compiler_options_change_no_numbers_and_are_left_out_where_xla_does_not_know_them(options):
    with few_units():
        module, variables = convert_network(lively_network("torchvision"), "torchvision")
        deployed, weights = deploy(module, variables)
        images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)

        def logits(weights, images):
            return deployed.apply(weights, images)[0]

        expected, call = jax.jit(logits)(weights, images), compile_deployed(logits, options)
        for _ in range(2):
            assert_allclose(call(weights, images), expected, atol=1e-5 * np.abs(expected).max())


def test_a_compiled_function_is_part_of_other_programs_too():
    call, images = compile_deployed(lambda weights, images: weights * images.sum()), np.ones(3, np.float32)
    assert call(2, images) == jax.jit(call)(2, images) == jax.jit(lambda: call(2, jnp.asarray(images)))() == 6
    assert_array_equal(jax.grad(call, argnums=1)(2.0, images), [2, 2, 2])
    assert_array_equal(jax.vmap(call, (None, 0))(2, images), [2, 2, 2])
