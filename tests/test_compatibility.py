"""What the first release wrote is still read, and means the same: see fixtures/first_release/README.md."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT
from numpy.testing import assert_allclose

import shufflenet_jax as snet
from shufflenet_jax import lowerings
from shufflenet_jax.commands import train

FIRST = ROOT / "tests/fixtures/first_release"
EXPECTED = json.loads((FIRST / "expected.json").read_text())
LOWERING = "reference"  # The files of the first release call it "plain".
COMMAND = (
    *("--config", "digits", "--init-from", "model", "--freeze", "backbone", "--lowering", LOWERING),
    *("--image-size", 16, "--batch-size", 240, "--epochs", 2, "--eval-every", 1, "--log-every", 1, "--keep", 1),
    *("--learning-rate", 0.3),
)
# Machines, compilers and numbers of devices add float32 numbers in other orders: four devices move the figures by less
# than 1e-6 of their size. Without the momentum that was saved, the last loss is off by 9e-4 and the classifier by 3e-2.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A copy of the interrupted training, in a folder from which its command can be given again."""
    shutil.copytree(FIRST, tmp_path / "first")
    monkeypatch.chdir(tmp_path / "first")  # The command names its model by a relative path.
    return tmp_path / "first/workdir"


def assert_resumes(workdir, call):
    """The same command goes on after the step that was saved, and ends with the figures of the first release."""
    status, _, stderr = call(train.main, *COMMAND, "--workdir", workdir)
    assert status == 0, stderr
    assert f"continuing after step {EXPECTED['resumed_after']}\n" in stderr
    assert f"warning: an older version wrote {workdir}, without a fingerprint of its data" in stderr
    (start,) = json.loads((workdir / "config.json").read_text())["resumed"]
    assert {name: part["examples"] for name, part in start["data"].items()} == {"train": 1438, "eval": 359}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (FIRST / "workdir/metrics.jsonl").read_text().splitlines()]
    assert rows[: len(before)] == before
    for row, expected in zip(rows[len(before) :], EXPECTED["rows"], strict=True):
        assert (row["step"], row["split"]) == (expected["step"], expected["split"])
        images = 359 if row["split"] == "eval" else 238  # The last batch of an epoch is the smallest.
        for name in ("epoch", "loss", "lr", "grad_norm"):
            if expected[name] is not None:
                assert_allclose(row[name], expected[name], **ROUNDING, err_msg=f"{name} of step {row['step']}")
        for name in ("top1", "top5"):  # Rounding may turn one image.
            assert_allclose(row[name], expected[name], atol=101 / images, err_msg=f"{name} of step {row['step']}")
    # The best checkpoint may be an earlier one: the newest is read, by leaving it alone.
    for step in (workdir / "checkpoints").iterdir():
        if step.name != str(rows[-1]["step"]):
            shutil.rmtree(step)
    kernel = np.float64(snet.load(workdir)[1]["params"]["fc"]["kernel"])
    figures = {"sum": kernel.sum(), "abs_sum": np.abs(kernel).sum(), "first": kernel.ravel()[:5]}
    assert figures.keys() == EXPECTED["classifier"].keys()
    for name, value in figures.items():
        # A sum of 10,240 numbers of both signs keeps their rounding, though it is small itself.
        rounding = {**ROUNDING, "atol": 1e-3} if name == "sum" else ROUNDING
        assert_allclose(value, EXPECTED["classifier"][name], **rounding, err_msg=name)


def test_a_model_directory_of_the_first_release_gives_the_same_logits():
    module, variables = snet.load(FIRST / "model", lowering=LOWERING)
    images = np.random.RandomState(0).random_sample((2, 16, 16, 1)).astype(np.float32)  # Its numbers never change.
    logits, _ = module.apply(variables, images)
    assert_allclose(logits, EXPECTED["logits"], **ROUNDING)


def test_a_training_of_the_first_release_resumes_to_the_same_figures_also_without_later_settings(workdir, call):
    record = json.loads((workdir / "config.json").read_text())
    assert record["settings"]["lowering"] == "plain", "its name at that time"
    for name in ("clip_norm", "ema_every"):  # As if they had been added since.
        del record["settings"][name]
    (workdir / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    assert_resumes(workdir, call)


def test_a_training_with_settings_that_this_version_does_not_know_is_refused(workdir, refused):
    record = json.loads((workdir / "config.json").read_text())
    record["settings"]["spline"] = 3
    (workdir / "config.json").write_text(json.dumps(record))
    line = refused(train.main, *COMMAND, "--workdir", workdir)
    assert "settings that this version does not know: spline" in line


@pytest.mark.parametrize("words", [["--lowering", "plain"], ["--lowering=plain"]])
def test_earlier_names_of_lowerings_are_understood(words):
    config, _ = train.parse(["--config", "digits", *words])
    assert config.lowering == "reference"
    assert snet.TrainConfig(data="digits", lowering="planar").lowering == "cpu"
    assert lowerings.resolve("plain") is lowerings.resolve("reference")
