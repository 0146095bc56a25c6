"""Real weights in every format: what all real images give in the runtime that people will use."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from share import SHARE

from shufflenet_jax.config import MMPRETRAIN_EVAL
from shufflenet_jax.data import geometry
from shufflenet_jax.data.sources import open_source

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("SHUFFLENET_JAX_SHARED", ROOT.parent / "shared" / "data"))
WEIGHTS = SHARED / "weights/shufflenet_v2_x1_0_mmpretrain.pth"
COUNTS = {"imagenet-val227": (466, 592), "imagenet-original": (161, 189)}

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real images and weights at {SHARED}")


def exported(tmp_path, data, *argv):
    """What `export` prints of the largest difference and its share, and of the (top-1, top-5) correct of both."""
    command = [sys.executable, "-m", "shufflenet_jax", "export", WEIGHTS, "--data", SHARED / data, *argv]
    command += ["--out", tmp_path / "net"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"largest difference (\S+), (\S+) of", done.stdout.splitlines()[-1])[0]
    counts = re.findall(r"(\d+) top-1, (\d+) top-5 correct", done.stdout)
    print(done.stdout)
    return *map(float, found), [tuple(map(int, count)) for count in counts]


CASES = [
    (form, data)
    for data in COUNTS
    for form in ("stablehlo", "onnx", "tflite", "safetensors", "torchvision", "mmpretrain")
]


@pytest.mark.parametrize(("form", "data"), CASES[: max(1, round(len(CASES) * SHARE))])
def test_every_format_counts_all_images_as_we_do(form, data, tmp_path):
    preprocessing = ["--with-preprocessing"] if form in ("onnx", "stablehlo", "tflite") else []
    difference, share, counts = exported(tmp_path, data, "--format", form, *preprocessing)
    # The largest logit is 31; float32 rounds 6e-8 of it an operation.
    assert counts == [COUNTS[data]] * 2 and difference < 1e-4 and share < 3e-6


@pytest.mark.parametrize("bits", [8, 7][: max(1, round(2 * SHARE))])
def test_8_bits_keep_the_accuracy(bits, tmp_path):
    calibration = SHARED / "imagenet-original"
    options = ("--format", "onnx", "--int8", calibration, "--weight-bits", bits)
    *_, counts = exported(tmp_path, "imagenet-val227", *options)
    # 466 in float32; the same ranges give other counts by a few images on other CPUs, which round otherwise.
    assert counts[-1][0] >= 457, counts


WAYS = {"dynamic": (["--int8"], 464, 2.7e6), "static": (["--int8", SHARED / "imagenet-original"], 458, 2.7e6)}


@pytest.mark.parametrize("way", list(WAYS)[: max(1, round(len(WAYS) * SHARE))])
def test_8_bits_of_tflite_keep_the_accuracy(way, tmp_path):
    words, least, largest_file = WAYS[way]
    *_, counts = exported(tmp_path, "imagenet-val227", "--format", "tflite", *words)
    # 466 in float32; other CPUs round otherwise, by a few images.
    assert counts[-1][0] >= least and (tmp_path / "net").stat().st_size <= largest_file


def test_the_page_computes_what_we_do_on_real_images(tmp_path):
    package = os.environ.get("ONNXRUNTIME_WEB")
    if not (package and shutil.which("chromium")):
        pytest.skip("needs Chromium, and in ONNXRUNTIME_WEB the package that npm pack onnxruntime-web brings")
    words = ("--format", "web", "--runtime", package, "--limit", round(20 + 630 * SHARE))
    difference, share, counts = exported(tmp_path, "imagenet-val227", *words)
    assert counts[0] == counts[1] and difference < 1e-4 and share < 3e-6


def test_openvino_reads_our_onnx_and_counts_as_we_do(tmp_path):
    openvino = pytest.importorskip("openvino")
    exported(tmp_path, "imagenet-val227", "--format", "onnx", "--with-preprocessing", "--limit", 16)
    compiled = openvino.Core().compile_model(tmp_path / "net", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs, known = [compiled(crop[None])[0] for crop in crops()], reference()
    assert np.abs(np.concatenate(outputs) - known[: len(outputs)]).max() < 1e-4


def test_mediapipe_gives_the_same_first_five(tmp_path):
    mediapipe = pytest.importorskip("mediapipe")
    exported(tmp_path, "imagenet-val227", "--format", "tflite", "--with-preprocessing", "--limit", 16)
    options = mediapipe.tasks.vision.ImageClassifierOptions(
        base_options=mediapipe.tasks.BaseOptions(model_asset_path=str(tmp_path / "net")), max_results=5
    )
    with mediapipe.tasks.vision.ImageClassifier.create_from_options(options) as classifier:
        for crop, logits in zip(crops(), reference(), strict=False):
            image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(crop))
            categories = classifier.classify(image).classifications[0].categories
            assert [category.index for category in categories] == np.argsort(-logits, kind="stable")[:5].tolist()


def crops():
    """The first real images as the network takes them."""
    source = open_source(SHARED / "imagenet-val227", num_classes=1000)
    images = (source[index] for index in range(round(16 + 634 * SHARE)))
    return [geometry.prepare(example.image, MMPRETRAIN_EVAL, example.name) for example in images]


def reference():
    return np.load(SHARED / "imagenet-val227/mmpretrain_reference.npz")["logits"]
