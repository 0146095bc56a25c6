"""Networks of other channels and units than the published ones."""

import dataclasses
import json
import logging

import jax
import pytest
import torch
from conftest import convert_network, lively_network
from numpy.testing import assert_array_equal
from random_tables import DIALECTS, assert_network_is_pytorchs, random_table

import shufflenet_jax as snet
from shufflenet_jax import accounting
from shufflenet_jax.accounting import count, total
from shufflenet_jax.architecture import TABLES, Table, fault_of, name_of, resolve_table
from shufflenet_jax.checkpoint import module_of, save_model
from shufflenet_jax.commands import from_torch, info, publish, train
from shufflenet_jax.config import MMPRETRAIN_EVAL, TORCHVISION_EVAL, ModelInfo, TrainConfig, current_settings
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.errors import InputError
from shufflenet_jax.loading import load_model
from shufflenet_jax.model import ShuffleNetV2, describe, variable_shapes
from shufflenet_jax.porting import dialects, reference
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.training.beginning import initial_variables
from shufflenet_jax.training.loop import describe_model

OWN = Table((24, 48, 96, 192, 192), (4, 8, 4))
SMALL = Table((4, 6, 10, 14, 9), (1, 2, 1))

# Names and faults


def test_a_table_has_the_name_of_its_width_or_of_its_numbers():
    assert [name_of(table) for table in TABLES.values()] == ["0.5x", "1.0x", "1.5x", "2.0x"]
    assert name_of(OWN) == "24,48,96,192,192/4,8,4" and name_of(OWN, conv5=False) == "24,48,96,192/4,8,4"
    assert resolve_table(0.5, repeats=[4, 8, 1]) == Table(TABLES[0.5].channels, (4, 8, 1))
    assert resolve_table(None, [24, 116, 232, 464, 1024]) == TABLES[1.0]
    assert describe(ShuffleNetV2(channels=[24, 48, 96, 192, 192])).startswith("24,48,96,192,192/4,8,4, torchvision")
    with pytest.raises(InputError, match=r"width is 0\.7"):
        resolve_table(0.7, OWN.channels)
    with pytest.raises(InputError, match="width is None"):
        resolve_table(None, repeats=(4, 8, 4))
    with pytest.raises(InputError, match=r"channels is '24,48'.*whole numbers"):
        resolve_table(None, "24,48")


@pytest.mark.parametrize(
    ("layout", "channels", "repeats", "reason"),
    [
        ("torchvision", (24, 49, 96, 192, 192), (4, 8, 4), "stage2 has 49 channels, an odd number"),
        ("torchvision", (24, 48, 96, 192), (4, 8, 4), "channels has 4 numbers, but must have 5"),
        ("torchvision", (24, 48, 96, 192, 192), (4, 8), "repeats has 2 numbers, but must have 3"),
        ("torchvision", (24, 48, 96, 192, 192), (4, 0, 4), "stage3 has 0 units"),
        ("torchvision", (24, 48, 96, 192, 192), (4, 101, 4), "stage3 has 101 units"),
        ("torchvision", (0, 48, 96, 192, 192), (4, 8, 4), "stem has 0 channels"),
        ("torchvision", (24, 48, 96, 192, 20_000), (4, 8, 4), "conv5 has 20,000 channels"),
        ("megvii", (24, 48, 48, 192, 192), (4, 8, 4), "stage3 has 48 channels, but in layout megvii"),
        ("megvii", (25, 26, 28, 30, 1), (1, 1, 1), None),
        ("torchvision", (25, 24, 2, 30, 1), (1, 1, 1), None),
    ],
)
def test_a_table_that_cannot_be_has_a_reason(layout, channels, repeats, reason):
    table = Table(channels, repeats)
    fault = fault_of(table, layout)
    assert fault is None if reason is None else fault.startswith(reason)
    if reason is None:
        assert variable_shapes(ShuffleNetV2(channels=channels, repeats=repeats, layout=layout))
        return
    for build in (
        lambda: variable_shapes(ShuffleNetV2(channels=channels, repeats=repeats, layout=layout)),
        lambda: TrainConfig(data="x", channels=channels, repeats=repeats, layout=layout),
        lambda: ModelInfo(None, layout, 10, MMPRETRAIN_EVAL, channels=channels, repeats=repeats),
    ):
        with pytest.raises(InputError, match=reason):
            build()


# Against PyTorch


@pytest.mark.parametrize("dialect", ["torchvision", "megvii"])  # tests/slow has all.
def test_a_network_of_a_random_table_is_pytorchs_in_every_form(dialect, tmp_path):
    table = random_table(0, dialects.DIALECTS[dialect].layout)
    assert_network_is_pytorchs(dialect, table._replace(repeats=(1, 2, 1)), tmp_path)


WILD = [  # Tables of networks that people have published.
    ("ericsun99", Table((24, 224, 488, 976, 2048), (4, 8, 4))),  # Its own 2.0x.
    ("torchvision", Table((24, 64, 128, 192, 256), (4, 8, 1))),
    ("torchvision", Table((24, 24, 48, 96, 512), (4, 8, 4))),  # 0.25x for microcontrollers.
    ("mmpretrain", Table((24, 116, 232, 464, 128), (4, 8, 4))),
    ("megvii", Table((24, 48, 96, 192, 192), (3, 7, 3))),
    ("megvii-stages", Table((8, 32, 64, 128, 192), (4, 8, 4))),
    *((dialect, TABLES[1.0]) for dialect in DIALECTS),
]


@pytest.mark.parametrize(("dialect", "table"), WILD)
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("conv5", [True, False])
def test_the_table_is_read_from_names_and_shapes(dialect, table, prefix, conv5):
    with torch.device("meta"):  # Shapes alone.
        network = reference.NETWORKS[dialect](table, 3 if conv5 else 0, conv5=conv5)
    tensors = {prefix + key: tensor for key, tensor in network.state_dict().items()}
    (found,) = dialects.find_networks(tensors)
    assert (found.dialect, found.prefix) == (dialect, prefix + "backbone." * (dialect == "mmpretrain"))
    named, left_out = dialects.canonical(tensors, found)
    assert named.keys() == network.state_dict().keys() and not left_out
    module = dialects.module_for(named, dialects.DIALECTS[dialect])
    expected = table if conv5 or table in TABLES.values() else Table((*table.channels[:4], 1024), table.repeats)
    assert (module.table, module.num_classes, module.conv5) == (expected, 3 if conv5 else 0, conv5)
    assert module.width == next((width for width, published in TABLES.items() if published == expected), None)


def test_published_preprocessing_goes_by_width_and_other_tables_have_the_usual_one():
    rules = dialects.DIALECTS["torchvision"]
    assert rules.preprocess_of(TABLES[2.0]).resize == 232
    assert rules.preprocess_of(TABLES[2.0]._replace(repeats=(4, 8, 3))) == TORCHVISION_EVAL


# Files that hold no network


def wider(tensors, starts, axis, by):
    """The tensors with more along an axis of those whose names begin so."""

    def grow(tensor):
        return torch.cat([tensor, *[tensor.narrow(axis, 0, 1)] * by], axis)

    return {key: grow(t) if key.startswith(starts) and t.ndim > axis else t for key, t in tensors.items()}


def odd(tensors):
    """Of torchvision's naming: stage2 puts out one channel more."""
    layers = ("stage2.0.branch2.5.", "stage2.0.branch2.6.", "stage3.0.branch1.0", "stage3.0.branch1.1")
    tensors = wider(tensors, layers, 0, 1)
    return wider(tensors, ("stage3.0.branch1.2.weight", "stage3.0.branch2.0.weight"), 1, 1)


def unequal(tensors):
    """The left branch of stage3's first unit puts out less, the right one as much more."""
    tensors = wider(tensors, ("stage3.0.branch2.5.", "stage3.0.branch2.6."), 0, 2)
    return {
        key: t[:-2] if key.startswith(("stage3.0.branch1.2", "stage3.0.branch1.3")) and t.ndim else t
        for key, t in tensors.items()
    }


def without(*starts):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(starts)}


def narrow(tensors):
    """Of Megvii's naming: stage2 has as many channels as the stem."""
    halves = [f"features.{unit}.branch_main." for unit in range(SMALL.repeats[0])]
    return {key: t[:2] if key.startswith(tuple(halves)) and t.ndim else t for key, t in tensors.items()}


MEGVII_UNITS = "features.1.", "features.2."  # SMALL's stage3.
REFUSED = {  # name: (dialect, change, what the error must say)
    "odd": ("torchvision", odd, ["stage2 has 7 channels (stage3.0.branch1.0.weight), an odd number"]),
    "odd at the end": (
        "mmpretrain",
        lambda tensors: wider(tensors, "backbone.layers.3.conv.weight", 1, 1),
        ["net.pth: stage4 has 15 channels (backbone.layers.3.conv.weight), an odd number"],
    ),
    "unequal halves": (
        "torchvision",
        unequal,
        ["the halves of stage3 do not fit", "first unit has 3 channels (stage3.0.branch1.2.weight), not 5"],
    ),
    "no stage3": ("torchvision", without("stage3."), ["stage3 has no units: stage3.0.branch2.3.weight is missing"]),
    "two stages": ("megvii", without(*MEGVII_UNITS), ["form 2 stages", "features.3.branch_proj.0.weight"]),
    "as narrow as the stem": ("megvii", narrow, ["stage2 has 4 channels, but in layout megvii", "(features.0."]),
    "a unit without tensors": ("torchvision", without("stage3.0.branch2."), ["missing: stage3.0.branch2.0.weight"]),
    "a tensor too many": (
        "torchvision",
        lambda tensors: {**tensors, "stage3.7.branch2.0.weight": torch.zeros(1)},
        ["unexpected: stage3.7.branch2.0.weight", "4,6,10,14,9/1,2,1"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_whose_table_cannot_be_is_refused_with_the_reason_and_the_tensor(name, tmp_path, refused):
    dialect, change, reasons = REFUSED[name]
    tensors = change(lively_network(dialect, SMALL).state_dict())
    torch.save({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "net.pth")
    line = refused(from_torch.main, tmp_path / "net.pth", "--out", tmp_path / "model")
    for reason in reasons:
        assert reason in line, line
    assert not (tmp_path / "model").exists()


# Settings and files


def test_settings_keep_a_published_table_by_its_width_alone_and_others_without_one():
    for make in (
        lambda **table: TrainConfig(data="x", **table),
        lambda width=1.0, **table: ModelInfo(width, "torchvision", 10, MMPRETRAIN_EVAL, **table),
    ):
        published = make(channels=TABLES[0.5].channels)
        assert (published.width, published.channels, published.repeats) == (0.5, None, None)
        own = make(width=1.5, channels=OWN.channels)
        assert (own.width, own.channels, own.repeats) == (None, *OWN)
        assert dataclasses.replace(own) == own and own.table == OWN


def test_model_json_has_the_table_and_older_files_are_read_as_before():
    own = ModelInfo(None, "torchvision", 10, MMPRETRAIN_EVAL, channels=OWN.channels)
    described = json.loads(own.to_json())
    assert [described[name] for name in ("width", "channels", "repeats")] == [None, [24, 48, 96, 192, 192], [4, 8, 4]]
    assert ModelInfo.from_json(own.to_json()) == own and module_of(own).table == OWN
    older = json.loads(ModelInfo(1.0, "torchvision", 10, MMPRETRAIN_EVAL).to_json())
    assert older.pop("channels") is None and older.pop("repeats") is None
    assert ModelInfo.from_json(json.dumps(older)).table == TABLES[1.0]
    for change in ({"width": None}, {"channels": [24, "48"]}, {"channels": [24]}, {"repeats": 4}, {"width": 0.7}):
        with pytest.raises(InputError, match=r"model\.json"):
            ModelInfo.from_json(json.dumps(older | change))


def test_a_command_line_gives_a_table_instead_of_a_width(refused):
    def table_of(*words):
        config, _ = train.parse(["--config", *words])
        return config.width, config.table

    assert table_of("digits") == (0.5, TABLES[0.5])
    assert table_of("in1k", "--channels", "24,48,96,192,192") == (None, OWN)
    assert table_of("in1k_torchvision", "--repeats=4,8,1") == (None, Table(TABLES[1.5].channels, (4, 8, 1)))
    assert table_of("digits", "--channels", "24,116,232,464,1024") == (1.0, TABLES[1.0])
    own = ("--channels", "24,48,96,192,192")
    cases = {
        (*own, "--width", "1.0"): "--channels describes the network instead of --width",
        ("--channels", "24;48"): "'24;48' is not a list of whole numbers",
        ("--channels", "24,48"): "channels has 2 numbers",
        ("--repeats", "4"): "--aug-repeats says how often a pass uses each image",
        (*own, "--repeats", "4,0,4"): "stage3 has 0 units",
    }
    for words, reason in cases.items():
        assert reason in refused(train.main, "--config", "digits", *words), words
    assert "omit one of them" in refused(info.main, *own, "--width", "1.0")


def test_a_workdir_of_older_code_has_its_table_by_width_and_its_repeats_under_their_earlier_name():
    older = dataclasses.asdict(TrainConfig(data="x", width=1.5, aug_repeats=4))
    older |= {"repeats": older.pop("aug_repeats")}
    del older["channels"]
    assert current_settings(older) == dataclasses.asdict(TrainConfig(data="x", width=1.5, aug_repeats=4))
    own = dataclasses.asdict(TrainConfig(data="x", channels=OWN.channels))
    assert current_settings(json.loads(json.dumps(own))) == own


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The model directory of a SMALL network with three classes."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    described = ModelInfo(None, "torchvision", 3, MMPRETRAIN_EVAL, **SMALL._asdict())
    save_model(folder, described, convert_network(lively_network("torchvision", SMALL, 3), "torchvision")[1])
    return folder


def test_trained_weights_keep_their_table(stored, tmp_path):
    module, _ = snet.load(stored)
    assert module.table == SMALL and module.num_classes == 3
    assert snet.load(stored, channels=list(SMALL.channels), repeats=SMALL.repeats)[0].table == SMALL
    with pytest.raises(InputError, match=r"channels is .* have \(4, 6, 10, 14, 9\); leave channels out"):
        snet.load(stored, channels=OWN.channels)
    assert load_model(publish_to(tmp_path, stored))[0].table == SMALL
    assert "| ShuffleNetV2 4,6,10,14,9/1,2,1, torchvision layout |" in next(tmp_path.glob("own-*/*.md")).read_text()


def publish_to(folder, stored):
    assert publish.main([str(stored), "--out", str(folder), "--name", "own", "--licence", "MIT"]) == 0
    return next(folder.glob("own-*"))


# Training


def begin(stored, table, **settings):
    """What a training of a network with a table begins with."""
    config = TrainConfig(data="x", channels=table.channels, repeats=table.repeats, init_from=str(stored), **settings)
    described = ModelInfo(None, "torchvision", 3, MMPRETRAIN_EVAL, **table._asdict())
    return initial_variables(module_of(described, lowering="reference", initial="pytorch"), config, described)


def test_a_training_begins_with_what_fits_of_another_table_and_says_what_does_not(stored, caplog):
    caplog.set_level(logging.INFO, "shufflenet_jax")
    theirs = load_model(stored)[1]
    ours = begin(stored, Table((4, 6, 10, 16, 9), (2, 1, 1)))
    assert "table 4,6,10,14,9/1,2,1, the network to train 4,6,10,16,9/2,1,1" in caplog.text
    assert "not in this network: stage3_unit1" in caplog.text and "begins with 60 of 102 tensors" in caplog.text
    changed = [f"stage4_unit0/{name}" for name in ("left_pw", "right_dw", "right_pw1", "right_pw2")]
    changed = ["conv5", "fc", "stage2_unit1", *changed]  # The classifier would fit, but belongs to conv5's outputs.
    assert caplog.text.partition("reinitialized: ")[2].strip().split(", ") == changed
    for layer in ("conv1", "stage2_unit0", "stage3_unit0"):
        for kind in ("params", "batch_stats"):
            jax.tree.map(assert_array_equal, ours[kind][layer], theirs[kind][layer])
    assert_array_equal(*(tree["params"]["stage4_unit0"]["left_dw"]["conv"]["kernel"] for tree in (ours, theirs)))


def test_a_training_refuses_a_table_of_which_nothing_fits_and_to_freeze_what_does_not(stored):
    with pytest.raises(InputError, match="whose stage4 do not fit"):
        begin(stored, Table((4, 6, 10, 16, 9), (2, 1, 1)), freeze="conv1,stage4")
    with pytest.raises(InputError, match="omit `init_from`"):
        begin(stored, Table((5, 8, 12, 16, 8), (1, 1, 1)))


def test_a_run_describes_the_network_of_its_table():
    config = dataclasses.replace(PRESETS["digits"], channels=SMALL.channels, repeats=SMALL.repeats)
    described = describe_model(config, open_source("digits", "train"))
    assert described.table == SMALL and described.width is None and described.small_stem
    assert described.source["config"]["channels"] == SMALL.channels


# info


def test_info_shows_any_table_and_compares_several(call, refused, monkeypatch):
    monkeypatch.setattr(accounting, "SECONDS", 0.1)
    status, out, _ = call(info.main, "--channels", "4,6,10,14,9", "--repeats", "1,2,1", "--json")
    found = json.loads(out)
    module = ShuffleNetV2(channels=SMALL.channels, repeats=SMALL.repeats)
    assert status == 0 and found["total"] == total(count(module, 224, 224))
    assert (found["width"], found["channels"], found["repeats"]) == (None, [4, 6, 10, 14, 9], [1, 2, 1])

    argv = ("--compare", "4,6,10,14,9/1,2,1", "4,6,10,14,9/1,1,1", "--num-classes", 3, "--resolution", 32)
    status, out, stderr = call(info.main, *argv, "--json")
    first, second = json.loads(out)["networks"]
    assert status == 0 and first["name"] == "4,6,10,14,9/1,2,1" and second["repeats"] == [1, 1, 1], stderr
    expected = total(count(module.clone(num_classes=3), 32, 32))
    assert {key: first[key] for key in expected} == expected
    assert first["parameters"] > second["parameters"] and 0 < first["milliseconds"] < 1000
    lines = call(info.main, *argv)[1].splitlines()
    assert lines[1].split() == ["table", "parameters", "multiply-adds", "activations", "ms"]
    assert lines[2].split()[:2] == ["4,6,10,14,9/1,2,1", f"{first['parameters']:,}"]

    cases = {
        ("--compare", "0.7"): "'0.7' is neither a width",
        ("--compare", "4,6"): "channels has 2 numbers",
        ("--compare", "--width", "1.0"): "leave out --width",
        ("--compare", "24,49,96,192,192"): "stage2 has 49 channels, an odd number",
    }
    for words, reason in cases.items():
        assert reason in refused(info.main, *words), words
