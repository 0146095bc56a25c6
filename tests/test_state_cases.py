"""Where results go and what computes them: paths with special characters, buckets, platforms that are not there."""

import gc
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from small_training import TINY_TABLE

from shufflenet_jax.commands import from_torch, info, prepare, train
from shufflenet_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("three_units")

DIGITS = (
    *("--config", "digits", "--image-size", 16, "--batch-size", 8),
    *("--lowering", "reference", "--steps", 1, *TINY_TABLE),
)


# Paths with special characters

special_names = pytest.mark.parametrize("name", ["run[lr=0.1]", "back\\slash"])


@pytest.fixture(scope="module")
def trained_in(tmp_path_factory):
    """`trained_in(name)`: a workdir of this name after a training of one step, and its status. Trains once a name."""
    outcomes = {}

    def trained_in(name):
        if name not in outcomes:
            workdir = tmp_path_factory.mktemp("trained") / name
            try:
                outcomes[name] = workdir, train.main([str(word) for word in (*DIGITS, "--workdir", workdir)])
            except InputError:
                outcomes[name] = workdir, 2
        return outcomes[name]

    return trained_in


@special_names
def test_a_training_can_be_read_or_is_refused_before_the_first_step(name, trained_in, call):
    """Leave a checkpoint that other commands read, or leave nothing."""
    workdir, status = trained_in(name)
    if status == 2:
        assert not (workdir / "checkpoints").exists()
    else:
        status, _, stderr = call(info.main, "--checkpoint", workdir)
        assert status == 0, stderr


@special_names
def test_a_training_can_go_on_or_is_refused_before_the_first_step(name, trained_in, call):
    """Find the run finished when the same command comes again."""
    workdir, status = trained_in(name)
    if status == 2:
        assert not (workdir / "checkpoints").exists()
    else:
        status, _, stderr = call(train.main, *DIGITS, "--workdir", workdir)
        assert status == 0, stderr


@special_names
def test_a_converted_model_can_be_read_or_is_refused(name, weights, tmp_path, call):
    """Leave a model that other commands read, or leave nothing."""
    status, _, stderr = call(from_torch.main, weights, "--out", tmp_path / name, "--no-verify")
    if status == 2:
        assert stderr.startswith("error: ") and not (tmp_path / name).exists()
    else:
        status, _, stderr = call(info.main, "--checkpoint", tmp_path / name)
        assert status == 0, stderr


# Buckets


def refused_without_a_trace(refused, bucket, main, *argv):
    """Asserts that one line names the bucket, and that no local folder takes its place."""
    raised = None
    try:
        line = refused(main, *argv)
    except Exception as error:
        raised = repr(error)
    gc.collect()  # What a traceback has kept alive complains now, not after the last test.
    assert raised is None, raised
    assert bucket in line and not os.listdir(), line


@pytest.mark.parametrize("bucket", ["gs://bucket/run", "s3://bucket/run"])
def test_train_refuses_a_bucket_in_one_line(bucket, tmp_path, monkeypatch, refused):
    """Name the bucket that cannot be reached, before the first step."""
    monkeypatch.chdir(tmp_path)
    refused_without_a_trace(refused, bucket, train.main, *DIGITS, "--workdir", bucket)


def test_convert_refuses_a_bucket_in_one_line(weights, tmp_path, monkeypatch, refused):
    """Name the bucket that cannot be reached."""
    monkeypatch.chdir(tmp_path)
    refused_without_a_trace(
        refused, "gs://bucket/net", from_torch.main, weights, "--out", "gs://bucket/net", "--no-verify"
    )


def test_prepare_refuses_a_bucket_in_one_line(tmp_path, tmp_path_factory, monkeypatch, refused):
    """Name the bucket that cannot be reached."""
    source = tmp_path_factory.mktemp("source")
    (source / "val/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(source / "val/cat/0.png")
    monkeypatch.chdir(tmp_path)
    argv = ("--source", source, "--name", "pets", "--out", "gs://bucket/sets", "--processes", 1)
    refused_without_a_trace(refused, "gs://bucket/sets", prepare.main, *argv)


# Platforms


@pytest.fixture(scope="module")
def on_platforms(weights, tmp_path_factory):
    """{(command, platform): (status, stderr)} of processes on platforms that most machines do not have."""
    folder = tmp_path_factory.mktemp("platforms")
    assert from_torch.main([str(weights), "--out", str(folder / "model"), "--no-verify"]) == 0
    commands = {
        "info": ("info", "--checkpoint", folder / "model"),
        "train": ("train", *DIGITS, "--workdir", folder / "run"),
    }
    started = {}
    for command, platform in (("info", "cuda"), ("info", "gpu"), ("info", "CPU"), ("train", "cuda")):
        argv = [sys.executable, "-m", "shufflenet_jax", *map(str, commands[command])]
        started[command, platform] = subprocess.Popen(
            argv, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": platform}, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return {which: (process.communicate()[1], process.returncode)[::-1] for which, process in started.items()}


@pytest.mark.parametrize(
    ("command", "platform"),
    [
        ("info", "cuda"),
        ("info", "gpu"),
        ("info", "CPU"),
        ("train", "cuda"),
    ],
)
def test_a_missing_platform_is_named(command, platform, on_platforms):
    """Compute there, or say in one line that there is no platform of this name."""
    status, stderr = on_platforms[command, platform]
    if status:
        lines = stderr.strip().splitlines()
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), stderr
        assert re.search(rf"\b{platform}\b", lines[0]) and "damaged" not in lines[0]
