"""Networks of random channel tables: twelve a dialect convert, compute what PyTorch computes, and come back."""

import os

import jax
import numpy as np
import pytest
from conftest import figures_of
from random_tables import DIALECTS, assert_network_is_pytorchs, random_table
from share import SHARE

from shufflenet_jax import __main__
from shufflenet_jax.architecture import Table
from shufflenet_jax.commands.console import run
from shufflenet_jax.loading import load_model
from shufflenet_jax.porting import dialects

SEED = int(os.environ.get("SEED", "2026"))


@pytest.mark.parametrize("number", range(max(1, round(12 * SHARE))))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_network_of_a_random_table_is_pytorchs(dialect, number, tmp_path):
    table = random_table([SEED, number], dialects.DIALECTS[dialect].layout)
    assert_network_is_pytorchs(dialect, table, tmp_path, seed=number)


@pytest.mark.parametrize("layout", ["torchvision", "megvii"][: max(1, round(2 * SHARE))])
def test_a_network_of_ones_own_table_trains_resumes_and_goes_everywhere(layout, tmp_path, capfd):
    """All commands that read or write a checkpoint, on the digits."""
    own = ("--channels", "8,16,24,32,20", "--repeats", "1,2,1", "--layout", layout)
    workdir, table = tmp_path / "run", Table((8, 16, 24, 32, 20), (1, 2, 1))

    def succeed(*words):
        status = run(__main__.main, list(map(str, words)))
        shown = capfd.readouterr()
        assert status == 0, shown.err
        return shown.err + shown.out

    usual = ("--small-stem", "false", "--in-chans", 3, "--batch-size", 240)  # Whose names Megvii's files have.
    training = ("train", "--config", "digits", *own, *usual, "--workdir", workdir)
    succeed(*training, "--epochs", 1, "--eval-every", 1)
    assert "continuing after step" in succeed(*training, "--epochs", 1, "--eval-every", 1)
    figures = figures_of(succeed("eval", "--checkpoint", workdir, "--data", "digits"))
    for form in ("onnx", "stablehlo", "safetensors", layout):
        succeed("export", workdir, "--format", form, "--data", "digits", "--out", tmp_path / f"net.{form}")
    assert load_model(tmp_path / "net.safetensors")[0].table == table
    (tmp_path / f"net.{layout}").rename(tmp_path / "net.pth")
    written = succeed("convert", tmp_path / "net.pth", "--out", tmp_path / "again")
    assert f"8,16,24,32,20/1,2,1, {layout} layout, 10 classes" in written
    (_, ours, _), (module, back, _) = load_model(workdir), load_model(tmp_path / "again")
    assert module.table == table
    jax.tree.map(np.testing.assert_array_equal, back, ours)
    succeed("publish", workdir, "--out", tmp_path, "--name", "own", "--licence", "MIT")
    (published,) = tmp_path.glob("own-*")
    assert figures_of(succeed("eval", "--checkpoint", published, "--data", "digits")) == figures
    assert "8,16,24,32,20/1,2,1" in succeed("info", "--checkpoint", published)
