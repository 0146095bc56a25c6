"""500 random images of every format, mode, bit depth and orientation that Pillow writes: every path sees the same."""

import os

import image_files
import pytest
from share import SHARE

SEED = int(os.environ.get("SEED", "2026"))
# Pillow 13 announces that it will read this format no longer.
pytestmark = pytest.mark.filterwarnings("ignore:IM image format is deprecated:DeprecationWarning")


COUNT = max(1, round(500 * SHARE))


def test_random_files_look_the_same_down_every_path(tmp_path, capsys):
    files = [image_files.random_file(1000 * SEED + number) for number in range(COUNT)]
    read = [image_files.assert_one_decoding(file, tmp_path / "x") for file in files]
    with capsys.disabled():
        print(f"\n{COUNT} images with seed {SEED}: {sum(read)} look the same down every path, the others no path takes")
    assert sum(read) > 0.7 * COUNT
