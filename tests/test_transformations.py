"""The network under JAX's transformations, and what importing the package and `enable_compilation_cache` change."""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import shufflenet_jax as snet
from shufflenet_jax import lowerings
from shufflenet_jax.batch_groups import BatchGroups
from shufflenet_jax.model import ConvBN, ShuffleNetV2

ROOT = Path(__file__).parent.parent
SHARDS, ROWS, RATE = 4, 6, 0.1


@pytest.fixture(autouse=True)
def float64():
    """Rounding stays far below any fault."""
    with jax.enable_x64(True):
        yield


class Layers(nn.Module):
    """A layer of every kind that the network has, on few channels, for it compiles a dozen times."""

    lowering: str
    train: bool

    @nn.compact
    def __call__(self, images, batch_groups):
        lower = lowerings.resolve(self.lowering)
        settings = {"train": self.train, "dtype": images.dtype, "lowering": self.lowering}
        x = ConvBN(6, 3, stride=2, **settings)(lower.from_nhwc(images), batch_groups)
        x = ConvBN(6, 3, stride=2, groups=6, relu=False, **settings)(lower.max_pool(x), batch_groups)
        x = ConvBN(8, 1, **settings)(x, batch_groups)
        return lower.global_mean(ConvBN(8, 3, groups=8, **settings)(x, batch_groups))


def loss(variables, batch, *, lowering="cpu", train=True, grouped=False):
    """Return the loss of a batch (images, targets) and the new running statistics."""
    images, targets = batch
    # Two groups that share statistics, one of them with padding, which has no part in a loss.
    real = np.array([1.0, 1, 0, 1, 1, 1]) if grouped else np.ones(ROWS)
    groups = BatchGroups(size=3, mask=real) if grouped else BatchGroups()
    outputs, statistics = Layers(lowering, train).apply(variables, images, groups, mutable=["batch_stats"])
    return (jnp.square(outputs - targets) * real[:, None]).mean(), statistics


def differentiate(function):
    """Return a function of variables and batch: ((loss, statistics), gradients of variables and batch)."""
    return jax.value_and_grad(function, (0, 1), has_aux=True)


# Four batches and two networks; what is expected of them: the reference lowering, batch by batch.


@cache
def networks():
    """Return the variables of two networks, stacked."""
    images = jax.ShapeDtypeStruct((ROWS, 19, 18, 3), jnp.float64)
    shapes = jax.eval_shape(Layers("reference", True).init, jax.random.key(0), images, BatchGroups())
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, (2, *leaf.shape)), shapes)  # Variances must be positive.


@cache
def batches():
    """Return the images and targets of SHARDS batches, stacked."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(SHARDS, ROWS, 19, 18, 3)), rng.normal(size=(SHARDS, ROWS, 8))


def taken(tree, place):
    return jax.tree.map(lambda leaf: leaf[place], tree)


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def joined(tree):
    """Join the batches to one, which a mesh divides again."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


@cache
def plainly(**settings):
    return jax.jit(differentiate(partial(loss, **{**settings, "lowering": "reference"})))


@cache
def one_by_one(network=0, **settings):
    """Return the results of all batches, stacked."""
    return stacked([plainly(**settings)(taken(networks(), network), taken(batches(), i)) for i in range(SHARDS)])


def averaged(results):
    """Return what data-parallel training makes of them: the mean loss, its gradients, and mean statistics."""
    (value, statistics), (weights, batch) = results
    statistics, weights = jax.tree.map(lambda leaf: np.mean(leaf, 0), (statistics, weights))
    return (np.mean(value), statistics), (weights, jax.tree.map(lambda leaf: leaf / SHARDS, batch))


def averaged_over_rows(results):
    value, (weights, batch) = averaged(results)
    return value, (weights, joined(batch))


def descend(variables, statistics, gradients):
    params = jax.tree.map(lambda leaf, slope: leaf - RATE * slope, variables["params"], gradients["params"])
    return {"params": params, **statistics}


def assert_same(ours, theirs):
    for (path, mine), exact in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        # Sums of some thousand float64 numbers in another order, in five layers one after another.
        tolerance = 1e-10 * max(np.abs(exact).max(), 1e-3)
        assert_allclose(mine, exact, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


# The transformations of the lowerings with gradients of their own.


def averaged_loss(axes, **settings):
    """Return the loss of one device, averaged over the axes of a mesh."""
    return lambda variables, batch: lax.pmean(loss(variables, batch, **settings), axes)


def on_mesh(function, axes, sizes, out_specs, kind=AxisType.Auto):
    """Run a function of variables, which all devices share, and of batches, of which each takes a part."""
    mesh = jax.make_mesh(sizes, axes, (kind,) * len(axes))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(P(), P(axes)), out_specs=out_specs)
    variables = jax.device_put(taken(networks(), 0), NamedSharding(mesh, P()))
    return mapped, variables, partial(jax.device_put, device=NamedSharding(mesh, P(axes)))


def shard_map(axes=("rows",), sizes=(SHARDS,), kind=AxisType.Auto, wrap=lambda function: function, **settings):
    """Differentiate within shard_map."""
    function = differentiate(wrap(averaged_loss(axes, **settings)))
    mapped, variables, put = on_mesh(function, axes, sizes, ((P(), P()), (P(), P(axes))), kind)
    return jax.jit(mapped)(variables, put(joined(batches()))), averaged_over_rows(one_by_one(**settings))


def gradients_of_shard_map():
    mapped, variables, put = on_mesh(averaged_loss("rows"), ("rows",), (SHARDS,), (P(), P()))
    return jax.jit(differentiate(mapped))(variables, put(joined(batches()))), averaged_over_rows(one_by_one())


def vmap_in_shard_map():
    """Let each device take two batches with statistics of their own."""

    def function(variables, batches):
        def mean_loss(variables, batches):
            results = jax.vmap(loss, (None, 0))(variables, batches)
            return lax.pmean(jax.tree.map(lambda leaf: leaf.mean(0), results), "batches")

        return differentiate(mean_loss)(variables, batches)

    mapped, variables, put = on_mesh(function, ("batches",), (2,), ((P(), P()), (P(), P("batches"))))
    return jax.jit(mapped)(variables, put(batches())), averaged(one_by_one())


def scan_in_shard_map():
    """Take two steps of training on four devices."""

    def function(variables, batch):
        def step(variables, _):
            (value, statistics), (gradients, _) = differentiate(averaged_loss("rows"))(variables, batch)
            return descend(variables, statistics, gradients), value

        return lax.scan(step, variables, length=2)

    mapped, variables, put = on_mesh(function, ("rows",), (SHARDS,), (P(), P()))
    ours = jax.jit(mapped)(variables, put(joined(batches())))
    theirs, values = taken(networks(), 0), []
    for _ in range(2):
        results = stacked([plainly()(theirs, taken(batches(), place)) for place in range(SHARDS)])
        (value, statistics), (gradients, _) = averaged(results)
        theirs = descend(theirs, statistics, gradients)
        values.append(value)
    return ours, (theirs, np.array(values))


def scan():
    """Take a step of training for each batch."""

    def step(variables, batch):
        (value, statistics), (gradients, _) = differentiate(loss)(variables, batch)
        return descend(variables, statistics, gradients), value

    ours = jax.jit(partial(lax.scan, step))(taken(networks(), 0), batches())
    theirs, values = taken(networks(), 0), []
    for place in range(SHARDS):
        (value, statistics), (gradients, _) = plainly()(theirs, taken(batches(), place))
        theirs = descend(theirs, statistics, gradients)
        values.append(value)
    return ours, (theirs, np.array(values))


def vmap_over_networks():
    mapped = jax.vmap(differentiate(loss), (0, None))
    return jax.jit(mapped)(networks(), taken(batches(), 0)), stacked([taken(one_by_one(k), 0) for k in range(2)])


def gradients_of_vmap(**settings):
    def mean_loss(variables, batches):
        mapped = jax.vmap(partial(loss, **settings), (None, 0))
        return jax.tree.map(lambda leaf: leaf.mean(0), mapped(variables, batches))

    return jax.jit(differentiate(mean_loss))(taken(networks(), 0), batches()), averaged(one_by_one())


def checkpoint(**settings):
    function = differentiate(jax.checkpoint(loss, **settings))
    return jax.jit(function)(taken(networks(), 0), taken(batches(), 0)), taken(one_by_one(), 0)


TRANSFORMATIONS = {
    "shard_map": shard_map,
    "checkpoint in shard_map over two explicit axes": partial(
        shard_map, ("hosts", "rows"), (2, 2), AxisType.Explicit, jax.checkpoint
    ),
    "shard_map with groups and padding": partial(shard_map, grouped=True),
    "shard_map with running statistics": partial(shard_map, train=False),
    "gradients of shard_map": gradients_of_shard_map,
    "vmap in shard_map": vmap_in_shard_map,
    "scan in shard_map": scan_in_shard_map,
    "scan": scan,
    "vmap over networks": vmap_over_networks,
    "gradients of vmap": gradients_of_vmap,
    "checkpoint": partial(checkpoint, policy=jax.checkpoint_policies.dots_saveable),
    "shard_map with groups and padding, on GPUs": partial(shard_map, grouped=True, lowering="gpu"),
    "gradients of vmap, on GPUs": partial(gradients_of_vmap, lowering="gpu"),
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_transformations_of_lowerings_with_gradients_of_their_own_give_the_numbers_and_gradients_of_the_reference(
    transformation,
):
    assert_same(*TRANSFORMATIONS[transformation]())


@pytest.mark.parametrize("settings", [{}, {"remat": True, "dropout": 0.2, "layout": "megvii"}], ids=["default", "all"])
def test_the_whole_network_can_be_differentiated_in_shard_map(settings):
    """The types of all layers fit; the numbers are those of the layers above."""
    module = ShuffleNetV2(width=0.5, repeats=(2, 1, 1), num_classes=10, lowering="cpu", **settings)
    images, keys = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32), {"dropout": jax.random.key(0)}
    variables = jax.eval_shape(module.init, jax.random.key(0), images)

    def step(params, batch_stats, images):
        def mean_loss(params):
            stored = {"params": params, "batch_stats": batch_stats}
            (logits, _), statistics = module.apply(stored, images, train=True, mutable=["batch_stats"], rngs=keys)
            return lax.pmean((jax.nn.logsumexp(logits), statistics), "rows")

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    mesh = jax.make_mesh((SHARDS,), ("rows",), (AxisType.Auto,))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("rows")), out_specs=P())
    (_, statistics), gradients = jax.eval_shape(mapped, variables["params"], variables["batch_stats"], images)
    assert {"params": gradients, **statistics} == variables


# Forward mode.


def scaled(variables, batch, lowering, factor):
    """Return the loss as a function of one number, by which all variables and images are multiplied."""
    return loss(*jax.tree.map(lambda leaf: leaf * factor, (variables, batch)), lowering=lowering)[0]


FORWARD = {
    "jvp": lambda function: jax.jvp(function, (1.0,), (1.0,))[1],
    "jvp in jit": lambda function: jax.jit(lambda x: jax.jvp(function, (x,), (1.0,))[1])(1.0),
    "jvp of jit": lambda function: jax.jvp(jax.jit(function), (1.0,), (1.0,))[1],
    "jacfwd": lambda function: jax.jacfwd(function)(1.0),
    "linearize": lambda function: jax.linearize(jax.jit(function), 1.0)[1](1.0),
}


@pytest.mark.parametrize("way", ["jvp in jit", "jvp of jit"])
def test_forward_mode_of_the_reference_lowering_gives_the_derivative_of_its_gradients(way):
    variables, batch = taken(networks(), 0), taken(batches(), 0)
    slope = FORWARD[way](partial(scaled, variables, batch, "reference"))
    _, gradients = taken(one_by_one(), 0)
    products = jax.tree.map(lambda *pair: np.vdot(*pair), gradients, (variables, batch))
    assert_allclose(slope, sum(jax.tree.leaves(products)), rtol=1e-10)  # Sums in another order, as above.


@pytest.mark.parametrize("way", FORWARD)
def test_forward_mode_of_the_cpu_lowering_names_the_lowering_that_has_it(way):
    with pytest.raises(TypeError, match='use lowering="reference"'):
        FORWARD[way](partial(scaled, taken(networks(), 0), taken(batches(), 0), "cpu"))


@pytest.mark.parametrize("part", ["params", "images"])
def test_forward_mode_of_a_part_of_the_arguments_names_the_lowering_that_has_it(part):
    variables, (images, targets) = taken(networks(), 0), taken(batches(), 0)
    ways = {
        "params": (lambda params: loss({**variables, "params": params}, (images, targets))[0], variables["params"]),
        "images": (lambda images: loss(variables, (images, targets))[0], images),
    }
    function, argument = ways[part]
    with pytest.raises(TypeError, match='use lowering="reference"'):
        jax.jvp(function, (argument,), (argument,))


# Settings of the process.


def run_python(script, *arguments, **environment):
    usual = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        **{"cwd": ROOT, "env": usual | environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


AFTER_A_COMPILATION = """
import jax, jax.numpy as jnp
jax.jit(lambda x: x + 1)(jnp.ones(3))
import shufflenet_jax as snet
snet.enable_compilation_cache()
jax.jit(lambda x: jnp.sin(x) * 2)(jnp.ones(3))
"""
BEFORE_JAX = """
import sys
import shufflenet_jax as snet
snet.enable_compilation_cache()
assert "jax" not in sys.modules
import jax
print(jax.config.jax_compilation_cache_dir)
"""


def test_the_compilation_cache_works_after_compilations(tmp_path):
    run_python(AFTER_A_COMPILATION, SHUFFLENET_JAX_CACHE=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert any(path.name.startswith("jit__lambda") for path in (tmp_path / "compiled").iterdir())


def test_the_compilation_cache_is_chosen_without_importing_jax(tmp_path):
    assert run_python(BEFORE_JAX, SHUFFLENET_JAX_CACHE=str(tmp_path)).strip() == str(tmp_path / "compiled")


def test_a_compilation_cache_that_is_set_already_stays(tmp_path):
    before = run_python(BEFORE_JAX, JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert before.strip() == str(tmp_path)
    usual = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        snet.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", usual)


# Libraries change settings themselves: they are imported before the first look.
LOOKS = """
import importlib, logging, os, pkgutil, random, signal, sys, warnings

for library in sys.argv[1:]:
    importlib.import_module(library)
import cv2, jax, numpy as np, PIL.Image, PIL.ImageFile

cv2.setNumThreads(2)
with_loggers = logging.Logger.manager.loggerDict

def look():
    loggers = {name: (it.level, list(it.handlers), it.propagate, it.disabled) for name, it in with_loggers.items()
               if isinstance(it, logging.Logger)}
    root = logging.getLogger()
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "JAX": dict(jax.config.values),
        "warnings": list(warnings.filters),
        "loggers": (loggers, root.level, list(root.handlers), logging.root.manager.disable),
        "OpenCV": cv2.getNumThreads(),
        "Pillow": (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES),
        "NumPy": (np.geterr(), np.get_printoptions()),
        "random numbers": (random.getstate(), [str(part) for part in np.random.get_state()]),
        "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "recursion": sys.getrecursionlimit(),
    }

before = look()
import shufflenet_jax
own = [module.name for module in pkgutil.walk_packages(shufflenet_jax.__path__, "shufflenet_jax.")]
for name in own:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert len(own) > 50 and not any(name.startswith("shufflenet_jax") for name in before["loggers"][0])
after = look()
for name in after["loggers"][0].keys() - before["loggers"][0].keys():  # Ours, and those of libraries' further modules.
    state = after["loggers"][0].pop(name)
    assert state == (logging.NOTSET, [], True, False) or not name.startswith("shufflenet_jax"), (name, state)
for name in before:
    assert before[name] == after[name], (name, before[name], after[name])
"""
LIBRARIES = (
    *("jax", "flax.linen", "optax", "orbax.checkpoint", "grain", "absl.flags", "cv2", "PIL.Image", "PIL.ImageOps"),
    *("simplejpeg", "tensorflow_datasets", "matplotlib.figure", "tqdm", "torch", "jax.experimental.multihost_utils"),
    *("scipy.special", "scipy.stats"),
)


def test_importing_the_package_changes_no_setting_of_the_process():
    run_python(LOOKS, *LIBRARIES)
