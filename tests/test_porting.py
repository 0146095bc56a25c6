import hashlib
import pickle
import sys
import types

import jax
import numpy as np
import pytest
import torch
from conftest import convert_network, lively_network
from numpy.testing import assert_allclose

from shufflenet_jax.architecture import CHANNELS
from shufflenet_jax.checkpoint import read_info, save_model
from shufflenet_jax.commands import from_torch, to_torch
from shufflenet_jax.config import MMPRETRAIN_EVAL, ModelInfo
from shufflenet_jax.data import normalization
from shufflenet_jax.data.pipeline import eval_batches
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.errors import InputError
from shufflenet_jax.loading import load_model
from shufflenet_jax.model import ShuffleNetV2, init_variables
from shufflenet_jax.porting import convert, dialects

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


def ericsun99_wide():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHANNELS, 2.0, (224, 488, 976, 2048))
        return lively_network("ericsun99", 2.0).state_dict()


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
    "resnet": (lambda path: torch.save(resnet_keys(), path), (), ["not those of a ShuffleNetV2"]),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), (), ["holds a Tensor"]),
    "no state dict": (lambda path: torch.save({"epoch": 3}, path), (), ["no state dict"]),
    "224 wide": (lambda path: torch.save(ericsun99_wide(), path), (), ["224, 488, 976", "no published width"]),
    "no averages": ("small", ("--ema",), ["no averaged weights"]),
    "other dialect": ("small", ("--dialect", "megvii"), ["speaks torchvision, not megvii"]),
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
        ["not those of a ShuffleNetV2"],
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


def test_a_network_for_small_images_stays_in_jax(tmp_path, refused):
    module = ShuffleNetV2(width=0.5, num_classes=10, small_stem=True)
    info = ModelInfo(0.5, "torchvision", 10, MMPRETRAIN_EVAL, small_stem=True)
    save_model(tmp_path / "small", info, init_variables(module))
    argv = (tmp_path / "small", "--dialect", "torchvision", "--out", tmp_path / "f.pth")
    assert "a stem of its own" in refused(to_torch.main, *argv)
    assert not (tmp_path / "f.pth").exists()


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


def test_sizes_of_unknown_width_are_told_before_anything_else():
    tensors = {key: tensor.numpy() for key, tensor in ericsun99_wide().items()}
    with pytest.raises(InputError, match=r"2\.0x 244, 488, 976"):
        dialects.module_for(tensors, dialects.ERICSUN99)
