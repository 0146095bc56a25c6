"""Which runs continue, on which data, and how far: tests/workdir_changes.py has the changes, tests/slow/ tries all."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
import workdir_changes
from numpy.testing import assert_array_equal

from shufflenet_jax import checkpoint
from shufflenet_jax.commands import info, to_torch, train
from shufflenet_jax.commands.console import run
from shufflenet_jax.config import DIGITS_EVAL, ModelInfo
from shufflenet_jax.data import fingerprint, sources
from shufflenet_jax.errors import InputError
from shufflenet_jax.loading import load_model

pytestmark = pytest.mark.usefixtures("three_units")

# Refusals take a moment; of what continues, and so compiles, one each of the same and of accepted data. Older workdirs
# are those of test_compatibility.py.
CONTINUED = ("another path", "a removed evaluation image, accepted")
QUICK = [
    name
    for name, change in workdir_changes.CHANGES.items()
    if change.base == "stopped" and (not change.resumes or name in CONTINUED)
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a training that was stopped."""
    return workdir_changes.make_base("stopped", tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("name", QUICK)
def test_a_change_is_refused_and_every_byte_kept_or_the_run_continues(name, stopped, tmp_path, capfd):
    workdir_changes.assert_handled(name, stopped, tmp_path, capfd)


# Fingerprints


def source_of(count=20, **changes):
    """A Source of examples that nobody reads."""
    traits = tuple((f"cat/{i}.jpg", 100 + i, i % 2) for i in range(count))
    settings = {"size": count, "read": pytest.fail, "num_classes": 2, "classes": ("cat", "dog"), "labels": tuple}
    return sources.Source(**{**settings, "traits": lambda: traits, **changes})


@pytest.mark.parametrize(
    "other",
    [
        {"count": 21},
        {"classes": ("cat", "dogs")},
        {"classes": None},
        {"num_classes": 3},
        {"traits": lambda: reversed(source_of().traits())},
        {"traits": lambda: ((name, size + 1, label) for name, size, label in source_of().traits())},
        {"traits": lambda: ((name, size, 1 - label) for name, size, label in source_of().traits())},
    ],
)
def test_every_trait_of_the_data_has_a_part_in_the_fingerprint(other):
    first = fingerprint.take_fingerprint(source_of())
    assert first == fingerprint.take_fingerprint(source_of()) and first.examples == 20
    assert first.sha256 != fingerprint.take_fingerprint(source_of(**other)).sha256


def test_names_in_another_unicode_form_are_the_same_names():
    forms = ("gr\u00f6\u00dfe.jpg", "gro\u0308\u00dfe.jpg")
    first, second = (fingerprint.take_fingerprint(source_of(traits=lambda name=name: [(name, 1, 0)])) for name in forms)
    assert first == second


def test_the_digits_have_one_fingerprint_for_all_time():
    assert fingerprint.take_fingerprint(sources.open_source("digits", "train")).examples == 1438


def test_the_names_of_a_large_data_set_take_a_moment():
    traits = [(f"n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG", 110_000 + i, i % 1000) for i in range(128_000)]
    began = time.process_time()
    fingerprint.take_fingerprint(source_of(traits=lambda: traits))
    # A tenth of ImageNet: 0.3 s; the whole of it stays far below a minute also on a machine that is ten times slower.
    assert time.process_time() - began < 4


# Longer runs


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The folder of a training `run` of 1 epoch of a constant rate that has grown to 2, and of one of 2, `straight`."""
    folder = workdir_changes.make_base("constant", tmp_path_factory.mktemp("grown"))
    assert continued(folder, "--epochs", 2) == continued(folder, "--epochs", 2, "--workdir", "straight") == 0
    return folder


def continued(folder, *words):
    """Run the command of the base again with other options; return the exit status."""
    with workdir_changes.in_folder(folder):
        argv = (*workdir_changes.OPTIONS, *workdir_changes.BASES["constant"][0], *words)
        return run(train.main, [str(word) for word in argv])


def state_of(workdir, step):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        folder = workdir / f"checkpoints/{step}"
        return [checkpointer.restore(folder / name) for name in ("variables", "optimizer")]


def test_a_run_of_a_constant_rate_that_grows_ends_as_one_that_was_as_long_from_the_start(grown):
    jax.tree.map(assert_array_equal, state_of(grown / "run", 6), state_of(grown / "straight", 6))
    record = json.loads((grown / "run/config.json").read_text())
    assert record["settings"]["epochs"] == 1 and record["resumed"] == [{"settings": {"epochs": 2}}]


def test_a_run_that_has_grown_is_the_longer_one_from_then_on(grown, capfd):
    before = workdir_changes.contents_of(grown / "run")
    assert continued(grown) == 2
    assert "holds a run of 2 epochs, which cannot shrink to 1" in capfd.readouterr().err
    assert workdir_changes.contents_of(grown / "run") == before


# Numbered checkpoints


@pytest.mark.parametrize("step", [3, 6])
def test_a_numbered_checkpoint_is_a_checkpoint(step, grown, tmp_path, call):
    place = grown / f"run/checkpoints/{step}"
    _, variables, found = load_model(place)
    assert found == checkpoint.read_info(grown / "run")
    jax.tree.map(assert_array_equal, variables, state_of(grown / "run", step)[0])
    (tmp_path / "link").symlink_to(place)
    jax.tree.map(assert_array_equal, load_model(tmp_path / "link")[1], variables)
    status, out, stderr = call(info.main, "--checkpoint", place)
    assert status == 0 and out, stderr
    target = tmp_path / "net.pth"
    assert call(to_torch.main, place, "--dialect", "torchvision", "--out", target)[0] == 0 and target.exists()


@pytest.mark.parametrize("place", ["checkpoints/4", "checkpoints"])
def test_other_places_in_a_workdir_are_refused(place, grown, refused):
    assert "no model at" in refused(info.main, "--checkpoint", grown / "run" / place)


# Hashes


@pytest.fixture
def saved(tmp_path):
    """The workdir of two checkpoints, of a network of 2 and of 3, and the trees of the second."""
    described = ModelInfo(width=0.5, layout="torchvision", num_classes=10, preprocess=DIGITS_EVAL, in_chans=1)
    module = checkpoint.module_of(described)
    shapes = checkpoint.variable_shapes(module)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model.json").write_text(described.to_json())
    with checkpoint.TrainingCheckpoints(tmp_path / "run", keep=2) as checkpoints:
        for step in (2, 3):
            tree = jax.tree.map(lambda leaf, step=step: np.full(leaf.shape, step, leaf.dtype), shapes)
            average = jax.tree.map(lambda leaf: leaf / 2, tree)
            checkpoints.save(step, {checkpoint.VARIABLES: tree, checkpoint.EMA: average})
    return tmp_path / "run", tree


def test_a_training_checkpoint_has_the_hash_of_its_numbers(saved):
    workdir, tree = saved
    stored = json.loads((workdir / "checkpoints/3/_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert stored["sha256"].keys() == {"variables", "ema"}
    assert stored["sha256"]["variables"] == checkpoint.hash_of_variables(tree)
    for place, ema, value in (("", False, 3), ("checkpoints/2", False, 2), ("checkpoints/2", True, 1)):
        assert (load_model(workdir / place, ema=ema)[1]["params"]["fc"]["bias"] == value).all()


@pytest.mark.parametrize("place", ["", "checkpoints/3"])
def test_other_numbers_than_those_that_were_saved_are_noticed(place, saved):
    workdir, _ = saved
    shutil.rmtree(workdir / "checkpoints/3/variables")
    shutil.copytree(workdir / "checkpoints/2/variables", workdir / "checkpoints/3/variables")
    with pytest.raises(InputError, match="its numbers are not those that were saved"):
        load_model(workdir / place)


def test_a_checkpoint_without_a_hash_is_read_and_one_with_a_damaged_one_is_not(saved):
    workdir, _ = saved
    path = workdir / "checkpoints/3/_CHECKPOINT_METADATA"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "custom_metadata": {}}))
    load_model(workdir / "checkpoints/3")
    path.write_text(json.dumps(stored)[:40])
    with pytest.raises(InputError, match="is damaged: _CHECKPOINT_METADATA cannot be read"):
        load_model(workdir / "checkpoints/3")


def test_a_network_of_float64_is_read_in_float32(saved):
    workdir, tree = saved
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.full(leaf.shape, 1 / 3, np.float64), tree)
        with checkpoint.TrainingCheckpoints(workdir, keep=2) as checkpoints:
            checkpoints.save(4, {checkpoint.VARIABLES: wide})
    bias = load_model(workdir / "checkpoints/4")[1]["params"]["fc"]["bias"]
    assert bias.dtype == np.float32 and (bias == np.float32(1 / 3)).all()
