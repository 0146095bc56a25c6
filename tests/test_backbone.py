"""`features_only=True`: the feature maps of a whole network, without the layers behind them."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import shufflenet_jax as snet
from shufflenet_jax import accounting
from shufflenet_jax.architecture import LEVELS, TABLES
from shufflenet_jax.errors import InputError
from shufflenet_jax.lowerings import reference

NAME = "shufflenet_v2_x0_5"
TINY = {"channels": (8, 12, 16, 24, 32), "repeats": (2, 1, 1)}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
# XLA fuses a shorter network in other ways.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def lively(variables, seed=0):
    """The variables of a network with statistics and weights of a trained one's size, as NumPy arrays."""
    rng = np.random.default_rng(seed)

    def change(path, leaf):
        spread = {"scale": (0.5, 1.5), "var": (0.5, 1.5), "mean": (-0.3, 0.3)}.get(path[-1].key)
        return leaf if spread is None else rng.uniform(*spread, leaf.shape).astype(leaf.dtype)

    return jax.tree.map_with_path(change, variables)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Model directories of lively networks: {layout: its path}."""
    places = {}
    for name, layout in ((NAME, "torchvision"), ("megvii-0.5x", "megvii")):
        places[layout] = tmp_path_factory.mktemp("saved") / layout
        model = snet.get_model(name, num_classes=5, **TINY)
        snet.Model(model.module, lively(model.variables), model.info).save(places[layout])
    return places


@pytest.mark.parametrize("layout", ["torchvision", "megvii"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (2, 3, 4), (0, 3)])
def test_the_maps_are_those_of_the_whole_network(layout, out_indices, saved):
    model = snet.get_model(saved[layout])
    backbone = snet.get_model(saved[layout], features_only=True, out_indices=out_indices)
    maps, features = backbone(IMAGES), model.extract_feat(IMAGES)
    names = [LEVELS[index] for index in out_indices]
    assert backbone.feature_info.module_name() == names and isinstance(maps, list) and len(maps) == len(names)
    for level, computed in zip(backbone.feature_info, maps, strict=True):
        height, width = (side // level.reduction for side in IMAGES.shape[1:3])
        assert computed.shape == (2, height, width, level.channels) and np.ptp(computed) > 0
        if level.name == "conv1":
            computed = reference.max_pool(computed)
        assert_allclose(computed, features["stem" if level.name == "conv1" else level.name], **ROUNDING)
    # The Flax module, of which the above is the fast form.
    logits, plain = backbone.module.apply(backbone.variables, backbone.normalize(IMAGES))
    assert logits is None and list(plain) == names
    for name, computed in zip(names, maps, strict=True):
        assert_allclose(computed, plain[name], rtol=1e-4, atol=1e-4)  # Batch norm is folded into the weights.


@pytest.mark.parametrize(
    ("out_indices", "stages"),
    [((0,), 0), ((1,), 0), ((2,), 1), ((1, 3), 2), ((-2,), 2), ((2, 3, 4), 3), ((-1,), 3), (None, 3)],
)
def test_layers_behind_the_last_map_are_dropped(out_indices, stages, saved):
    whole = snet.get_model(saved["torchvision"])
    backbone = snet.get_model(saved["torchvision"], features_only=True, out_indices=out_indices)
    units = ["stage2_unit0", "stage2_unit1", "stage3_unit0", "stage4_unit0"]
    expected = {"conv1", *units[: (0, 2, 3, 4)[stages]]}
    for kind, layers in backbone.variables.items():
        assert set(layers) == expected
        assert_leaves_equal(layers, {name: whole.variables[kind][name] for name in expected})
    costs = accounting.count(whole.module, 64, 96)[: stages + 1]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(backbone.variables["params"]))
    assert parameters == accounting.total(costs)["parameters"]
    _, features = jax.eval_shape(backbone.module.apply, backbone.variables, np.float32(IMAGES))
    assert sorted(features) == sorted(backbone.feature_info.module_name())  # JAX sorts a dict by its keys.
    initial = jax.eval_shape(backbone.module.init, jax.random.key(0), np.float32(IMAGES))
    assert jax.tree.structure(initial) == jax.tree.structure(backbone.variables)


def test_the_published_width_keeps_what_the_page_says():
    sizes = {}
    for indices in ((4,), (3,)):
        backbone = snet.get_model("shufflenet_v2_x1_0", features_only=True, out_indices=indices)
        sizes[indices] = sum(leaf.size for leaf in jax.tree.leaves(backbone.variables["params"]))
    assert sizes == {(4,): 776_420, (3,): 275_068}
    assert (backbone.feature_info.channels(), backbone.num_features) == ([232], 232)


def test_the_maps_are_described_as_timm_does():
    backbone = snet.get_model(NAME, features_only=True)
    stem, *stages, _ = TABLES[0.5].channels
    assert backbone.feature_info.channels() == [stem, stem, *stages] and backbone.num_features == stages[-1]
    assert backbone.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert backbone.feature_info[2] == ("stage2", 48, 8)
    assert repr(backbone).endswith(
        "no classifier: features only; conv1 (24, 1/2), stem (24, 1/4), stage2 (48, 1/8), "
        "stage3 (96, 1/16), stage4 (192, 1/32)>"
    )
    small = snet.get_model(NAME, features_only=True, out_indices=[1, 2], in_chans=1, small_stem=True)
    assert small.feature_info.reduction() == [1, 2]
    _, maps = jax.eval_shape(small.module.apply, small.variables, np.zeros((1, 32, 48, 1), np.float32))
    assert {name: leaf.shape for name, leaf in maps.items()} == {"stem": (1, 32, 48, 24), "stage2": (1, 16, 24, 48)}


def assert_leaves_equal(ours, theirs):
    jax.tree.map(assert_array_equal, ours, theirs)


class Detector(nn.Module):
    """A network whose backbone is a module of its own."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, images, *, train=False):
        _, maps = self.backbone(images, train=train)
        fine, coarse = (nn.Conv(4, (1, 1), name=f"lateral_{name}")(x) for name, x in maps.items())
        return nn.Conv(1, (3, 3), name="head")(fine + jax.image.resize(coarse, fine.shape, "nearest"))


@pytest.mark.parametrize("frozen", [(), ("conv1", "stage2")])
def test_a_detector_trains_with_frozen_stages_and_batch_norms(frozen, saved):
    settings = {"features_only": True, "out_indices": (2, 3), "lowering": "reference"}
    module, variables = snet.load(saved["torchvision"], frozen=frozen, **settings)
    detector, images = Detector(module), np.float32(IMAGES) / 128 - 1
    fresh = jax.jit(detector.init)(jax.random.key(0), images)
    assert jax.tree.structure(fresh["params"]["backbone"]) == jax.tree.structure(variables["params"])
    params = {**fresh["params"], "backbone": variables["params"]}

    def kind(path, _):
        still = path[0].key == "backbone" and path[1].key.partition("_unit")[0] in frozen
        return "fixed" if still else "free"

    optimizer = optax.partition(
        {"free": optax.sgd(0.1), "fixed": optax.set_to_zero()}, lambda tree: jax.tree.map_with_path(kind, tree)
    )

    @jax.jit
    def train_step(params, batch_stats):
        def loss_of(params):
            state = {"params": params, "batch_stats": {"backbone": batch_stats}}
            scores, updates = detector.apply(state, images, train=True, mutable=["batch_stats"])
            return (scores**2).mean(), updates["batch_stats"]["backbone"]

        gradients, batch_stats = jax.grad(loss_of, has_aux=True)(params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return optax.apply_updates(params, updates), batch_stats

    params, batch_stats = train_step(params, variables["batch_stats"])
    for layer in ("conv1", "stage2_unit0", "stage2_unit1", "stage3_unit0"):
        still = layer.partition("_unit")[0] in frozen
        for before, after in (
            (variables["params"][layer], params["backbone"][layer]),
            (variables["batch_stats"][layer], batch_stats[layer]),
        ):
            same = jax.tree.leaves(jax.tree.map(np.array_equal, before, after))
            assert all(same) if still else not all(same), layer


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"features_only": True, "out_indices": ()}, r"out_indices is \(\), but must be some of 0 to 4"),
        ({"features_only": True, "out_indices": (5,)}, r"out_indices is \(5,\)"),
        ({"features_only": True, "out_indices": (-6,)}, r"out_indices is \(-6,\)"),
        ({"features_only": True, "out_indices": (3, 2)}, "ascending"),
        ({"features_only": True, "out_indices": (4, -1)}, "ascending"),
        ({"features_only": True, "out_indices": 3}, "must be a sequence of whole numbers"),
        ({"features_only": True, "out_indices": (1.5,)}, "must be a sequence of whole numbers"),
        ({"features_only": True, "num_classes": 3}, "leave num_classes and conv5 out"),
        ({"features_only": True, "conv5": True}, "leave num_classes and conv5 out"),
        ({"out_indices": (2,)}, "set features_only"),
        ({"outputs": ("stage2",)}, "there is no setting outputs"),
    ],
)
def test_maps_that_there_are_not_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        snet.get_model(NAME, **settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"outputs": ()}, "must be a tuple of some of conv1, stem"),
        ({"outputs": ("conv5",)}, "must be a tuple of some of conv1, stem"),
        ({"outputs": "stage2"}, "must be a tuple"),
        ({"outputs": ("stage2",), "conv5": True}, "set num_classes to 0 and conv5 to False"),
    ],
)
def test_modules_with_other_outputs_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        snet.ShuffleNetV2(**{"num_classes": 0, "conv5": False} | settings)
