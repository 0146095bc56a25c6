"""The flax.nnx module computes what the Linen module does: logits, gradients, running statistics, initial weights."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import shufflenet_jax as snet
from shufflenet_jax.errors import InputError

# The reference lowering is the quickest to compile; the wrapper does not look at it.
TINY = {"channels": (8, 12, 16, 24, 32), "repeats": (2, 1, 1), "num_classes": 5, "lowering": "reference"}
IMAGES = np.random.default_rng(0).normal(size=(4, 32, 48, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3])


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(assert_array_equal, ours, theirs)


def pure(state):
    """A State as nested dicts of arrays."""
    return nnx.to_pure_dict(state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model directory."""
    place = tmp_path_factory.mktemp("saved") / "model"
    settings = {name: TINY[name] for name in ("channels", "repeats", "num_classes")}
    snet.get_model("shufflenet_v2_x0_5", seed=3, **settings).save(place)
    return place


def test_a_loaded_network_has_the_logits_and_features_of_linen(saved):
    net = snet.nnx.load(saved, lowering="reference")
    module, variables = snet.load(saved, lowering="reference")
    assert isinstance(net, nnx.Module) and net.module == module and net.use_running_average
    assert_same(jax.tree.map(np.asarray, net.linen_variables()), variables)
    # Both are compiled, to the same program.
    assert_same(nnx.jit(lambda net, images: net(images))(net, IMAGES), jax.jit(module.apply)(variables, IMAGES))
    # Its state has Linen's paths.
    assert_same(pure(nnx.state(net, nnx.Param)), jax.tree.map(jnp.asarray, variables["params"]))
    assert_same(pure(nnx.state(net, nnx.BatchStat)), jax.tree.map(jnp.asarray, variables["batch_stats"]))


@pytest.mark.parametrize("settings", [{}, {"frozen": ("conv1", "stage2"), "layout": "megvii", "in_chans": 1}])
def test_gradients_and_statistics_are_those_of_linen_in_float64(settings, x64):
    images = np.float64(IMAGES[..., : settings.get("in_chans", 3)])
    net = snet.nnx.ShuffleNetV2(**TINY, **settings, dtype=jnp.float64, rngs=nnx.Rngs(1))
    module, variables = net.module, net.linen_variables()

    @nnx.jit
    def ours(net):
        def loss_of(net):
            logits, _ = net(images, train=True)
            return cross_entropy(logits), logits

        return nnx.value_and_grad(loss_of, has_aux=True)(net)

    @jax.jit
    def theirs(params, batch_stats):
        def loss_of(params):
            state = {"params": params, "batch_stats": batch_stats}
            (logits, _), updates = module.apply(state, images, train=True, mutable=["batch_stats"])
            return cross_entropy(logits), (logits, updates["batch_stats"])

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    (loss, logits), gradients = ours(net)
    (expected, (their_logits, batch_stats)), their_gradients = theirs(**variables)
    close = {"rtol": 1e-9, "atol": 1e-12}  # Two programs may add in other orders.
    assert loss.dtype == np.float64
    assert_allclose(loss, expected, **close)
    assert_allclose(logits, their_logits, **close)
    jax.tree.map(lambda a, b: assert_allclose(a, b, **close), pure(gradients), their_gradients)
    after = net.linen_variables()
    jax.tree.map(lambda a, b: assert_allclose(a, b, **close), after["batch_stats"], batch_stats)
    assert_same(after["params"], variables["params"])
    moved = {
        name
        for name, layer in after["batch_stats"].items()
        if not all(jax.tree.leaves(jax.tree.map(np.array_equal, layer, variables["batch_stats"][name])))
    }
    assert moved == {
        name for name in after["batch_stats"] if name.partition("_unit")[0] not in settings.get("frozen", ())
    }


def test_fresh_weights_are_those_that_linen_draws():
    net = snet.nnx.ShuffleNetV2(**TINY, rngs=nnx.Rngs(7))
    expected = jax.jit(net.module.init)(nnx.Rngs(7).params(), IMAGES)
    # Compilers multiply by a scale before or after the other factors.
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=3e-7), net.linen_variables(), expected)
    assert_same(
        snet.nnx.ShuffleNetV2(**TINY).linen_variables(),
        snet.nnx.ShuffleNetV2(**TINY, rngs=nnx.Rngs(0)).linen_variables(),
    )

    @nnx.jit
    def inside():
        return snet.nnx.ShuffleNetV2(**TINY, rngs=nnx.Rngs(7))

    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6), inside().linen_variables(), expected)
    shapes = nnx.eval_shape(lambda: snet.nnx.ShuffleNetV2(**TINY, rngs=nnx.Rngs(7)))
    assert jax.tree.structure(pure(nnx.state(shapes))) == jax.tree.structure(pure(nnx.state(net)))


def test_a_whole_network_begins_in_a_moment():
    start = time.process_time()
    net = snet.nnx.ShuffleNetV2(1.0, rngs=nnx.Rngs(0))
    assert time.process_time() - start < 5  # It takes less than 2; flax.nnx.bridge takes 9 to 16.
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))) == 2_278_604
    assert len(jax.tree.leaves(nnx.state(net, nnx.BatchStat))) == 112


def test_modes_are_switched_as_in_nnx():
    net = snet.nnx.ShuffleNetV2(**TINY, dropout=0.5, rngs=nnx.Rngs(0, dropout=5))
    run = nnx.jit(lambda net, **settings: net(IMAGES, **settings)[0], static_argnames="train")
    before, predicted = net.linen_variables(), run(net)
    assert_array_equal(run(net), predicted)
    net.train()
    first, second = run(net), run(net)
    assert not np.array_equal(first, second)  # Dropout draws anew.
    assert_array_equal(run(net, train=False), nnx.jit(lambda net: net(IMAGES, train=False)[0])(net))
    after = net.linen_variables()["batch_stats"]
    assert not np.array_equal(after["conv1"]["bn"]["mean"], before["batch_stats"]["conv1"]["bn"]["mean"])
    net.eval()
    assert_array_equal(run(net), run(net))
    assert_same(net.linen_variables()["batch_stats"], after)
    assert snet.nnx.ShuffleNetV2(**TINY).dropout is None


def test_a_loop_of_nnx_trains_and_what_it_trained_is_saved(saved, tmp_path):
    model = snet.get_model(saved, num_classes=3)
    net = snet.nnx.load(saved, num_classes=3, lowering="reference")
    images = np.concatenate([IMAGES + shift for shift in (-2, 0, 2)])
    labels = np.repeat([0, 1, 2], len(IMAGES))
    optimizer = nnx.Optimizer(net, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(net, optimizer):
        def loss_of(net):
            logits, _ = net(images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(net)
        optimizer.update(net, gradients)
        return loss

    losses = [float(train_step(net, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    snet.Model(model.module, jax.tree.map(np.asarray, net.linen_variables()), model.info).save(tmp_path / "trained")
    logits, _ = nnx.jit(lambda net: net(images))(net)
    # Batch norm is folded into the weights of the saved model's fast form.
    assert_allclose(snet.get_model(tmp_path / "trained")(images), logits, rtol=1e-3, atol=1e-4)


def test_backbones_and_other_settings_pass_through(saved):
    net = snet.nnx.load(saved, features_only=True, out_indices=(2, 3), in_chans=1, lowering="reference")
    logits, maps = nnx.eval_shape(lambda net: net(IMAGES[..., :1]), net)
    assert logits is None and sorted(maps) == ["stage2", "stage3"] and not hasattr(net, "stage4_unit0")
    with pytest.raises(InputError, match="width is 3"):
        snet.nnx.ShuffleNetV2(3)
    with pytest.raises(InputError, match="no model at"):
        snet.nnx.load(saved / "none")


def test_nothing_but_its_first_use_imports_flax_nnx():
    script = (
        "import sys, shufflenet_jax as snet; "
        "print(*(name for name in sys.modules if name.partition('.')[0] in ('jax', 'flax')));"
        "snet.ShuffleNetV2, snet.get_model; print('flax.nnx' in sys.modules);"
        "snet.nnx.load; print('flax.nnx' in sys.modules, 'nnx' in dir(snet))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "False", "True True"]
