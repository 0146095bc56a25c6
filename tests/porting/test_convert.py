import hashlib
import os
import pickle
import re
import sys
import types
import warnings
from argparse import Namespace
from collections import defaultdict, deque
from functools import cache

import jax
import numpy as np
import pytest
import torch
from conftest import convert_network, lively_network
from numpy.testing import assert_allclose

from shufflenet_jax.architecture import TABLES
from shufflenet_jax.checkpoint import read_info, save_model
from shufflenet_jax.commands import from_torch, to_torch
from shufflenet_jax.config import CIFAR10_EVAL, DIGITS_EVAL, TORCHVISION_EVAL, ModelInfo
from shufflenet_jax.data import normalization
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.data.pipeline import eval_batches
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.loading import load_model
from shufflenet_jax.porting import convert, dialects, torch_files

WIDTHS = (0.5, 1.0, 1.5, 2.0)


def save(network, path, wrap=lambda tensors: tensors, **options):
    torch.save(wrap(network.state_dict()), path, **options)
    return path


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A 0.5x network in torchvision's naming."""
    return save(lively_network("torchvision"), tmp_path_factory.mktemp("file") / "small.pth")


# Every dialect


@pytest.mark.parametrize("dialect", dialects.DIALECTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_of_every_dialect_converts_with_equal_logits(x64, dialect, width):
    network = lively_network(dialect, width)
    module, variables = convert_network(network, dialect)
    assert (module.width, module.num_classes) == (width, 10)
    images = np.random.default_rng(1).normal(size=(2, 64, 64, 3))
    ours, _ = jax.jit(module.clone(dtype=np.float64).apply)(variables, images)
    with torch.no_grad():
        theirs, _ = network.double()(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    assert theirs.std(0).mean() > 0.1, "a network that ignores its input proves nothing"
    # float64 rounds 1e-16 an operation; these random weights amplify it some thousand times.
    assert_allclose(ours, theirs, atol=1e-11 * float(theirs.abs().max()))


@pytest.mark.parametrize("dialect", dialects.DIALECTS)
def test_the_way_back_is_bit_for_bit(dialect, tmp_path, call):
    network = lively_network(dialect)
    source = save(network, tmp_path / "there.pth")
    assert call(from_torch.main, source, "--out", tmp_path / "model", "--no-verify")[0] == 0
    assert read_info(tmp_path / "model").source["dialect"] == dialect
    assert call(to_torch.main, tmp_path / "model", "--dialect", dialect, "--out", tmp_path / "back.pth")[0] == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert_same_tensors(back.get("state_dict", back), network.state_dict())


def assert_same_tensors(ours, theirs):
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and ours[key].shape == tensor.shape, key
        assert ours[key].numpy().tobytes() == tensor.numpy().tobytes(), key


def test_batch_counters_survive_also_where_they_differ_or_lack():
    tensors = {key: tensor.numpy().copy() for key, tensor in lively_network("mmpretrain").state_dict().items()}
    rules = dialects.DIALECTS["mmpretrain"]
    module = dialects.module_for(tensors, rules)
    for change in ("differ", "lack"):
        counter = "backbone.conv1.bn.num_batches_tracked"
        tensors[counter] = np.int64(7)
        if change == "lack":
            del tensors[counter]
        back = dialects.to_torch(*(lambda v, c: (v, rules, c))(*dialects.from_torch(tensors, rules, module)))
        counters = {key: int(array) for key, array in back.items() if key.endswith("tracked")}
        assert counters == {key: int(array) for key, array in tensors.items() if key.endswith("tracked")}


def test_mmpretrain_to_jax_to_torchvision_gives_the_same_logits(tmp_path, call):
    network = lively_network("mmpretrain", num_classes=7)
    source = save(network, tmp_path / "mm.pth", lambda tensors: {"meta": {}, "state_dict": tensors})
    for main, *argv in (
        (from_torch.main, source, "--out", tmp_path / "a", "--no-verify"),
        (to_torch.main, tmp_path / "a", "--dialect", "torchvision", "--out", tmp_path / "tv.pth"),
    ):
        assert call(main, *argv)[0] == 0
    other = lively_network("torchvision", num_classes=7, seed=1)
    other.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(images)[0], other(images)[0])


# Forms of files


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_prefixes_and_containers_and_both_file_formats_are_understood(tmp_path, call, legacy, prefix, container):
    def wrap(tensors):
        tensors = {prefix + key: tensor for key, tensor in tensors.items()}
        return {container: tensors} if container else tensors

    network = lively_network("torchvision")
    source = save(network, tmp_path / "a.pth", wrap, _use_new_zipfile_serialization=not legacy)
    status, out, _ = call(from_torch.main, source, "--out", tmp_path / "a", "--no-verify")
    assert status == 0 and "torchvision, 0.5x" in out
    _, variables, _ = load_model(tmp_path / "a")
    expected = network.state_dict()["conv5.0.weight"].numpy()
    assert np.array_equal(variables["params"]["conv5"]["conv"]["kernel"][0, 0].T, expected[..., 0, 0])


def test_a_backbone_converts_to_features(tmp_path, call):
    network = lively_network("mmpretrain", num_classes=0)
    tensors = {key.removeprefix("backbone."): tensor for key, tensor in network.state_dict().items()}
    source = save(network, tmp_path / "b.pth", lambda _: tensors)
    status, out, _ = call(from_torch.main, source, "--out", tmp_path / "b")
    assert status == 0 and "features only" in out and "pooled" in out and "logits" not in out
    assert read_info(tmp_path / "b").num_classes == 0


class HistoryBuffer:
    """Pickles as MMEngine's does: arrays, and its own methods by way of getattr."""

    def __init__(self):
        self.values, self.methods = np.arange(3.0), {"mean": HistoryBuffer.mean}
        self.max_length = np.float64(1e6)

    def mean(self):
        raise AssertionError("never called")


def mmpretrain_1x(tmp_path, monkeypatch, network, averaged):
    """A training file of MMPretrain 1.x: pickled history beside the weights, averages with a counter."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    HistoryBuffer.mean.__module__ = module.__name__
    ema = {f"module.{key}": tensor for key, tensor in averaged.state_dict().items()}
    content = {
        "meta": {"epoch": 3, "dataset_meta": {"classes": [f"class {i}" for i in range(10)]}},
        "state_dict": network.state_dict(),
        "ema_state_dict": {"steps": torch.tensor(5), **ema},
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"iter": np.int64(4)}},
    }
    torch.save(content, tmp_path / "epoch_3.pth")
    assert b"history_buffer" in (tmp_path / "epoch_3.pth").read_bytes()
    monkeypatch.delitem(sys.modules, module.__name__)
    return tmp_path / "epoch_3.pth"


def test_training_files_of_mmpretrain_1x_load_without_mmengine_and_give_either_weights(tmp_path, monkeypatch, call):
    network, averaged = lively_network("mmpretrain"), lively_network("mmpretrain", seed=1)
    source = mmpretrain_1x(tmp_path, monkeypatch, network, averaged)
    for flags, expected in (((), network), (("--ema",), averaged)):
        out = tmp_path / f"out{len(flags)}"
        assert call(from_torch.main, source, "--out", out, "--no-verify", *flags)[0] == 0
        _, variables, info = load_model(out)
        assert np.array_equal(variables["params"]["fc"]["bias"], expected.state_dict()["head.fc.bias"])
        assert info.classes == tuple(f"class {i}" for i in range(10))


def test_half_precision_files_are_widened(tmp_path, call):
    network = lively_network("torchvision").half()
    assert call(from_torch.main, save(network, tmp_path / "h.pth"), "--out", tmp_path / "h", "--no-verify")[0] == 0
    _, variables, _ = load_model(tmp_path / "h")
    assert variables["params"]["fc"]["bias"].dtype == np.float32
    assert np.array_equal(variables["params"]["fc"]["bias"], network.state_dict()["fc.bias"].numpy())


# What trainers put around the weights


class AttributeDict(dict):
    """A dict of its own class, as Lightning keeps its hyperparameters."""


@pytest.fixture(scope="module")
def raw():
    return lively_network("torchvision")


@pytest.fixture(scope="module")
def averages():
    return lively_network("torchvision", seed=1)


@cache
def compiled(module):
    """The network on the reference lowering, compiled once for all cases."""
    return jax.jit(module.clone(lowering="reference").apply)


def assert_computes(conversion, network):
    """A conversion must give PyTorch's logits, up to float32's rounding, which random weights amplify."""
    images = np.random.default_rng(1).normal(size=(2, 32, 32, conversion.module.in_chans)).astype(np.float32)
    images[1] = 3 * images[1, :4, :4].repeat(8, 0).repeat(8, 1)
    ours = compiled(conversion.module)(conversion.variables, images)[0]
    with torch.no_grad():
        theirs = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0].numpy()
    assert theirs.std(0).mean() > 0.02 * np.abs(theirs).max(), "a network that ignores its input proves nothing"
    assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def behind(prefix, network):
    return {prefix + key: tensor for key, tensor in network.state_dict().items()}


def averaged_model(network):
    return {"n_averaged": torch.tensor(3), **behind("module.", network)}


def profiled(network):
    """Weights with what thop's `profile` registers in every module."""
    tensors = network.state_dict()
    layers = {key.rpartition(".")[0] for key in tensors}
    counts = {f"{layer}.total_{what}": torch.zeros(1) for layer in layers for what in ("ops", "params")}
    return tensors | counts | {"total_ops": torch.zeros(1), "total_params": torch.zeros(1)}


def with_dropout(network):
    """Weights of a network whose classifier stands behind a dropout in a sequence."""
    return {re.sub(r"^fc\.", "fc.1.", key): tensor for key, tensor in network.state_dict().items()}


def detector(prefix, network):
    return {**behind(f"{prefix}backbone.", network), f"{prefix}fpn.lateral.weight": torch.zeros(3)}


def optimizer(network):
    return {"state": {i: {"exp_avg": p.detach()} for i, p in enumerate(network.parameters())}, "param_groups": [{}]}


def twice(network):
    """Averages that are the weights themselves, as before the first step."""
    tensors = network.state_dict()
    return {"checkpoint": {"state_dict": tensors, "state_dict_ema": tensors}}


WILD = {  # name: (what the file holds, of the raw weights and the averages; whether the averages are asked for)
    "compiled inside data-parallel": (lambda r, _: {"state_dict": behind("module._orig_mod.", r)}, False),
    "any prefix": (lambda r, _: behind("learner.encoder.0.", r), False),
    "nested containers": (lambda r, _: {"checkpoint": {"network": {"weights": r.state_dict()}, "epoch": 3}}, False),
    "a tuple": (lambda r, _: (3, r.state_dict(), optimizer(r)), False),
    "timm": (lambda r, a: {"state_dict": r.state_dict(), "state_dict_ema": a.state_dict(), "args": Namespace()}, True),
    "one table in two places": (lambda _, a: twice(a), True),
    "torchvision, raw": (
        lambda r, a: {"model": r.state_dict(), "model_ema": averaged_model(a), "args": Namespace(lr=0.1)}, False,
    ),
    "torchvision, averaged": (
        lambda r, a: {"model": r.state_dict(), "model_ema": averaged_model(a), "args": Namespace(lr=0.1)}, True,
    ),
    "the averages first": (lambda r, a: {"ema": averaged_model(a), "net": r.state_dict()}, False),
    "ema_state": (lambda r, a: {"net": r.state_dict(), "ema_state": {"module": a.state_dict(), "updates": 7}}, True),
    "averaged_model": (lambda r, a: {"averaged_model": a.state_dict(), "weights": r.state_dict()}, True),
    "averages in the same table": (lambda r, a: {"state_dict": behind("net.", r) | behind("net_ema.", a)}, True),
    "NanoDet": (lambda r, a: {"state_dict": detector("model.", r) | detector("avg_model.", a)}, False),
    "NanoDet, averaged": (lambda r, a: {"state_dict": detector("model.", r) | detector("avg_model.", a)}, True),
    "Lightning": (
        lambda r, _: {
            "state_dict": {**behind("model.", r), "criterion.weight": torch.ones(10)},
            "hyper_parameters": AttributeDict(lr=0.1), "callbacks": {}, "optimizer_states": [optimizer(r)],
        }, False,
    ),
    "thop": (lambda r, _: profiled(r), False),
    "dropout": (lambda r, _: {"net": {f"module.{key}": t for key, t in with_dropout(r).items()}}, False),
    "options and histories": (
        lambda r, _: {"log": defaultdict(list, loss=[1.0]), "last": deque([1, 2]), "model": r.state_dict()}, False,
    ),
    "a student and its teacher": (lambda r, a: {"teacher": a.state_dict(), "student": r.state_dict()}, False),
    "a whole module": (lambda r, _: r, False),
    "whole modules": (lambda r, a: {"model": torch.nn.DataParallel(r), "ema": a, "updates": 3}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", WILD)
def test_the_weights_are_taken_from_whatever_stands_around_them(case, tmp_path, raw, averages):
    content, ema = WILD[case]
    torch.save(content(raw, averages), tmp_path / "net.pth")
    assert_computes(convert.convert(convert.read(tmp_path / "net.pth", ema=ema)), averages if ema else raw)


@pytest.mark.parametrize("case", [case for case in WILD if "whole" not in case])
def test_older_files_hold_the_same(case, tmp_path, raw, averages):
    content, ema = WILD[case]
    torch.save(content(raw, averages), tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    file, expected = convert.read(tmp_path / "net.pth", ema=ema), (averages if ema else raw).state_dict()
    assert np.array_equal(file.tensors["fc.weight"], expected["fc.weight"])


@pytest.mark.parametrize("prefix", ["module.", "model.", "a.b.", "module._orig_mod."])
def test_mmpretrains_backbone_and_head_may_stand_in_a_module(prefix, tmp_path):
    network = lively_network("mmpretrain")
    torch.save({"state_dict": behind(prefix, network)}, tmp_path / "net.pth")
    conversion = convert.convert(convert.read(tmp_path / "net.pth"))
    assert_computes(conversion, network)
    assert_same_tensors(convert.back_to_torch(*parts(conversion), "mmpretrain"), network.state_dict())


def parts(conversion):
    return conversion.module, conversion.variables, conversion.info


class Logits(torch.nn.Module):
    """What a program is traced from: the reference network also returns its features."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)[0]


@pytest.fixture
def script(tmp_path, raw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its own TorchScript old, and warns of shapes taken for granted.
        torch.jit.trace(Logits(raw), torch.zeros(1, 3, 32, 32), check_trace=False).save(tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_a_torchscript_program_gives_its_weights_and_is_not_run(script, raw, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was loaded"))
    assert_computes(convert.convert(convert.read(script)), raw)


def test_an_encoder_with_another_head_converts_to_features_and_says_what_it_leaves_out(tmp_path, raw, call):
    tensors = {key: tensor for key, tensor in behind("encoder.", raw).items() if ".fc." not in key}
    torch.save({"state_dict": {**tensors, "decoder.weight": torch.ones(3)}}, tmp_path / "net.pth")
    status, stdout, stderr = call(from_torch.main, tmp_path / "net.pth", "--out", tmp_path / "out", "--no-verify")
    assert status == 0 and "features only" in stdout
    assert re.search("^warning: net.pth holds 1 tensors .*skipped: decoder.weight$", stderr, re.MULTILINE), stderr


def test_of_several_networks_the_one_taken_is_named(tmp_path, raw, averages, call):
    content = {"teacher": averages.state_dict(), "student": raw.state_dict(), "model_ema": averages.state_dict()}
    torch.save(content, tmp_path / "net.pth")
    _, _, stderr = call(from_torch.main, tmp_path / "net.pth", "--out", tmp_path / "out", "--no-verify")
    assert 'warning: net.pth holds 2 networks; "student" is taken, not "teacher"' in stderr
    assert 'net.pth: took the weights; --ema takes those in "model_ema"' in stderr


def quantized(path):
    weight = torch.quantize_per_tensor(torch.ones(24, 3, 3, 3), 0.1, 0, torch.qint8)
    packed = {"fc._packed_params.dtype": torch.qint8, "fc._packed_params._packed_params": (weight, None)}
    torch.save({"conv1.0.weight": weight, "conv1.0.scale": torch.tensor(0.1), **packed}, path)


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)


KINDS = {  # name: (how to write the file, what the error must say)
    "quantized": (quantized, ["is quantized", "float checkpoint"]),
    "TorchScript": (scripted, ["TorchScript program", "torch.save(model.state_dict()"]),
    "another module": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path), ["pickled torch.nn.modules.linear.Linear", "torch.save("],
    ),
    "a module in an older file": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False),
        ["it was not loaded", "torch.save("],
    ),
    "a newer pickle": (
        lambda path: torch.save({"a": torch.zeros(2)}, path, pickle_protocol=4), ["it was not loaded", "torch.save("],
    ),
    "options alone": (
        lambda path: torch.save({"args": Namespace(lr=0.1)}, path), ["argparse.Namespace", "no tensors", "torch.save("],
    ),
    "code that torch never allows": (
        lambda path: torch.save({"state_dict": Code("x"), "hook": Blocked()}, path), ["it was not loaded"],
    ),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), ["torch.save did not write"]),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    "a page": (lambda path: path.write_text("<!DOCTYPE html><html></html>"), ["a web page"]),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), ["HDF5"]),
    "safetensors": (lambda path: path.write_bytes(b'\2\0\0\0\0\0\0\0{"a": 1}'), ["safetensors file"]),
}  # fmt: skip


class Blocked:
    """Pickles as a call of a function whose module PyTorch's reader refuses."""

    def __reduce__(self):
        return (os.system, ("touch trace",))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning", "ignore:.*quantize:UserWarning")
def test_other_files_are_called_what_they_are(kind, tmp_path, monkeypatch, refused):
    write, words = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "net.pth")
    line = refused(from_torch.main, tmp_path / "net.pth", "--out", tmp_path / "out")
    assert all(word in line for word in words) and "damaged" not in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


# What shapes cannot show


def own_names(count):
    return tuple(f"dish{i}" for i in range(count))


def numbered_names():
    return tuple(f"c{i}" for i in range(1000))


def in_mmpretrains_spelling():
    return tuple(f"{name.replace('_', ' ').title()}, {wnid}" for wnid, name in imagenet_classes().items())


TEN = own_names(10)
NAMED = {  # name: (what stands beside the weights, the number of classes, the names that result)
    "0.x": ({"meta": {"CLASSES": TEN}}, 10, TEN),
    "1.x": ({"meta": {"dataset_meta": {"classes": list(TEN)}}}, 10, TEN),
    "a list": ({"classes": list(TEN)}, 10, TEN),
    "class_names": ({"class_names": TEN}, 10, TEN),
    "labels of names": ({"class_to_idx": {name: 9 - i for i, name in enumerate(TEN)}}, 10, TEN[::-1]),
    "names of labels": ({"idx_to_class": dict(enumerate(TEN))}, 10, TEN),
    "hyperparameters": ({"hyper_parameters": AttributeDict(class_names=list(TEN))}, 10, TEN),
    "no names": ({}, 10, None),
    "other names": ({"meta": {"CLASSES": own_names(20)}}, 10, None),
    "labels twice": ({"class_to_idx": {"a": 0, "b": 0}}, 10, None),
    "a thousand of its own": ({"classes": own_names(1000)}, 1000, own_names(1000)),
    "a thousand other ones": ({"classes": own_names(999)}, 1000, None),
    "ImageNet's": ({"meta": {"CLASSES": in_mmpretrains_spelling()}}, 1000, tuple(imagenet_classes())),
    "ImageNet's, sorted otherwise": ({"classes": sorted(imagenet_classes())[::-1]}, 1000,
                                     tuple(sorted(imagenet_classes())[::-1])),
    "numbers of a thousand": ({"meta": {"CLASSES": numbered_names()}}, 1000, tuple(imagenet_classes())),
    "numbers in another order": ({"classes": sorted(numbered_names())}, 1000, tuple(sorted(numbered_names()))),
    "numbers from 1": ({"classes": (*numbered_names()[1:], "c1000")}, 1000, (*numbered_names()[1:], "c1000")),
    "numbers as names": ({"class_to_idx": {(3 * i) % 10: i for i in range(10)}}, 10, tuple("0369258147")),
    "none of a thousand": ({}, 1000, tuple(imagenet_classes())),
}  # fmt: skip


@pytest.fixture(scope="module")
def thousand():
    return lively_network("torchvision", num_classes=1000)


@pytest.mark.parametrize("case", NAMED)
def test_classes_have_the_names_that_the_file_gives(case, tmp_path, raw, thousand):
    beside, count, expected = NAMED[case]
    torch.save({"state_dict": (raw if count == 10 else thousand).state_dict(), **beside}, tmp_path / "net.pth")
    assert convert.convert(convert.read(tmp_path / "net.pth")).info.classes == expected


def plain(count, beside=None):
    """What a file holds with a classifier of so many classes."""
    return lambda raw: {"state_dict": raw.state_dict() | classifier(count), **(beside or {})}


def classifier(count):
    return {"fc.weight": torch.ones(count, 1024), "fc.bias": torch.zeros(count)}


def under_mmpretrains_names(raw):
    return {"state_dict": lively_network("mmpretrain").state_dict()}


STEM, PREPARED, ASSUMED, NUMBERED, IGNORED = (
    "--small-stem",
    "--preprocessing",
    "ImageNet's names are assumed",
    "only numbers its 1000 classes: ImageNet's names are assumed",
    "the names are ignored",
)
SAID = ("--preprocessing", "cifar10")
WARNED = {  # name: (what the file holds, options, what warnings must say; they say nothing else)
    "ten classes": (plain(10), (), [STEM, PREPARED]),
    "a hundred": (plain(100), (), [STEM, PREPARED]),
    "seven": (plain(7), (), [PREPARED]),
    "the stem is stated": (plain(10), ("--small-stem",), [PREPARED]),
    "it is the usual one": (plain(10), ("--no-small-stem",), [PREPARED]),
    "the preprocessing is stated": (plain(10), SAID, [STEM]),
    "both": (plain(10), ("--small-stem", *SAID), []),
    "the size alone": (plain(7), ("--image-size", 96), [PREPARED]),
    "a thousand": (plain(1000), (), [ASSUMED, PREPARED]),
    "a thousand with names": (plain(1000, {"classes": own_names(1000)}), SAID, []),
    "a thousand numbers": (plain(1000, {"classes": numbered_names()}), SAID, [NUMBERED]),
    "too many names": (plain(7, {"classes": TEN}), SAID, [IGNORED]),
    "another project": (under_mmpretrains_names, (), [PREPARED]),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_is_guessed_is_said(case, tmp_path, raw, call):
    content, options, expected = WARNED[case]
    torch.save(content(raw), tmp_path / "net.pth")
    status, _, stderr = call(from_torch.main, tmp_path / "net.pth", "--out", tmp_path / "out", "--no-verify", *options)
    lines = stderr.strip().splitlines()
    assert status == 0 and len(lines) == len(expected), stderr
    assert all(line.startswith("warning: net.pth ") for line in lines), stderr
    assert all(words in line for words, line in zip(sorted(expected), sorted(lines, key=order(expected)), strict=True))


def order(expected):
    return lambda line: next((words for words in sorted(expected) if words in line), "")


STATED = {  # options: the preprocessing that results
    ("--preprocessing", "cifar10"): CIFAR10_EVAL,
    ("--preprocessing", "torchvision"): TORCHVISION_EVAL,
    (): TORCHVISION_EVAL,
    ("--image-size", 224): TORCHVISION_EVAL,
    ("--image-size", 64): TORCHVISION_EVAL.with_side(64, 64),
    ("--image-size", 160): TORCHVISION_EVAL.with_side(160, 183),
    ("--preprocessing", "cifar10", "--image-size", 48): CIFAR10_EVAL.with_side(48, 48),
    ("--preprocessing", "megvii"): dialects.MEGVII.preprocess_of(TABLES[0.5]),
}


@pytest.mark.parametrize("options", STATED)
def test_the_preprocessing_is_the_one_stated(options, tmp_path, small_file, call):
    assert call(from_torch.main, small_file, "--out", tmp_path / "out", "--no-verify", *options)[0] == 0
    assert read_info(tmp_path / "out").preprocess == STATED[options]


def test_the_larger_networks_of_torchvision_keep_their_size():
    file = torch_files.TorchFile(
        {key: tensor.numpy() for key, tensor in lively_network("torchvision", 2.0).state_dict().items()},
        "torchvision", None, None, (), (), "net.pth", "",
    )  # fmt: skip
    stated = convert.convert(file, statements=convert.Statements(preprocessing="torchvision", image_size=224))
    assert stated.info.preprocess.resize == 232


def test_class_names_come_from_a_file_and_win(tmp_path, raw, call):
    torch.save({"state_dict": raw.state_dict(), "classes": TEN}, tmp_path / "net.pth")
    names = ["\ufeffcr\u00eape", "sushi roll ", *"01234567"]
    (tmp_path / "names.txt").write_bytes("\r\n".join(names).encode())
    argv = (tmp_path / "net.pth", "--out", tmp_path / "out", "--no-verify", "--classes", tmp_path / "names.txt")
    assert call(from_torch.main, *argv)[0] == 0
    assert read_info(tmp_path / "out").classes == ("crêpe", "sushi roll", *"01234567")


UNUSABLE = {  # what the file of names holds: what the error must say
    b"a\nb\n": "names 2 classes, but the classifier of small.pth has 10",
    b"a\na\n": "a name twice",
    b"a\n\nb\n": "an empty line",
    b"": "an empty line",
    b"\xff\xfe": "cannot be read",
}


@pytest.mark.parametrize("content", UNUSABLE)
def test_class_names_that_do_not_fit_are_refused(content, tmp_path, small_file, refused):
    (tmp_path / "names.txt").write_bytes(content)
    line = refused(from_torch.main, small_file, "--out", tmp_path / "out", "--classes", tmp_path / "names.txt")
    assert UNUSABLE[content] in line and not (tmp_path / "out").exists()


def test_grey_preprocessing_of_a_network_for_colours_is_refused(tmp_path, small_file, refused):
    line = refused(from_torch.main, small_file, "--out", tmp_path / "out", "--preprocessing", "digits")
    assert "--preprocessing digits makes them grey" in line


def test_a_small_stem_is_proven_equal_too(tmp_path, call):
    network = lively_network("torchvision", small_stem=True)
    source = save(network, tmp_path / "net.pth")
    status, out, _ = call(from_torch.main, source, "--out", tmp_path / "out", "--small-stem", *SAID)
    assert status == 0 and "small stem" in out and "logits" in out and "differs" not in out
    info = read_info(tmp_path / "out")
    assert info.small_stem and info.preprocess == CIFAR10_EVAL
    conversion = convert.convert(convert.read(source), statements=convert.Statements(small_stem=True))
    assert_computes(conversion, network)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_networks_of_other_channels_convert(in_chans, tmp_path):
    network = lively_network("torchvision", in_chans=in_chans)
    conversion = convert.convert(convert.read(save(network, tmp_path / "net.pth")))
    assert conversion.info.in_chans == conversion.info.preprocess.channels == in_chans
    assert_computes(conversion, network)


class Stemmed(torch.nn.Module):
    """A network that keeps its max pool as a module, as torchvision's does."""

    def __init__(self, network, *pools):
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        if pools:
            self.maxpool = torch.nn.MaxPool2d(*pools)


@pytest.mark.parametrize(
    ("small", "pools", "statement", "expected"),
    [
        (True, (), None, True),
        (False, (3, 2, 1), None, False),
        (True, (3, 2, 1), None, None),  # Neither of both: the file does not settle it.
        (False, (), None, None),
        (True, (), False, False),
    ],
)
def test_a_whole_module_says_which_stem_it_has(small, pools, statement, expected, tmp_path):
    network = Stemmed(lively_network("torchvision", small_stem=small), *pools)
    torch.save({"model": network}, tmp_path / "net.pth")
    file = convert.read(tmp_path / "net.pth")
    assert file.small_stem == (expected if statement is None else small)
    conversion = convert.convert(file, statements=convert.Statements(small_stem=statement))
    assert conversion.module.small_stem == conversion.info.small_stem == bool(expected)


# Refusals


class Code:
    """Pickles as a call which leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def resnet_keys():
    keys = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "fc.weight": (1000, 512), "fc.bias": (1000,)}
    blocks = {f"layer{i}.{j}.conv{k}.weight": (64, 64, 3, 3) for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)}
    return {key: torch.zeros(shape) for key, shape in (keys | blocks).items()}


def altered(**changes):
    def alter(tensors):
        tensors = dict(tensors)
        for key, change in changes.items():
            key = key.replace("__", ".")
            tensors[key] = change(tensors.get(key))
        return {key: tensor for key, tensor in tensors.items() if tensor is not None}

    return alter


STAGE2_DEPTHWISE = [f"stage2__{unit}__branch2__3__weight" for unit in range(4)]
REFUSED = {  # name: (what the file holds, options, what the error must say)
    "missing": (None, (), ["no.pth", "No such file"]),
    "text": (lambda path: path.write_text("hello"), (), ["damaged or not a PyTorch file"]),
    "empty": (lambda path: path.write_bytes(b""), (), ["damaged or not a PyTorch file"]),
    "resnet": (lambda path: torch.save(resnet_keys(), path), (), ["no ShuffleNetV2"]),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), (), ["holds a Tensor"]),
    "no state dict": (lambda path: torch.save({"epoch": 3}, path), (), ["no state dict"]),
    "no averages": ("small", ("--ema",), ["no averaged weights"]),
    "other dialect": ("small", ("--dialect", "megvii"), ["has the names of torchvision, not of megvii"]),
    "misshapen": (altered(conv5__0__weight=lambda t: t[:-1]), (), ["conv5.0.weight is (1023, 192, 1, 1), not (1024"]),
    "nan": (altered(fc__bias=lambda t: t * torch.nan), (), ["not numbers that float32 holds: fc.bias"]),
    "negative variance": (altered(conv1__1__running_var=lambda t: -t), (), ["conv1.1.running_var"]),
    "all at once": (
        altered(
            conv1__0__weight=lambda t: None,
            stage3__2__branch2__3__weight=lambda t: t.mT[..., :1],
            extra=lambda t: torch.zeros(2),
            fc__bias=lambda t: None,
        ),
        (),
        ["missing: conv1.0.weight, fc.bias;", "unexpected: extra;", "misshapen: stage3.2.branch2.3.weight is"],
    ),
    "no stage2": (altered(**dict.fromkeys(STAGE2_DEPTHWISE, lambda t: None)), (), ["missing: stage2.0.branch2.3"]),
    "no classifier weight": (altered(fc__weight=lambda t: None), (), ["missing: fc.weight"]),
    "scalars": (altered(**dict.fromkeys(STAGE2_DEPTHWISE, lambda t: t.sum())), (), ["is ()"]),
    "number names": (lambda path: torch.save({0: torch.zeros(1), "a": torch.zeros(1)}, path), (), ["no state dict"]),
    "counter": (altered(conv1__1__num_batches_tracked=lambda t: torch.zeros(2)), (), ["not one whole number"]),
    "complex": (altered(fc__weight=lambda t: t + 1j), (), ["float32 holds: fc.weight"]),
    "double": (altered(fc__weight=lambda t: t.double() / 3), (), ["float32 holds: fc.weight"]),
    "integers": (altered(fc__weight=lambda t: t.to(torch.int8)), (), ["float32 holds: fc.weight"]),
    "sparse": (altered(fc__weight=lambda t: t.to_sparse()), (), ["sparse"]),
    "strange classes": (
        lambda path: torch.save({"meta": {"CLASSES": torch.zeros(2)}, "state_dict": resnet_keys()}, path),
        (),
        ["no ShuffleNetV2"],
    ),
    "twice": (altered(module__fc__bias=lambda t: torch.zeros(10)), (), ["fc.bias twice"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_give_one_line_and_no_directory(case, tmp_path, small_file, refused):
    content, options, told = REFUSED[case]
    path = tmp_path / "no.pth"
    if content == "small":
        path.write_bytes(small_file.read_bytes())
    elif content and content.__name__ == "alter":
        torch.save(content(torch.load(small_file, weights_only=True)), path)
    elif content:
        content(path)
    before = sorted(tmp_path.iterdir())
    line = refused(from_torch.main, path, "--out", tmp_path / "out", *options)
    assert all(words in line for words in told), line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_in_it_does_not_run(legacy, tmp_path, refused):
    torch.save(
        {"state_dict": Code(tmp_path / "trace")}, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy
    )
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Code(tmp_path / "trace")))
    assert "it was not loaded" in refused(from_torch.main, tmp_path / "evil.pth", "--out", tmp_path / "out")
    refused(from_torch.main, tmp_path / "plain.pth", "--out", tmp_path / "out")
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("legacy", [True, False])
def test_cut_files_are_damaged_wherever_they_are_cut(legacy, tmp_path, refused):
    save(lively_network("torchvision"), tmp_path / "whole.pth", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "whole.pth").read_bytes()
    for share in (0.01, 0.3, 0.9, 0.999):
        (tmp_path / "cut.pth").write_bytes(whole[: int(share * len(whole))])
        assert "damaged" in refused(from_torch.main, tmp_path / "cut.pth", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_kept_unless_it_is_a_model_to_be_overwritten(tmp_path, small_file, call, refused):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        assert "exists already" in refused(from_torch.main, small_file, "--out", tmp_path / "mine", *flags)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    argv = (small_file, "--out", tmp_path / "model", "--no-verify")
    assert call(from_torch.main, *argv)[0] == 0
    assert "--overwrite" in refused(from_torch.main, *argv)
    assert call(from_torch.main, *argv, "--overwrite")[0] == 0


def test_a_conversion_that_computes_something_else_exits_1_and_writes_nothing(tmp_path, small_file, call, monkeypatch):
    swapped = dict(dialects.TORCHVISION.unit, left_dw=dialects.TORCHVISION.unit["left_dw"])
    # Two batch norms of the same shape in each other's place: only running both networks can tell.
    swapped["right_pw1"], swapped["right_dw"] = (
        (swapped["right_pw1"][0], swapped["right_dw"][1]),
        (swapped["right_dw"][0], swapped["right_pw1"][1]),
    )
    wrong = dialects.dataclasses.replace(dialects.TORCHVISION, unit=swapped)
    monkeypatch.setitem(dialects.DIALECTS, "torchvision", wrong)
    status, out, _ = call(from_torch.main, small_file, "--out", tmp_path / "out")
    assert status == 1 and "nothing written" in out and not (tmp_path / "out").exists()


def test_a_training_or_a_model_with_other_files_is_never_overwritten(tmp_path, small_file, call, refused):
    assert call(from_torch.main, small_file, "--out", tmp_path / "model", "--no-verify")[0] == 0
    (tmp_path / "model/thesis.txt").touch()
    assert "exists already" in refused(from_torch.main, small_file, "--out", tmp_path / "model", "--overwrite")
    assert (tmp_path / "model/thesis.txt").exists()


def test_a_classifier_of_zeros_is_proven_equal_too(tmp_path, call):
    network = lively_network("torchvision")
    torch.nn.init.zeros_(network.fc.weight)
    torch.nn.init.zeros_(network.fc.bias)
    status, out, _ = call(from_torch.main, save(network, tmp_path / "z.pth"), "--out", tmp_path / "z")
    assert status == 0, out


@pytest.mark.parametrize(
    ("settings", "preprocess"), [({"small_stem": True}, CIFAR10_EVAL), ({"in_chans": 1}, DIGITS_EVAL)]
)
def test_a_stem_of_its_own_goes_there_and_back_under_torchvisions_names_alone(
    settings, preprocess, tmp_path, call, refused
):
    module, variables = convert_network(lively_network("torchvision", **settings), "torchvision")
    module = module.clone(**settings)
    save_model(tmp_path / "own", ModelInfo(0.5, "torchvision", 10, preprocess, **settings), variables)
    argv = (tmp_path / "own", "--out", tmp_path / "f.pth", "--dialect")
    assert "choose torchvision" in refused(to_torch.main, *argv, "mmpretrain")
    assert not (tmp_path / "f.pth").exists()
    status, _, stderr = call(to_torch.main, *argv, "torchvision")
    assert status == 0 and re.search("^warning: .*(stride 1|1 input channels)", stderr)
    options = ["--small-stem"] if "small_stem" in settings else []
    assert call(from_torch.main, tmp_path / "f.pth", "--out", tmp_path / "back", "--no-verify", *options)[0] == 0
    again, back, _ = load_model(tmp_path / "back")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, variables))


def test_to_torch_refuses_the_other_wiring(tmp_path, small_file, call, refused):
    assert call(from_torch.main, small_file, "--out", tmp_path / "model", "--no-verify")[0] == 0
    line = refused(to_torch.main, tmp_path / "model", "--dialect", "megvii", "--out", tmp_path / "f.pth")
    assert "wired like torchvision" in line and not (tmp_path / "f.pth").exists()


def test_the_older_mmpretrain_file_is_warned_of(tmp_path, small_file, call):
    path = tmp_path / "shufflenet_v2_batch1024_imagenet_20200804-8860eec9.pth"
    path.write_bytes(small_file.read_bytes())
    _, _, stderr = call(from_torch.main, path, "--out", tmp_path / "model", "--no-verify")
    assert "warning:" in stderr and "20200812-5bf4721e" in stderr


def test_a_pth_file_is_a_checkpoint_and_converted_once(small_file, monkeypatch):
    first = load_model(small_file)[1]
    monkeypatch.setattr(convert, "verify", lambda _: pytest.fail("converted again"))
    second = load_model(small_file)[1]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


# Real weights


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["mmpretrain", "torchvision"])
def test_real_weights_convert_within_tolerance_and_come_back_bit_for_bit(name, shared, tmp_path, call):
    source = shared / f"weights/shufflenet_v2_x1_0_{name}.pth"
    status, out, _ = call(from_torch.main, source, "--out", tmp_path / "model")
    assert status == 0 and f"{name}, 1.0x, torchvision layout, 1000 classes" in out
    rows = convert.verify(convert.convert(convert.read(source)))
    assert rows[-1].stage == "logits" and convert.table(rows) in out
    assert all(row.passed and row.single <= 1e-5 for row in rows), convert.table(rows)
    info = read_info(tmp_path / "model")
    assert info.source["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert info.preprocess.decoder == {"mmpretrain": "cv2", "torchvision": "pillow"}[name]
    assert call(to_torch.main, tmp_path / "model", "--dialect", name, "--out", tmp_path / "back.pth")[0] == 0
    ours, theirs = (torch.load(path, map_location="cpu", weights_only=True) for path in (tmp_path / "back.pth", source))
    assert_same_tensors(ours.get("state_dict", ours), theirs.get("state_dict", theirs))


@pytest.mark.real_data
def test_the_real_megvii_backbone_gives_pytorchs_features_dead_channels_included(shared):
    path = shared / "weights/shufflenet_v2_x0_5_backbone_megvii.pth"
    file = convert.read(path)
    conversion = convert.convert(file)
    variances = [leaf for path, leaf in jax.tree.leaves_with_path(conversion.variables) if path[-1].key == "var"]
    assert sum((leaf < 1e-7).sum() for leaf in variances) == 5
    assert conversion.info.preprocess.scale == 1 / 255 and conversion.info.preprocess.channel_order == "BGR"
    rows = convert.verify(conversion)
    assert [row.stage for row in rows] == ["stem", "stage2", "stage3", "stage4"]
    assert all(row.passed and row.single <= 1e-5 for row in rows), convert.table(rows)
    back = dialects.to_torch(conversion.variables, dialects.MEGVII_STAGES, conversion.info.source["batches_tracked"])
    assert_same_tensors(
        {key: torch.from_numpy(array) for key, array in back.items()},
        torch.load(path, map_location="cpu", weights_only=True),
    )


@pytest.mark.real_data
def test_the_pytorch_reference_itself_gives_mmpretrains_logits(shared):
    """The proof of a conversion is only as good as the network it compares with."""
    file = convert.read(shared / "weights/shufflenet_v2_x1_0_mmpretrain.pth")
    network = lively_network("mmpretrain", 1.0, 1000)
    network.load_state_dict({key: torch.from_numpy(array) for key, array in file.tensors.items()})
    info = convert.convert(file).info
    source = open_source(shared / "imagenet-original", classes=info.classes)
    batch = next(iter(eval_batches(source, info.preprocess, batch_size=8)))
    inputs = np.asarray(normalization.normalize(batch["images"], info.preprocess)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        logits = network(torch.from_numpy(inputs.copy()))[0].numpy()
    stored = np.load(shared / "imagenet-original/mmpretrain_reference.npz")
    rows = dict(zip(stored["name"], stored["logits"], strict=True))
    expected = np.stack([rows[name.split("/")[-1]] for name in batch["names"]])
    assert_allclose(logits, expected, atol=1e-3)  # Another build of PyTorch on another processor.
