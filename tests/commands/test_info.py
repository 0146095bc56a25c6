import json

import pytest
import torch
from conftest import ROOT
from test_model import PARAMETERS

from shufflenet_jax import __main__
from shufflenet_jax.accounting import count, total
from shufflenet_jax.architecture import TABLES
from shufflenet_jax.commands import info
from shufflenet_jax.loading import load_model
from shufflenet_jax.model import ShuffleNetV2
from shufflenet_jax.porting import reference

DIALECTS = {"torchvision": "torchvision", "megvii": "megvii-stages"}  # layout: a dialect that names its stages
STAGES = {"conv1": "stem", "first_conv": "stem", "conv_last": "conv5", "classifier": "fc"}


@pytest.fixture
def one_thread():
    """PyTorch in one thread: on a busy machine two wait for each other a hundred times longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(layout, width, *, small_stem=False):
    """The PyTorch reference; it has no small stem of its own."""
    torch.manual_seed(0)
    built = reference.NETWORKS[DIALECTS[layout]](TABLES[width], 1000).eval()
    if small_stem:
        getattr(built, built.first)[0].stride = (1, 1)
    return built


def forward(network, x, *, small_stem=False):
    """Every stage's output, the classifier's last."""
    if not small_stem:
        logits, features = network(x)
        del features["pooled"]
        return {**features, "fc": logits}
    features = {}
    stages = zip(("stage2", "stage3", "stage4"), network.units, strict=True)
    conv1, conv5, fc = (getattr(network, name) for name in (network.first, network.last, network.fc_name))
    for name, layers in [("stem", conv1), *stages, ("conv5", conv5)]:
        x = features[name] = torch.nn.Sequential(*layers)(x)
    return {**features, "fc": fc(x.mean((2, 3)))}


def count_by_hooks(layout, width, resolution, *, small_stem=False):
    """{stage: [parameters, multiply-adds, the same with norms, activations, output]} as PyTorch runs it."""
    with torch.device("meta"):  # Shapes alone.
        module = network(layout, width, small_stem=small_stem)
        images = torch.empty(1, 3, *resolution)
    rows = {}

    def row(name):
        first = name.partition(".")[0]
        return rows.setdefault(STAGES.get(first, first), [0, 0, 0, 0, None])

    def hook(layer, name):
        def seen(_module, _inputs, output):
            if isinstance(layer, torch.nn.BatchNorm2d):
                row(name)[2] += 2 * output.numel()
            elif isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                products = output.numel() * layer.weight[0].numel()
                row(name)[1] += products
                row(name)[2] += products
                row(name)[3] += output.numel()

        return seen

    for name, tensor in module.named_parameters():
        row(name)[0] += tensor.numel()
    for name, layer in module.named_modules():
        layer.register_forward_hook(hook(layer, name))
    for name, output in forward(module, images, small_stem=small_stem).items():
        rows[name][4] = (*output.shape[2:], output.shape[1])
    return rows


@pytest.mark.parametrize(("layout", "width"), PARAMETERS)
def test_parameters_are_the_published_ones(layout, width):
    assert total(count(ShuffleNetV2(width=width, layout=layout), 64, 64))["parameters"] == PARAMETERS[layout, width]


def test_multiply_adds_at_224_are_the_published_ones_in_both_countings():
    stages = count(ShuffleNetV2(), 224, 224)
    classifier = stages[-1].multiply_adds
    assert classifier == 1024 * 1000
    assert round((total(stages)["multiply_adds"] - classifier) / 1e6, 1) == 143.9
    assert round(total(stages)["multiply_adds"] / 1e6, 1) == 144.9
    assert round(total(stages)["multiply_adds_with_norms"] / 1e6, 1) == 148.8  # MMPretrain's 149 M.


@pytest.mark.parametrize(
    ("layout", "width", "resolution", "small_stem"),
    [
        ("torchvision", 0.5, (224, 224), False),
        ("torchvision", 1.0, (224, 224), False),
        ("torchvision", 1.0, (225, 97), False),
        ("torchvision", 2.0, (33, 31), True),
        ("megvii", 1.0, (224, 224), False),
        ("megvii", 1.5, (1, 163), False),
    ],
)
def test_every_stage_costs_what_pytorch_does(layout, width, resolution, small_stem):
    expected = count_by_hooks(layout, width, resolution, small_stem=small_stem)
    stages = count(ShuffleNetV2(width=width, layout=layout, small_stem=small_stem), *resolution)
    assert [stage.name for stage in stages] == list(expected)
    for stage in stages:
        assert [*stage[1:5], stage.output] == expected[stage.name], stage.name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("layout", "small_stem"), [("torchvision", False), ("megvii", False), ("torchvision", True)])
def test_the_receptive_field_is_how_far_a_nan_reaches_in_pytorch(layout, small_stem):
    """A NaN in one column of an image spreads to all outputs that depend on it, and to no others."""
    *stages, classifier = count(ShuffleNetV2(width=0.5, layout=layout, small_stem=small_stem), 1, 640)
    assert classifier.receptive_field is None and classifier.stride is None
    images = torch.zeros(len(stages), 4, 3, 1, 640)
    for stage, four in zip(stages, images, strict=True):
        reach = (stage.receptive_field - 1) // 2  # To both sides of the middle, where every stage has an output.
        for image, offset in zip(four, (-reach - 1, -reach, reach, reach + 1), strict=True):
            image[..., 320 + offset] = torch.nan
    with torch.inference_mode():
        outputs = forward(network(layout, 0.5, small_stem=small_stem), images.flatten(0, 1), small_stem=small_stem)
    for index, stage in enumerate(stages):
        four = outputs[stage.name].unflatten(0, (len(stages), 4))[index]
        seen = four[:, :, 0, 320 // stage.stride].isnan().any(1)
        assert seen.tolist() == [False, True, True, False], stage


def test_what_a_module_lacks_costs_nothing():
    backbone = count(ShuffleNetV2(width=0.5, num_classes=0, conv5=False), 64, 64)
    assert [stage.name for stage in backbone] == ["stem", "stage2", "stage3", "stage4"]


def test_lowering_and_rematerialisation_do_not_matter():
    module = ShuffleNetV2(width=0.5, lowering="reference")
    assert count(module, 64, 48) == count(module.clone(lowering="cpu", remat=True), 64, 48)


def test_info_prints_a_row_a_stage_and_the_sums(call):
    status, out, stderr = call(__main__.main, "info")
    head, names, *rows, _ = out.splitlines()
    assert status == 0 and not stderr and "1.0x" in head and "224 x 224 x 3" in head
    assert names.split()[0] == "stage" and names.split()[-1] == "output"
    assert [row.split()[0] for row in rows] == ["stem", "stage2", "stage3", "stage4", "conv5", "fc", "total"]
    assert "2,278,604" in rows[-1] and rows[0].endswith("56 x 56 x 24") and rows[-2].endswith("1000")


def test_info_as_json_is_what_count_returns(call):
    argv = ("--width", "0.5", "--layout", "megvii", "--num-classes", 7, "--in-chans", 1, "--small-stem")
    status, out, _ = call(info.main, *argv, "--resolution", "33x20", "--json")
    found = json.loads(out)
    module = ShuffleNetV2(width=0.5, layout="megvii", num_classes=7, in_chans=1, small_stem=True)
    stages = count(module, 33, 20)
    assert status == 0 and found.pop("total") == total(stages)
    assert found.pop("stages") == [{**stage._asdict(), "output": list(stage.output)} for stage in stages]
    table = {"width": 0.5, "channels": [24, 48, 96, 192, 1024], "repeats": [4, 8, 4]}
    settings = {**table, "layout": "megvii", "num_classes": 7, "in_chans": 1, "small_stem": True}
    assert found == {**settings, "resolution": [33, 20]}


def test_info_takes_settings_and_resolution_from_a_checkpoint(ten_classes, call, refused):
    model, _ = ten_classes
    module, _, _ = load_model(model)
    status, out, _ = call(info.main, "--checkpoint", model, "--json")
    found = json.loads(out)
    assert status == 0 and found["width"] == 0.5 and found["num_classes"] == 10
    assert found["resolution"] == [224, 224] and found["total"] == total(count(module, 224, 224))
    found = json.loads(call(info.main, "--checkpoint", model, "--json", "--resolution", 96)[1])
    assert found["resolution"] == [96, 96]
    assert "leave out --width" in refused(info.main, "--checkpoint", model, "--width", "1.0")
    assert "no model at" in refused(info.main, "--checkpoint", ROOT / "none")


@pytest.mark.parametrize("text", ["0", "abc", "10x", "x10", "10x0", "3x3x3", "-1", "1.5", "", "9" * 30])
def test_info_refuses_what_is_no_resolution(text, refused):
    assert "--resolution" in refused(info.main, f"--resolution={text}")


@pytest.mark.parametrize(
    ("option", "value"), [("width", "0.7"), ("layout", "other"), ("num-classes", "-1"), ("in-chans", "0")]
)
def test_info_refuses_settings_that_no_network_has(option, value, refused):
    assert f"--{option}" in refused(info.main, f"--{option}={value}")
