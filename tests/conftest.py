"""Switches of the whole suite, and the real data that some tests need."""

import copyreg
import json
import os
import sys
import weakref
from pathlib import Path

ROOT = Path(__file__).parent.parent
# One compilation cache for this process and all that the tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# The tests compile more than they compute: without optimizations a training step compiles in half the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# libtpu, which compiles for TPUs that are not here, reports at length in each process that looks for them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# PyTorch's threads wait busily for each other: beside another test's work they take thirty times as long as one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT))

import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

# Modules imported from here on check the types and shapes of arguments and results. As in PEP 484, an int is a float.
jaxtyping.install_import_hook("shufflenet_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
# Grain sends functions to worker processes. jaxtyping keeps a weak reference in each, which pickle does not support.
copyreg.pickle(weakref.ReferenceType, lambda reference: (weakref.ref, (reference(),)))

from small_training import few_units

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

from shufflenet_jax import checkpoint, published
from shufflenet_jax.architecture import TABLES
from shufflenet_jax.commands.console import run
from shufflenet_jax.config import DIGITS_EVAL, ModelInfo, Preprocess, TrainConfig
from shufflenet_jax.files import hash_of
from shufflenet_jax.model import ShuffleNetV2, variable_shapes
from shufflenet_jax.porting import dialects

# Users set the fields of these. They check them by themselves, with a message of one line.
for kind in (ModelInfo, Preprocess, ShuffleNetV2, TrainConfig):
    kind.__init__.__no_type_check__ = True

SHARED = Path(os.environ.get("SHUFFLENET_JAX_SHARED", ROOT.parent / "shared" / "data"))


def pytest_collection_modifyitems(items):
    if not SHARED.is_dir():
        reason = f"no real images and weights at {SHARED}; SHUFFLENET_JAX_SHARED names another place"
        for item in items:
            if item.get_closest_marker("real_data"):
                item.add_marker(pytest.mark.skip(reason=reason))
    # The long files first, so that no process has one left when the others are done.
    items.sort(key=lambda item: item.path.stem not in {"test_hosts", "test_convert", "test_loop", "test_step"})


@pytest.fixture(scope="session")
def shared():
    """The folder of real data."""
    return SHARED


@pytest.fixture
def x64():
    """float64 throughout the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Converted weights never go to the user's cache."""
    monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def lively_network(dialect, table=0.5, num_classes=10, *, seed=0, **settings):
    """A PyTorch network of a width or Table with random weights and statistics, whose outputs differ between images."""
    import torch  # An extra: some tests run where only the core is installed.

    from shufflenet_jax.porting import reference

    generator = torch.Generator().manual_seed(seed)
    network = reference.NETWORKS[dialect](TABLES.get(table, table), num_classes, **settings)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.momentum = 1.0  # The statistics become those of the batch below.
            elif hasattr(module, "weight"):
                fan = module.weight[0].numel()
                module.weight.normal_(0, fan**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(generator=generator)
        network.train()(torch.randn(8, settings.get("in_chans", 3), 64, 64, generator=generator))
    return network.eval()


def convert_network(network, dialect):
    """(module, variables) of a PyTorch network of the reference."""
    rules = dialects.DIALECTS[dialect]
    tensors = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    module = dialects.module_for(tensors, rules)
    return module, dialects.from_torch(tensors, rules, module)[0]


@pytest.fixture(scope="module")
def three_units():
    """Networks have a unit in each stage throughout the module."""
    with few_units(stage2=1):
        yield


GREY = ModelInfo(width=0.5, layout="torchvision", num_classes=3, preprocess=DIGITS_EVAL, in_chans=1)


@pytest.fixture(scope="module")
def variables(three_units):
    """Variables of the network that GREY describes; random, so that they do not compress."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), variable_shapes(checkpoint.module_of(GREY)))


@pytest.fixture(scope="module")
def weights(three_units, tmp_path_factory):
    """A PyTorch file of a random 0.5x network."""
    import torch

    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(lively_network("torchvision").state_dict(), path)
    return path


@pytest.fixture
def card_at_hand(shared, monkeypatch):
    """The file from which the card's published model is "downloaded" in the test: that of the real weights."""
    weights = shared / "weights/shufflenet_v2_x1_0_mmpretrain.pth"
    entry = published.find(published.CARD)._replace(file=weights.name, sha256=hash_of(weights)[:8])
    monkeypatch.setitem(published.PUBLISHED, published.CARD, entry)
    monkeypatch.setenv(published.MIRROR, weights.parent.as_uri())
    return weights


@pytest.fixture
def call(capfd):
    """Runs a command's main as a process would: `call(main, argv)` -> (exit status, stdout, stderr)."""

    def call(main, *argv):
        capfd.readouterr()
        status = run(main, [str(word) for word in argv])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def refused(call):
    """Asserts that a command ends with one `error:` line and status 2; returns the line."""

    def refused(main, *argv):
        status, _, stderr = call(main, *argv)
        lines = stderr.strip().splitlines()
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (status, stderr)
        return lines[0]

    return refused


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory):
    """A model directory of a random 0.5x network with ten classes, and class folders of images for it."""
    import torch

    from shufflenet_jax.commands import from_torch

    root = tmp_path_factory.mktemp("ten")
    network = lively_network("mmpretrain")
    meta = {"CLASSES": tuple(f"kind{i}" for i in range(10))}
    torch.save({"meta": meta, "state_dict": network.state_dict()}, root / "net.pth")
    assert from_torch.main([str(root / "net.pth"), "--out", str(root / "model"), "--no-verify"]) == 0
    rng = np.random.default_rng(0)
    for i in range(6):
        (root / f"data/val/kind{i}").mkdir(parents=True)
        for j in range(2):
            pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((300, 260)).save(root / f"data/val/kind{i}/{j}.JPEG")
    return root / "model", root / "data"


def figures_of(stdout):
    return json.loads(stdout.splitlines()[-1])
