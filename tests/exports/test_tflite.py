import dataclasses
import io
import json
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from conftest import convert_network, lively_network
from numpy.testing import assert_allclose, assert_array_equal

from shufflenet_jax.architecture import TABLES
from shufflenet_jax.checkpoint import module_of, save_model
from shufflenet_jax.commands import export
from shufflenet_jax.config import ModelInfo, Preprocess
from shufflenet_jax.data import normalization
from shufflenet_jax.exports import litert, tflite
from shufflenet_jax.exports.network import FEATURES, Signature
from shufflenet_jax.exports.quantization import Quantization, calibrate
from shufflenet_jax.inference import Model
from shufflenet_jax.model import init_variables
from shufflenet_jax.porting import dialects

NETWORKS = {  # As (dialect, width, classes, settings): all widths, both wirings, normalizations and ends.
    "narrowest": ("torchvision", 0.5, 7, {}),
    "MMPretrain's": ("mmpretrain", 1.0, 7, {}),
    "Megvii's": ("megvii", 1.5, 7, {}),
    "to be pooled": ("mmpretrain", 2.0, 0, {}),
    "without conv5": ("megvii-stages", 0.5, 0, {"conv5": False}),
}


class Case(NamedTuple):
    """A network in both forms."""

    model: Model
    reference: object  # A function of normalized images (B, H, W, C) to PyTorch's (logits, features), channels last.


def case_of(name, side=64):
    dialect, width, classes, settings = NETWORKS[name]
    network = lively_network(dialect, width, classes, **settings)
    module, variables = convert_network(network, dialect)
    preprocess = dataclasses.replace(dialects.DIALECTS[dialect].preprocess_of(TABLES[width]), resize=side, crop=side)
    names = tuple(f"kind {label}" for label in range(classes)) or None
    info = ModelInfo(width, module.layout, classes, preprocess, classes=names, conv5=module.conv5)

    def reference(images):
        with torch.no_grad():
            logits, features = network(torch.tensor(images.transpose(0, 3, 1, 2).copy()))
        last_first = {stage: np.moveaxis(array.numpy(), 1, -1) for stage, array in features.items()}
        return logits, last_first

    return Case(Model(module, variables, info), reference)


@pytest.fixture(scope="module")
def network():
    return case_of("MMPretrain's")


def crops(preprocess, count, size=None, seed=1):
    shape = (count, *(size or (preprocess.crop, preprocess.crop)), preprocess.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def normalized(images, preprocess):
    return np.asarray(normalization.normalize(images, preprocess))


def outputs(written, images):
    return litert.run(litert.load(written.content, threads=1), images)


def close(actual, expected):
    # float32 rounds 6e-8 an operation, some 50 layers deep, and random weights amplify that to 2e-5.
    assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_width_and_wiring_computes_what_pytorch_computes_from_uint8_crops(name):
    model, reference = case_of(name)
    preprocess = model.info.preprocess
    images = crops(preprocess, 2)
    logits, features = reference(normalized(images, preprocess))
    expected = logits if logits is not None else features.get("pooled", features["stage4"])
    (actual,) = outputs(tflite.make_model(model, Signature(2, with_preprocessing=True)), images)
    close(actual, np.asarray(expected))


# Even lengths need padding on the other side than TFLite's own; odd ones do not.
@pytest.mark.parametrize("size", [(64, 64), (65, 33), (64, 95), (30, 47)])
@pytest.mark.parametrize("name", ["narrowest", "without conv5"])
def test_stages_are_pytorchs_at_any_resolution(name, size):
    model, reference = case_of(name)
    images = normalized(crops(model.info.preprocess, 1, size), model.info.preprocess)
    written = tflite.make_model(model, Signature(1, size, features=True))
    expected = reference(images)[1]
    for stage, actual in zip(FEATURES, outputs(written, images), strict=True):
        close(actual, expected[stage])


def test_one_file_takes_batches_that_the_runtime_is_told(network):
    model, reference = network
    images = normalized(crops(model.info.preprocess, 3), model.info.preprocess)
    net = litert.load(tflite.make_model(model, Signature(None)).content, threads=1)
    expected = np.asarray(reference(images)[0])
    for count in (1, 3, 2):
        close(litert.run(net, images[:count])[0], expected[:count])


def test_grey_images_and_small_stems_go_through_the_command(small_digits, tmp_path, call):
    path = tmp_path / "net.tflite"
    argv = (small_digits, "--format", "tflite", "--with-preprocessing", "--data", "digits", "--limit", 60)
    status, out, stderr = call(export.main, *argv, "--out", path)
    assert status == 0, stderr
    assert "LiteRT" in out and "60 images: largest difference" in out and "INFO" not in stderr
    (given,) = litert.load(path.read_bytes()).get_input_details()
    assert (given["name"], given["dtype"], given["shape"].tolist()) == ("images", np.uint8, [1, 32, 32, 1])


@pytest.fixture(scope="module")
def small_digits(tmp_path_factory):
    """A model directory of a small random network for the digits, whose biases and statistics are random too."""
    grey = Preprocess("pillow", 32, "pillow", 32, "L", 1 / 255, mean=(0.3,), std=(0.4,))
    info = ModelInfo(0.5, "torchvision", 10, grey, in_chans=1, small_stem=True)
    directory = tmp_path_factory.mktemp("small") / "net"
    save_model(directory, info, init_variables(module_of(info), seed=0))
    return directory


# What the file says of itself


def test_the_file_holds_classes_preprocessing_and_what_model_json_says(network):
    model, _ = network
    labels = {"labels.txt": list(model.info.classes), "labels_en.txt": ["a"] * 7}
    metadata = {"width": "1.0", "classes": json.dumps(model.info.classes)}
    written = tflite.make_model(model, Signature(1), metadata=metadata, labels=labels)
    assert outputs(written, np.zeros((1, 64, 64, 3), np.float32))[0].shape == (1, 7)  # In spite of the zip behind it.
    file = tflite_file(written.content)
    assert json.loads(file["shufflenet_jax"]) == {"width": 1.0, "classes": list(model.info.classes)}
    assert file["TFLITE_METADATA"][4:8] == b"M001"
    for value in (123.675, 116.28, 103.53, 58.395, 57.12, 57.375):  # Of pixels from 0 to 255.
        assert np.float32(value).tobytes() in file["TFLITE_METADATA"]
    with zipfile.ZipFile(io.BytesIO(written.content)) as archive:
        assert {name: archive.read(name).decode().split("\n") for name in archive.namelist()} == labels


def tflite_file(content):
    """{name: bytes} of a file's metadata."""
    model = schema.ModelT.InitFromPackedBuf(content)
    return {entry.name.decode(): bytes(model.buffers[entry.buffer].data) for entry in model.metadata}


def test_buffers_are_aligned_and_no_layer_falls_back_to_slow_code(network):
    content = tflite.make_model(network.model, Signature(1)).content
    model = schema.Model.GetRootAs(content)
    address = np.frombuffer(content, np.uint8).ctypes.data
    for number in range(1, model.BuffersLength()):
        assert (model.Buffers(number).DataAsNumpy().ctypes.data - address) % 16 == 0
    operators = litert.load(content, threads=1)._get_ops_details()
    assert [operator["op_name"] for operator in operators].count("DELEGATE") == 1  # XNNPACK computes all of it.


# 8 bits


def quantized(model, images, signature):
    watched = tflite.make_model(model, Signature(None), watched=True)
    watch = litert.watch(watched.content, watched.activations)
    ranges = calibrate(watch, lambda: [images], watched.groups)
    return tflite.make_model(model, signature, quantization=Quantization(ranges, 127)), ranges, watched.groups


@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_static_8_bits_are_integers_in_and_out_near_float32(network, with_preprocessing):
    model, reference = network
    images = crops(model.info.preprocess, 6)
    floats = normalized(images, model.info.preprocess)
    written, ranges, groups = quantized(model, floats, Signature(6, with_preprocessing=with_preprocessing))
    net = litert.load(written.content, threads=1)
    details = [*net.get_input_details(), *net.get_output_details()]
    assert [entry["dtype"] for entry in details] == [np.uint8 if with_preprocessing else np.int8, np.int8]
    (actual,) = litert.run(net, images if with_preprocessing else floats)
    expected = np.asarray(reference(floats)[0])
    assert np.abs(actual - expected).max() < 0.5 * expected.std()  # Each layer rounds to 1/255 of its range, 50 deep.
    assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.98
    tensors = {tensor["name"]: tensor["dtype"] for tensor in net.get_tensor_details()}
    assert {dtype for name, dtype in tensors.items() if not name.startswith(("fc", "stage", "conv", "images/n"))} <= {
        *(np.int8, np.int32, np.uint8)
    }
    shared = {group for group in groups.values() if list(groups.values()).count(group) > 1}
    assert len(shared) == 3  # What a stage concatenates has one range, for no concatenation of 8 bits converts.
    assert all(ranges[name] == ranges[groups[name]] for name in groups)


def test_dynamic_8_bits_are_those_of_the_weights_alone(network):
    model, reference = network
    images = normalized(crops(model.info.preprocess, 1), model.info.preprocess)
    plain = tflite.make_model(model, Signature(1))
    written = tflite.make_model(model, Signature(1), quantization=Quantization(None, 127))
    assert len(written.content) < 0.4 * len(plain.content)
    net = litert.load(written.content, threads=1)
    kernels = {tensor["name"]: tensor["dtype"] for tensor in net.get_tensor_details() if "kernel" in tensor["name"]}
    assert kernels["fc/kernel"] == kernels["stage2_unit1/right_pw1/kernel"] == np.int8
    assert kernels["stage2_unit1/right_dw/kernel"] == kernels["conv1/kernel"] == np.float32
    (actual,) = litert.run(net, images)
    expected = np.asarray(reference(images)[0])
    assert np.abs(actual - expected).max() < 0.3 * expected.std()


def test_8_bits_of_both_kinds_go_through_the_command(small_digits, tmp_path, call, monkeypatch):
    monkeypatch.setattr("shufflenet_jax.exports.speed.SECONDS", 0.01)
    common = (small_digits, "--format", "tflite", "--data", "digits", "--limit", 40, "--batch", "20")
    for words, called in ((["--int8"], ", int8 weights"), (["--int8", "digits"], ", int8")):
        path = tmp_path / f"{len(words)}.tflite"
        status, out, stderr = call(export.main, *common, *words, "--out", path)
        assert status == 0, stderr
        assert f"{called}, 40 images" in out and "batch 20: float32" in out
    (given,) = litert.load(path.read_bytes()).get_input_details()
    assert given["dtype"] == np.int8 and given["quantization"][0] > 0


def test_the_same_network_is_the_same_bytes(network):
    first, second = (tflite.make_model(network.model, Signature(1), labels={"l.txt": ["a"]}) for _ in range(2))
    assert_array_equal(np.frombuffer(first.content, np.uint8), np.frombuffer(second.content, np.uint8))
