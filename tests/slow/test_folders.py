"""Random folders of images: `prepare` then `tfds:` gives what `--data` reads; see tests/random_trees.py."""

import os

import pytest
import random_trees
from share import SHARE

SEED = int(os.environ.get("SEED", "2026"))
CASES = max(1, round(500 * SHARE))


@pytest.mark.parametrize("block", range(10))
def test_every_reader_sees_what_a_random_folder_holds(block, tmp_path, monkeypatch):
    monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(tmp_path / "cache"))
    for case in range(block, CASES, 10):
        random_trees.check(f"{SEED}/{case}", tmp_path / str(case))
