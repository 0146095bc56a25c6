from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose
from small_training import few_units

from shufflenet_jax.architecture import FEATURES, TABLES
from shufflenet_jax.batch_groups import BatchGroups
from shufflenet_jax.model import BatchNorm, ShuffleNetV2, init_variables, variable_shapes
from shufflenet_jax.porting import reference

PARAMETERS = {  # (layout, width): parameters of the published files, from running their code
    ("torchvision", 0.5): 1_366_792,
    ("torchvision", 1.0): 2_278_604,
    ("torchvision", 1.5): 3_503_624,
    ("torchvision", 2.0): 7_393_996,
    ("megvii", 0.5): 1_365_792,
    ("megvii", 1.0): 2_278_760,
    ("megvii", 1.5): 3_506_720,
    ("megvii", 2.0): 7_402_600,
}
SMALL = {"width": 0.5, "num_classes": 10}


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("layout", "width"), PARAMETERS)
def test_parameter_counts_are_the_published_ones(layout, width):
    shapes = variable_shapes(ShuffleNetV2(width=width, layout=layout))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == PARAMETERS[layout, width]


@pytest.mark.parametrize("layout", ["torchvision", "megvii"])
def test_features_have_the_resolutions_and_channels_of_the_paper_also_for_odd_sizes(layout):
    module = ShuffleNetV2(width=1.5, layout=layout)
    shapes = variable_shapes(module)
    logits, features = jax.eval_shape(module.apply, shapes, jax.ShapeDtypeStruct((2, 225, 161, 3), jnp.float32))
    assert logits.shape == (2, 1000)
    _, s2, s3, s4, last = TABLES[1.5].channels
    assert [features[name].shape for name in FEATURES] == [
        (2, 57, 41, 24), (2, 29, 21, s2), (2, 15, 11, s3), (2, 8, 6, s4), (2, 8, 6, last), (2, last),
    ]  # fmt: skip


def test_small_stem_keeps_the_resolution():
    module = ShuffleNetV2(small_stem=True, in_chans=1, **SMALL)
    _, features = jax.eval_shape(module.apply, variable_shapes(module), jax.ShapeDtypeStruct((1, 32, 32, 1), "f4"))
    assert features["stem"].shape == (1, 32, 32, 24) and features["stage4"].shape == (1, 4, 4, 192)


def test_parameter_paths_are_the_public_ones():
    paths = {"/".join(path) for path in flatten_dict(variable_shapes(ShuffleNetV2()))}
    assert {
        "params/conv1/conv/kernel",
        "params/stage3_unit0/left_dw/conv/kernel",
        "params/stage3_unit0/left_pw/bn/scale",
        "params/stage4_unit3/right_pw2/bn/bias",
        "batch_stats/conv5/bn/mean",
        "params/fc/bias",
    } <= paths


def test_initial_weights_follow_mmpretrain():
    params = init_variables(ShuffleNetV2(width=0.5))["params"]
    spread = {  # layer: standard deviation of its kernel
        "conv1": (params["conv1"]["conv"]["kernel"], 0.01),
        "depthwise": (params["stage4_unit1"]["right_dw"]["conv"]["kernel"], 1.0),
        "pointwise": (params["stage4_unit1"]["right_pw1"]["conv"]["kernel"], 1 / 96),
        "conv5": (params["conv5"]["conv"]["kernel"], 1 / 192),
        "fc": (params["fc"]["kernel"], 0.01),
    }
    for layer, (kernel, expected) in spread.items():
        # The standard deviation of n normal values scatters by 1 / sqrt(2 n); five of those.
        assert_allclose(np.std(kernel), expected, rtol=5 / np.sqrt(2 * kernel.size), err_msg=layer)
    assert not np.any(params["fc"]["bias"])


@pytest.mark.parametrize("settings", [{}, {"initial": "pytorch", "layout": "torchvision"}, {"num_classes": 0}])
def test_initial_weights_are_those_that_flax_draws(settings):
    """Also inside remat; they are drawn without its programs."""
    module = ShuffleNetV2(**{"width": 0.5, "lowering": "reference", "layout": "megvii", **settings})
    images = jnp.zeros((1, 32, 32, 3))
    with few_units(stage2=1):
        expected = jax.jit(module.clone(remat=True).init)(jax.random.key(3), images)
        # Without optimizations XLA multiplies one constant more, which rounds once more.
        jax.tree.map(partial(assert_allclose, rtol=3e-7), init_variables(module, seed=3), expected)


def test_initial_weights_may_be_pytorchs_own():
    params = init_variables(ShuffleNetV2(width=0.5, initial="pytorch"))["params"]
    torch.manual_seed(0)
    theirs = reference.NETWORKS["torchvision"](TABLES[0.5], 1000).state_dict()
    pairs = [
        (params["conv1"]["conv"]["kernel"], theirs["conv1.0.weight"]),
        (params["stage4_unit1"]["right_dw"]["conv"]["kernel"], theirs["stage4.1.branch2.3.weight"]),
        (params["stage4_unit1"]["right_pw1"]["conv"]["kernel"], theirs["stage4.1.branch2.0.weight"]),
        (params["fc"]["kernel"], theirs["fc.weight"]),
        (params["fc"]["bias"], theirs["fc.bias"]),
    ]
    for ours, theirs in pairs:
        assert ours.size == theirs.numel()
        # The largest of n uniform values is off by 1 / n or so; the smallest tensor here has 648.
        assert_allclose(np.abs(ours).max(), theirs.abs().max(), rtol=0.02)
        # Their standard deviation scatters by less than 0.5 / sqrt(n); five of those, on both sides.
        assert_allclose(np.std(ours), theirs.std(), rtol=7 / np.sqrt(4 * ours.size))


@pytest.mark.parametrize(("lowering", "layout"), [("cpu", "torchvision"), ("gpu", "torchvision"), ("gpu", "megvii")])
def test_lowerings_and_rematerialisation_give_the_same_numbers_and_gradients(x64, lowering, layout):
    with few_units():
        assert_same_numbers_and_gradients(lowering, layout)


def assert_same_numbers_and_gradients(lowering, layout):
    x = images(2, 33, 32, 3).astype(np.float64)
    variables = init_variables(ShuffleNetV2(dtype=jnp.float64, layout=layout, **SMALL))

    def value_and_grads(**settings):
        module = ShuffleNetV2(dtype=jnp.float64, layout=layout, **SMALL, **settings)

        def loss(params):
            (logits, _), updates = module.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return (logits**2).sum(), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    exact = value_and_grads(lowering="reference")
    largest = max(abs(leaf).max() for leaf in jax.tree.leaves(exact))
    fast = value_and_grads(lowering=lowering, remat=True)
    for ours, theirs in zip(*map(jax.tree.leaves, (fast, exact)), strict=True):
        # float64 throughout; batch norm over 4 values in stage4 amplifies rounding some 1e3 times.
        assert_allclose(ours, theirs, atol=1e-10 * largest)


def test_bfloat16_keeps_statistics_and_logits_in_float32_and_stays_close():
    x = images(4, 64, 64, 3)
    variables = init_variables(ShuffleNetV2(**SMALL))
    rows = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        module = ShuffleNetV2(dtype=dtype, **SMALL)
        (logits, features), updates = jax.jit(
            lambda v, x, m=module: m.apply(v, x, train=True, mutable=["batch_stats"])
        )(variables, x)
        assert features["stage4"].dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves((logits, updates, variables))} == {jnp.dtype("float32")}
        rows[dtype] = np.asarray(features["stage2"], np.float32)
    # Some 15 roundings to 8 bits deep: a few percent of the typical value.
    difference = np.sqrt(np.mean((rows[jnp.bfloat16] - rows[jnp.float32]) ** 2) / np.mean(rows[jnp.float32] ** 2))
    assert 0 < difference < 0.05


def test_batch_norm_normalises_and_keeps_running_statistics_like_pytorch(x64):
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 2, 5))
    module = BatchNorm(train=True)
    variables = module.init(jax.random.key(0), x, BatchGroups())
    theirs = torch.nn.BatchNorm2d(5).double()
    for _ in range(3):
        ours, updates = module.apply(variables, x, BatchGroups(), mutable=["batch_stats"])
        variables = {**variables, **updates}
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    # float64; eps and momentum are decimal fractions, rounded once more on one side.
    assert_allclose(ours, expected.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-12, atol=1e-12)
    assert_allclose(variables["batch_stats"]["mean"], theirs.running_mean, rtol=1e-12)
    assert_allclose(variables["batch_stats"]["var"], theirs.running_var, rtol=1e-12)


def test_training_on_a_single_value_per_channel_is_refused_as_in_pytorch():
    module = ShuffleNetV2(**SMALL)
    with pytest.raises(ValueError, match="more than one value"):
        jax.eval_shape(
            lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]),
            variable_shapes(module),
            jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
        )


@pytest.mark.parametrize(
    ("settings", "shape", "told"),
    [
        ({"width": 0.7}, (1, 32, 32, 3), "0.7"),
        ({"layout": "mmpretrain"}, (1, 32, 32, 3), "mmpretrain"),
        ({}, (1, 3, 32, 32), "not \\(B, H, W, 3\\)"),
        ({"conv5": False}, (1, 32, 32, 3), "conv5"),
    ],
)
def test_impossible_settings_and_shapes_are_named(settings, shape, told):
    with pytest.raises(ValueError, match=told):
        module = ShuffleNetV2(**settings)
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
