import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import onnx
import pytest
import torch
from conftest import convert_network, lively_network
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from shufflenet_jax.architecture import TABLES
from shufflenet_jax.checkpoint import load_directory, module_of, save_model
from shufflenet_jax.commands import export, from_torch
from shufflenet_jax.config import MMPRETRAIN_EVAL, ModelInfo, Preprocess
from shufflenet_jax.data import normalization
from shufflenet_jax.data.pipeline import eval_batches
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.exports import graph, quantization, runtime, speed
from shufflenet_jax.exports.agreement import TOLERANCE, last, measure_agreement
from shufflenet_jax.exports.tensors import metadata_of
from shufflenet_jax.loading import load_model
from shufflenet_jax.model import variable_shapes
from shufflenet_jax.porting import dialects, reference

GREY = Preprocess("pillow", 32, "pillow", 32, "L", 1 / 255, mean=(0.3,), std=(0.4,))
DIGITS = ModelInfo(0.5, "torchvision", 10, GREY, in_chans=1, small_stem=True)
NETWORKS = {  # As (dialect, width, classes, settings): each with a preprocessing of its own kind.
    "widest": ("torchvision", 2.0, 7, {}),
    "Megvii's": ("megvii", 1.0, 7, {}),
    "to be pooled": ("mmpretrain", 1.5, 0, {}),
    "without conv5": ("megvii-stages", 0.5, 0, {"conv5": False}),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model directory of a network for the digits whose scales, biases and statistics are all random."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":  # So that activations do not grow from layer to layer.
            return rng.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape)
        return rng.uniform(*{"scale": (0.5, 1.5), "var": (0.5, 2)}.get(name, (-0.5, 0.5)), shape)

    shapes = variable_shapes(module_of(DIGITS))
    variables = jax.tree.map_with_path(lambda *given: draw(*given).astype(np.float32), shapes)
    directory = tmp_path_factory.mktemp("small") / "net"
    save_model(directory, DIGITS, variables)
    return directory


def crops(preprocess, count):
    shape = (count, preprocess.crop, preprocess.crop, preprocess.channels)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def exported(call, *argv):
    status, out, stderr = call(export.main, *argv)
    assert status == 0, (out, stderr)
    return out


def close(actual, expected):
    # float32 rounds 6e-8 an operation, some 50 layers deep, and random weights amplify that to 2e-5.
    assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_computes_what_pytorch_computes_from_uint8_crops(name):
    dialect, width, classes, settings = NETWORKS[name]
    network = lively_network(dialect, width, classes, **settings)
    preprocess = dataclasses.replace(dialects.DIALECTS[dialect].preprocess_of(TABLES[width]), resize=64, crop=64)
    model, _ = graph.make_model(*convert_network(network, dialect), preprocess, with_preprocessing=True)
    session = runtime.load(model)
    for count in (1, 3):  # Of one file.
        images = crops(preprocess, count)
        normalized = np.asarray(normalization.normalize(images, preprocess)).transpose(0, 3, 1, 2)
        with torch.no_grad():
            expected = last(*network(torch.tensor(normalized)))
        found = session.run(None, {"images": images})[0]
        assert found.shape[1:] == {"without conv5": (192, 2, 2), "to be pooled": (1024,)}.get(name, (7,))
        close(found, expected.numpy())


def test_onnx_takes_normalised_grey_images_of_a_fixed_number(small, tmp_path, call):
    out = exported(call, small, "--format", "onnx", "--batch", 16, "--data", "digits", "--out", tmp_path / "net.onnx")
    assert "359 images" in out and re.search("wrote .*: 1.4. MB, largest difference", out.splitlines()[-1])
    assert len({line[33:] for line in out.splitlines() if line.endswith("correct")}) == 1
    (given,), (put_out,) = (getattr(runtime.load(tmp_path / "net.onnx"), f"get_{side}puts")() for side in ("in", "out"))
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", [16, 1, 32, 32])
    assert (put_out.name, put_out.shape) == ("logits", [16, 10])


def test_stablehlo_takes_any_number_of_crops_and_needs_nothing_but_jax(small, tmp_path, call):
    exported(call, small, "--with-preprocessing", "--format", "stablehlo", "--out", tmp_path / "net.stablehlo")
    np.save(tmp_path / "images.npy", crops(GREY, 3))
    code = """
import sys
import numpy as np
from jax import export
network = export.deserialize(open("net.stablehlo", "rb").read())
assert set(network.platforms) == {"cpu", "cuda", "tpu"}
images = np.load("images.npy")
np.savez("logits.npz", three=network.call(images), one=network.call(images[:1]))
assert not any(name.startswith("shufflenet") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = np.load(tmp_path / "logits.npz")
    session = runtime.load(graph.make_model(*load_directory(small)[:2], GREY, with_preprocessing=True)[0])
    (expected,) = session.run(None, {"images": crops(GREY, 3)})
    close(logits["three"], expected)
    close(logits["one"], expected[:1])


def test_onnx_holds_what_model_json_says(small, tmp_path, call):
    exported(call, small, "--format", "onnx", "--out", tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    kept = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert kept == json.loads((small / "model.json").read_text()) and kept["preprocess"]["crop"] == 32
    kinds = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in kinds and "Transpose" not in kinds  # Folded; no shuffles.


def test_safetensors_holds_every_tensor_bit_for_bit_and_is_a_checkpoint(small, tmp_path, call):
    out = exported(call, small, "--format", "safetensors", "--out", tmp_path / "net.safetensors")
    assert "largest difference 0.0e+00" in out
    _, variables, info = load_directory(small)
    tensors = load_file(tmp_path / "net.safetensors")
    kernel = variables["params"]["stage3_unit0"]["right_dw"]["conv"]["kernel"]
    assert_array_equal(tensors["params/stage3_unit0/right_dw/conv/kernel"], kernel)
    _, again, told = load_model(tmp_path / "net.safetensors")
    assert told == info
    jax.tree.map(assert_array_equal, again, variables)


def test_damaged_safetensors_are_refused(small, tmp_path, call, refused):
    whole = tmp_path / "net.safetensors"
    exported(call, small, "--format", "safetensors", "--out", whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-7])
    (tmp_path / "text.safetensors").write_text("hello")
    tensors = load_file(whole)
    save_file(tensors, tmp_path / "strange.safetensors")
    described = {"format": "flax", **metadata_of(load_directory(small)[2])}
    changed = {name: tensor + (name == "params/fc/bias") for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "changed.safetensors", described)
    del tensors["params/fc/bias"]
    save_file(tensors, tmp_path / "fewer.safetensors", described)
    cases = {
        "cut": "is damaged",
        "text": "is damaged",
        "changed": "not those that were saved",
        "strange": "does not describe",
        "fewer": "other tensors",
    }
    for name, told in cases.items():
        assert told in refused(export.main, tmp_path / f"{name}.safetensors", "--format", "onnx"), name
    assert "no moving averages" in refused(export.main, whole, "--ema", "--format", "onnx")


def test_pytorch_files_load_strictly_in_their_projects_networks(ten_classes, tmp_path, call, refused):
    model, data = ten_classes
    _, variables, _ = load_directory(model)
    for dialect in ("torchvision", "mmpretrain"):
        path = tmp_path / f"{dialect}.pth"
        exported(call, model, "--format", dialect, "--data", data, "--out", path)
        content = torch.load(path, weights_only=True)
        network = reference.NETWORKS[dialect](TABLES[0.5], 10)
        network.load_state_dict(content["state_dict"] if dialect == "mmpretrain" else content)
        jax.tree.map(assert_array_equal, convert_network(network, dialect)[1], variables)
    assert "wired like torchvision" in refused(export.main, model, "--format", "megvii", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


# When something is wrong


def test_a_file_that_computes_something_else_is_not_written(small, tmp_path, call):
    _, variables, _ = load_directory(small)
    variables["params"]["fc"]["bias"][:2] = 3.4e38, -3.4e38
    variables["params"]["fc"]["kernel"][:, 0] = 3e38  # Beyond float32: infinity, whose difference is no number.
    save_model(tmp_path / "broken", DIGITS, variables)
    before = sorted(tmp_path.rglob("*"))
    status, out, stderr = call(export.main, tmp_path / "broken", "--format", "onnx", "--out", tmp_path / "out")
    assert status == 1 and "nothing written" in stderr and "wrote" not in out
    assert sorted(tmp_path.rglob("*")) == before


def test_the_comparison_finds_the_one_logit_that_differs_and_leaves_padding_out():
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    labels = logits.argmax(1)
    labels[2] = np.argsort(logits[2])[-2]
    batch = {"images": np.arange(4), "mask": np.array([1.0, 1, 1, 0]), "labels": labels}
    other = logits.copy()
    other[3] = np.nan  # Padding.
    found = measure_agreement(lambda images: [logits[images]], lambda images: [other[images]], [batch, batch])
    assert found.passed and found.difference == 0 and found.images == 6 and found.agreeing == 6
    assert found.ours == found.theirs == (4, 6)
    for much, passed in ((0.5, True), (2, False)):
        other[1, 7] = logits[1, 7] + much * TOLERANCE * np.abs(logits[:3]).max()
        assert (
            measure_agreement(lambda images: [logits[images]], lambda images: [other[images]], [batch]).passed == passed
        )
    other[1] = -logits[1]
    found = measure_agreement(lambda images: [logits[images]], lambda images: [other[images]], [batch])
    assert not found.passed and found.agreeing == 2 and found.ours[0] == 2 and found.theirs[0] == 1
    assert found.difference == pytest.approx(2 * np.abs(logits[1]).max())


def test_bad_input_is_one_line_and_writes_nothing(ten_classes, tmp_path, refused):
    model, data = ten_classes
    cut = tmp_path / "cut.pth"
    cut.write_bytes(b"PK\x03\x04 no more")
    out = ("--out", tmp_path / "net")
    cases = {
        (model, "--format", "coreml", *out): "--format",
        (model, *out): "--format",
        (tmp_path / "none", "--format", "onnx", *out): "no model at",
        (cut, "--format", "onnx", *out): "damaged",
        (model, "--format", "onnx", "--batch", "0", *out): "--batch",
        (model, "--format", "onnx", "--batch", "many", *out): "--batch",
        (model, "--format", "onnx", "--data", tmp_path / "none", *out): "no data at",
        (model, "--format", "onnx", "--data", "digits", *out): "other classes",
        (model, "--format", "onnx", "--int8", tmp_path / "none", *out): "no data at",
        (model, "--format", "stablehlo", "--int8", data, *out): "--int8 is for --format onnx, tflite, not stablehlo",
        (model, "--format", "onnx", "--weight-bits", "7", *out): "--weight-bits is for --int8",
        (model, "--format", "onnx", "--limit", "3", *out): "choose from --data",
        (model, "--format", "safetensors", "--with-preprocessing", *out): "not safetensors",
        (model, "--format", "torchvision", "--batch", "3", *out): "not torchvision",
        (model, "--format", "megvii", "--features", *out): "not megvii",
        (model, "--format", "onnx", "--resolution", "224", *out): "HEIGHTxWIDTH",
        (model, "--format", "onnx", "--resolution", "0x224", *out): "HEIGHTxWIDTH",
        (model, "--format", "onnx", "--int8", *out): "give it DATA",
        (model, "--format", "tflite", "--int8", "--int8-split", "val", *out): "give it DATA",
        (model, "--format", "tflite", "--int8", "--weight-bits", "7", *out): "--weight-bits is for --format onnx",
        (model, "--format", "onnx", "--out", tmp_path): "is a folder",
        (model, "--format", "onnx", "--out", model / "model.json" / "x"): "cannot be written",
    }
    before = sorted(tmp_path.rglob("*"))
    for argv, told in cases.items():
        assert told in refused(export.main, *argv), argv
        assert sorted(tmp_path.rglob("*")) == before, argv


# 8 bits


def test_int8_prints_accuracy_and_speed_before_and_after_and_leaves_one_file(small, tmp_path, call, monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    out = exported(call, small, "--format", "onnx", "--int8", "digits", "--data", "digits", "--with-preprocessing")
    assert [path.name for path in tmp_path.iterdir()] == ["net-int8.onnx"]
    assert len(re.findall(r"^ONNX Runtime .* correct$", out, re.M)) == 2
    assert len(re.findall(r"^batch (1|32): float32 [\d.]+ ms, int8 [\d.]+ ms$", out, re.M)) == 2
    kernels = whole_kernels(tmp_path / "net-int8.onnx")
    assert len(kernels) == 56 + 1 and all(kernel.dtype == np.int8 for kernel in kernels)
    agreeing = int(re.findall(r"^the same first class +(\d+)$", out, re.M)[1])
    assert agreeing >= 0.8 * 359  # By chance it would be a tenth or so.


def test_weights_get_7_bits_where_a_cpu_might_saturate(small, tmp_path, call, monkeypatch):
    cpus = {"flags\t\t: fpu avx2 avx512_vnni": 8, "flags : avx2 avx_vnni": 8, "flags : fpu avx2": 7, "no flags": 7}
    for text, bits in cpus.items():
        (tmp_path / "cpuinfo").write_text(text + "\n")
        assert runtime.weight_bits(tmp_path / "cpuinfo", "x86_64") == bits
    assert runtime.weight_bits(tmp_path / "none", "x86_64") == 7  # Another system.
    assert runtime.weight_bits(tmp_path / "none", "arm64") == 8

    monkeypatch.setattr(speed, "SECONDS", 0.01)
    argv = (small, "--format", "onnx", "--int8", "digits", "--weight-bits", 7, "--out", tmp_path / "net.onnx")
    exported(call, *argv)
    assert max(np.abs(kernel).max() for kernel in whole_kernels(tmp_path / "net.onnx")) == 63


def whole_kernels(path):
    constants = onnx.load(path).graph.initializer
    return [onnx.numpy_helper.to_array(array) for array in constants if array.name.endswith("kernel/quantized")]


def test_the_range_of_an_activation_leaves_outliers_out_and_even_values_in():
    even = np.ones(quantization.BINS)
    assert quantization.best_range(even, -1.0, 3.0) == (-1.0, 3.0)
    rare = np.zeros(quantization.BINS)
    rare[: quantization.BINS // 4], rare[-1] = 1e6, 1
    least, largest = quantization.best_range(rare, 0.0, 8.0)
    # A quarter of the range would lose the one outlier at a cost of 6^2; the rest would gain 15/16 of 1e-3 each.
    assert least == 0 and largest < 4


# Real weights and images


@pytest.mark.real_data
def test_real_weights_give_their_counts_elsewhere_too_and_come_back_to_pytorch(shared, tmp_path, call):
    weights, data = shared / "weights", shared / "imagenet-original"
    checkpoint, path = tmp_path / "x1_0", tmp_path / "net"
    from_torch.main([str(weights / "shufflenet_v2_x1_0_mmpretrain.pth"), "--out", str(checkpoint), "--no-verify"])
    out = exported(call, checkpoint, "--format", "stablehlo", "--data", data, "--out", path)
    assert len(re.findall("161 top-1, 189 top-5 correct", out)) == 2, out

    exported(call, checkpoint, "--format", "onnx", "--out", path)
    source = open_source(shared / "imagenet-val227", num_classes=1000)
    normalized = (
        np.asarray(normalization.normalize(batch["images"], MMPRETRAIN_EVAL)).transpose(0, 3, 1, 2)
        for batch in eval_batches(source, MMPRETRAIN_EVAL, batch_size=25)
    )
    session = runtime.load(path)
    logits = np.concatenate([session.run(None, {"images": images})[0] for images in normalized])
    known = np.load(shared / "imagenet-val227/mmpretrain_reference.npz")
    # The largest logit is 31: 1e-4 is 3e-6 of it, as near as float32 comes after 50 layers.
    assert_allclose(logits, known["logits"], rtol=0, atol=1e-4)
    assert (logits.argmax(1) == known["label"]).sum() == 466
    assert (np.argsort(-logits, 1)[:, :5] == known["label"][:, None]).any(1).sum() == 592

    exported(call, checkpoint, "--format", "torchvision", "--out", path)
    original = torch.load(weights / "shufflenet_v2_x1_0_torchvision.pth", weights_only=True)
    network = reference.NETWORKS["torchvision"](TABLES[1.0], 1000)
    network.load_state_dict(torch.load(path, weights_only=True))
    tensors = network.state_dict()
    assert all(torch.equal(tensors[key], original[key]) for key in original if "num_batches" not in key)
