"""Errors name their true cause: disks that are full, read-only or gone, caches, platforms, packages and arguments."""

import contextlib
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import GREY, ROOT
from numpy.testing import assert_array_equal
from PIL import Image

import shufflenet_jax as snet
from shufflenet_jax import checkpoint
from shufflenet_jax.commands import export, info, predict, prepare
from shufflenet_jax.data.archives import plain_tar
from shufflenet_jax.errors import InputError
from shufflenet_jax.files import hash_of
from shufflenet_jax.training.logs import MetricsLog

pytestmark = pytest.mark.usefixtures("three_units")

ROOM = 4_000_000  # Bytes of the small disk: a checkpoint of the small network, saved twice, has 2.1 MB.
ITEMS = (checkpoint.VARIABLES, checkpoint.OPTIMIZER)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, with room for one checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    if mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", place):
        pytest.skip("this process cannot mount a disk of its own")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def mount(*words):
    """Run mount; return its status."""
    if shutil.which("mount") is None:
        return 1
    return subprocess.run(["mount", *map(str, words)], check=False, stderr=subprocess.DEVNULL).returncode


@contextlib.contextmanager
def full(disk):
    """Fill a disk, but for a few bytes."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    (disk / "filler").unlink()


@contextlib.contextmanager
def read_only(disk):
    """Let a disk be read alone."""
    assert not mount("-o", "remount,ro", disk)
    yield
    assert not mount("-o", "remount,rw", disk)


STATES = {full: "No space left on device", read_only: "Read-only file system"}
unwritable = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


# Disks


@unwritable
def test_a_model_that_cannot_be_written_leaves_the_one_before(state, disk, variables):
    """Replace nothing, and leave nothing half-written."""
    checkpoint.save_model(disk / "model", GREY, variables)
    with state(disk), pytest.raises(InputError, match=f"model cannot be written: {STATES[state]}"):
        checkpoint.save_model(disk / "model", GREY, variables, overwrite=True)
    assert os.listdir(disk) == ["model"]
    jax.tree.map(assert_array_equal, checkpoint.load_directory(disk / "model")[1], variables)


def save_step(workdir, variables, step):
    """Save a checkpoint as a training does."""
    with checkpoint.TrainingCheckpoints(workdir, keep=3) as checkpoints:
        checkpoints.save(step, dict.fromkeys(ITEMS, variables))


@unwritable
def test_a_checkpoint_that_cannot_be_written_leaves_those_before(state, disk, variables):
    """Read the older checkpoint afterwards, and resume from it."""
    save_step(disk, variables, 1)
    with state(disk), pytest.raises(InputError, match="cannot be written"):
        save_step(disk, variables, 2)
    with checkpoint.TrainingCheckpoints(disk) as checkpoints:
        assert checkpoints.steps() == [1]
        for tree in checkpoints.restore(1, dict.fromkeys(ITEMS, variables)).values():
            jax.tree.map(assert_array_equal, tree, variables)


def test_a_workdir_that_is_removed_during_a_save_gives_one_line(variables, tmp_path):
    """Say that the checkpoint cannot be written; nothing else is left to lose."""
    workdir = tmp_path / "run"
    with pytest.raises(InputError, match="cannot be written"), checkpoint.TrainingCheckpoints(workdir) as checkpoints:
        checkpoints.save(1, dict.fromkeys(ITEMS, variables))
        shutil.rmtree(workdir, ignore_errors=True)
        checkpoints.save(2, dict.fromkeys(ITEMS, variables))
        shutil.rmtree(workdir, ignore_errors=True)


def test_a_log_that_cannot_be_written_ends_the_run_at_once(disk):
    """Never wait for a thread that the full disk has ended."""
    with (
        pytest.raises(InputError, match="cannot be written: No space left"),
        MetricsLog(disk, last_step=0) as log,
        full(disk),
    ):
        for step in range(1000):
            log.write(step=step, epoch=0.0, split="train", loss=1.0, top1=0.0, top5=0.0)


@unwritable
def test_a_file_that_cannot_be_written_is_named(state, disk, weights, call):
    """Do so for each command that writes one."""
    for form in ("safetensors", "torchvision"):
        with state(disk):
            status, _, stderr = call(export.main, weights, "--format", form, "--out", disk / "net")
        assert status == 2 and f"net cannot be written: {STATES[state]}" in stderr and not os.listdir(disk), stderr


@unwritable
def test_a_data_set_that_cannot_be_written_is_named(state, disk, tmp_path, call):
    """Stop in one line; the same command finishes once there is room."""
    (tmp_path / "images/val/cat").mkdir(parents=True)
    for name in "abc":
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/val/cat/{name}.png")
    argv = ("--source", tmp_path / "images", "--name", "pets", "--out", disk, "--processes", 1)
    with state(disk):
        status, _, stderr = call(prepare.main, *argv)
    assert status == 2 and STATES[state] in stderr and "Traceback" not in stderr, stderr
    assert call(prepare.main, *argv)[0] == 0


def test_what_a_full_disk_keeps_from_being_printed_is_an_error():
    """Report what /dev/full does to stdout, as a shell's > on a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as stdout:
        argv = [sys.executable, "-m", "shufflenet_jax", "models"]
        done = subprocess.run(argv, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "No space left on device" in lines[0], done.stderr


# Checkpoints


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("PERMISSION_DENIED: Error opening local file: [OS error 13: EACCES Permission denied]"),
        ValueError("UNKNOWN: Error reading local file: [OS error 5: EIO Input/output error]"),
        OSError("[Errno 24] Too many open files: '_METADATA'"),
        MemoryError(),
        ValueError("User-provided restore item and on-disk value metadata tree structures do not match: Diff"),
    ],
    ids=lambda failure: str(failure)[:20],
)
def test_what_reading_reports_of_the_system_is_not_called_damage(failure, tmp_path):
    """Blame the system or the settings, so that no sound checkpoint is set aside."""
    with pytest.raises(InputError) as caught:
        checkpoint._raise_unless_damage(tmp_path / "3/variables", failure)
    assert not isinstance(caught.value, checkpoint.DamagedError) and "damaged" not in str(caught.value)


def test_a_checkpoint_of_other_arrays_does_not_count_as_damaged(variables, tmp_path):
    """Keep resuming from setting it aside."""
    save_step(tmp_path, variables, 1)
    other = {"params": variables["params"]}
    longer = jax.tree.map(lambda leaf: np.zeros((*leaf.shape, 2), leaf.dtype), variables)
    with checkpoint.TrainingCheckpoints(tmp_path) as checkpoints:
        for tree in (other, longer):
            with pytest.raises(InputError, match="does not fit") as caught:
                checkpoints.restore(1, {checkpoint.VARIABLES: tree})
            assert not isinstance(caught.value, checkpoint.DamagedError)


def test_files_that_were_cut_are_damaged(variables, tmp_path):
    """Let resuming set such a checkpoint aside."""
    save_step(tmp_path, variables, 1)
    for path in (tmp_path / "checkpoints/1" / checkpoint.VARIABLES).rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:100])
    with checkpoint.TrainingCheckpoints(tmp_path) as checkpoints, pytest.raises(checkpoint.DamagedError):
        checkpoints.restore(1, {checkpoint.VARIABLES: variables})


@pytest.mark.parametrize(
    "contradiction", [{"width": 1.0}, {"layout": "megvii"}, {"small_stem": True}], ids=lambda given: next(iter(given))
)
def test_an_argument_that_contradicts_the_weights_is_named(contradiction, weights, variables, tmp_path):
    """Blame the argument, and not the file, in each form of a checkpoint."""
    checkpoint.save_model(tmp_path / "model", GREY, variables)
    name = next(iter(contradiction))
    for place in (tmp_path / "model", weights):
        with pytest.raises(InputError, match=f"{name} is .*, but the weights in .* have .*; leave {name} out"):
            snet.get_model(place, True, **contradiction)
        with pytest.raises(InputError, match=f"leave {name} out"):
            snet.load(place, **contradiction)
    own = {name: getattr(GREY, name) for name in contradiction}
    assert snet.get_model(tmp_path / "model", **own).info.num_classes == 3


# Caches


@pytest.fixture(params=["a file", "read-only", "full"])
def useless_cache(request, tmp_path, monkeypatch):
    """A cache folder that takes nothing."""
    place = tmp_path / "cache"
    if request.param == "a file":
        place.touch()
        monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(place))
        yield place
        return
    disk = request.getfixturevalue("disk")
    monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(disk / "cache"))
    with (read_only if request.param == "read-only" else full)(disk):
        yield disk / "cache"


def test_a_file_is_converted_in_memory_where_the_cache_takes_nothing(useless_cache, weights, call):
    """Predict all the same, and name the variable that chooses another cache."""
    status, stdout, stderr = call(info.main, "--checkpoint", weights, "--json")
    assert status == 0 and stdout.startswith("{"), stderr
    warnings = [line for line in stderr.splitlines() if "converted each time" in line]
    assert len(warnings) == 1 and f"the cache {useless_cache}" in warnings[0], stderr
    assert "SHUFFLENET_JAX_CACHE" in warnings[0]


def test_a_published_file_is_downloaded_into_memory_where_the_cache_takes_nothing(useless_cache, weights, monkeypatch):
    """Load it from a mirror."""
    from shufflenet_jax import published

    entry = published.PUBLISHED["shufflenet_v2_x0_5"]._replace(file=weights.name, sha256=hash_of(weights)[:8])
    monkeypatch.setitem(published.PUBLISHED, "shufflenet_v2_x0_5", entry)
    monkeypatch.setenv(published.MIRROR, weights.parent.as_uri())
    assert snet.get_model("shufflenet_v2_x0_5", True).info.num_classes == 10


def test_a_compressed_tar_names_the_cache_that_it_needs(useless_cache, tmp_path):
    """Say which variable chooses another one."""
    (tmp_path / "data.bin").write_bytes(np.random.default_rng(0).bytes(100_000))
    subprocess.run(["tar", "-czf", "data.tar.gz", "data.bin"], cwd=tmp_path, check=True)
    with pytest.raises(InputError, match=r"the cache .* cannot be written: .*SHUFFLENET_JAX_CACHE"):
        plain_tar(tmp_path / "data.tar.gz")


def test_commands_compile_in_memory_where_the_cache_takes_nothing(tmp_path):
    """Warn once, in one line, and do the work."""
    (tmp_path / "cache").touch()
    environment = {**os.environ, "SHUFFLENET_JAX_CACHE": str(tmp_path / "cache")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    argv = [sys.executable, "-m", "shufflenet_jax", "plot", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    warning, error = done.stderr.strip().splitlines()
    assert warning.startswith("warning: the cache ") and "SHUFFLENET_JAX_CACHE" in warning and "holds no" in error


# Packages


@pytest.mark.parametrize(
    ("package", "main", "argv"),
    [
        ("onnx", export.main, ("NET", "--format", "onnx", "--out", "OUT")),
        ("ai_edge_litert", export.main, ("NET", "--format", "tflite", "--out", "OUT")),
        ("matplotlib", predict.main, ("IMAGE", "--checkpoint", "NET", "--save-picture", "OUT")),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_missing_package_is_named(package, main, argv, weights, tmp_path, monkeypatch, refused):
    """Give one line that names the package, and leave no file."""
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    places = {"NET": weights, "OUT": tmp_path / "out", "IMAGE": tmp_path / "image.png"}
    assert snet.get_model(weights)  # Converted, with its warnings, while all packages are there.
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("plots", *(f"exports.{name}" for name in ("graph", "runtime", "stablehlo", "tflite", "litert"))):
        monkeypatch.delitem(sys.modules, f"shufflenet_jax.{name}", raising=False)
    assert package in refused(main, *(places.get(word, word) for word in argv)).split(": ", 1)[1]
    assert os.listdir(tmp_path) == ["image.png"]


def test_a_process_without_pytorch_says_so(weights, tmp_path):
    """Name it where a command cannot even begin without it."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from shufflenet_jax.__main__ import main; from shufflenet_jax.commands.console import run\n"
        "sys.exit(run(main, sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, "convert", str(weights), "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "pip install 'shufflenet_jax[torch]'" in lines[0], done.stderr
