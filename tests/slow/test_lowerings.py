"""Real weights on all real images, in every lowering."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from share import SHARE

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("SHUFFLENET_JAX_SHARED", ROOT.parent / "shared" / "data"))
WEIGHTS = SHARED / "weights/shufflenet_v2_x1_0_mmpretrain.pth"
COUNTS = {"imagenet-original": (161, 189), "imagenet-val227": (466, 592)}
CASES = [(lowering, data) for data in COUNTS for lowering in ("reference", "cpu")]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real images and weights at {SHARED}")
@pytest.mark.parametrize(("lowering", "data"), CASES[: max(1, round(len(CASES) * SHARE))])
def test_every_lowering_gives_the_reference_counts(lowering, data):
    top1, top5 = COUNTS[data]
    command = [sys.executable, ROOT / "eval.py", "--checkpoint", WEIGHTS, "--data", SHARED / data]
    command += ["--lowering", lowering, "--expect-top1-correct", top1, "--expect-top5-correct", top5]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
