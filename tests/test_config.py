import dataclasses
import inspect
import json
import re

import numpy as np
import pytest
import simple_parsing.docstring as docstring
from numpy.testing import assert_allclose

from shufflenet_jax.commands.train import parse
from shufflenet_jax.config import DIGITS_EVAL, MMPRETRAIN_EVAL, ModelInfo, TrainConfig
from shufflenet_jax.errors import InputError
from shufflenet_jax.recipes import PRESETS

INFO = ModelInfo(0.5, "torchvision", 10, DIGITS_EVAL, classes=tuple("0123456789"), in_chans=1, small_stem=True)


def test_a_model_description_comes_back_as_it_was_written():
    assert ModelInfo.from_json(INFO.to_json()) == INFO
    assert json.loads(INFO.to_json())["preprocess"]["channel_order"] == "L"


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["a"]},
        {"in_chans": 3},
        {"preprocess": 3},
        {"preprocess": {**dataclasses.asdict(DIGITS_EVAL), "crop": 0}},
        {"preprocess": {**dataclasses.asdict(DIGITS_EVAL), "crop": 64}},
        {"preprocess": {**dataclasses.asdict(DIGITS_EVAL), "mean": []}},
        {"preprocess": {**dataclasses.asdict(DIGITS_EVAL), "std": [0.0]}},
        {"unknown": 1},
        {"width": 3.0},
        {"width": "1.0"},
        {"layout": "other"},
        {"num_classes": -1},
        {"num_classes": "10"},
        {"num_classes": True},
        {"conv5": False},
        {"source": []},
        {"preprocess": {**dataclasses.asdict(DIGITS_EVAL), "mean": ["a"]}},
        {"preprocess": {**dataclasses.asdict(DIGITS_EVAL), "decoder": "other"}},
        {"preprocess": {**dataclasses.asdict(DIGITS_EVAL), "channel_order": "XYZ"}},
    ],
)
def test_a_model_description_that_contradicts_itself_is_refused(change):
    with pytest.raises(InputError):
        ModelInfo.from_json(json.dumps({**json.loads(INFO.to_json()), **change}))


@pytest.mark.parametrize("text", ["", "[]", "3", '{"width": 1.0}', "null"])
def test_what_is_no_model_description_is_refused(text):
    with pytest.raises(InputError, match="not a model description"):
        ModelInfo.from_json(text)


def test_every_setting_of_a_training_has_its_meaning_in_help():
    for field in dataclasses.fields(TrainConfig):
        told = docstring.get_attribute_docstring(TrainConfig, field.name)
        assert len(told.comment_above) > 10, field.name
    assert inspect.getdoc(TrainConfig)


def test_help_shows_the_default_of_every_setting_and_none_twice(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10000")  # No text is broken.
    with pytest.raises(SystemExit):
        parse(["--config", "cifar10", "--help"])
    options = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    for told in options:
        assert told.count("(default:") <= 1, told
    told = {text.split(maxsplit=1)[0].rstrip(","): text.partition("\n\n")[0].rstrip() for text in options}
    for field in dataclasses.fields(TrainConfig):
        value = getattr(PRESETS["cifar10"], field.name)
        if value is not None:
            assert told["--" + field.name.replace("_", "-")].endswith(f"(default: {value})"), field.name


# What is told of each recipe, in numbers of its source and not of config.py; what is not named there is left out.
NOTHING = {
    "width": 1.0, "layout": "torchvision", "initial": "mmpretrain", "small_stem": False, "init_from": None,
    "freeze": "", "dropout": 0, "eval_size": 0, "eval_resize": 0, "crop": "random", "transform": "exact",
    "min_area": 0.08, "flip": True, "shift": 0, "color_jitter": 0, "trivial_augment": False, "random_erasing": 0,
    "aug_repeats": 1, "steps": 0, "recalibrate": 0, "scale_lr_from": 0, "lr_every": "step", "warmup_steps": 0,
    "warmup_epochs": 0, "warmup_first": False, "momentum": 0.9, "nesterov": False, "label_smoothing": 0,
    "class_weights": None, "mixup": 0, "cutmix": 0, "clip_norm": 0, "ema_decay": 0, "teacher": None, "dtype": "float32",
}  # fmt: skip
FACTS = {
    "in1k": NOTHING | {
        "image_size": 224, "batch_size": 1024, "bn_group_size": 64, "epochs": 300,
        "learning_rate": 0.5, "schedule": "linear", "warmup_steps": 5000, "warmup_factor": 0.1, "warmup": "constant",
        "weight_decay": 4e-5, "decay": "no_norm",
    },
    "in1k_megvii": NOTHING | {
        "layout": "megvii", "image_size": 224, "batch_size": 1024, "steps": 300_000,
        "color_jitter": 0.4, "label_smoothing": 0.1, "learning_rate": 0.5, "schedule": "linear",
        "weight_decay": 4e-5, "decay": "matrices", "recalibrate": 1250,  # A pass over the data.
    },
    "in1k_torchvision": NOTHING | {
        "width": 1.5, "initial": "pytorch", "image_size": 176, "eval_size": 224, "eval_resize": 232,
        "batch_size": 8 * 128, "bn_group_size": 128, "epochs": 600,
        "trivial_augment": True, "random_erasing": 0.1, "aug_repeats": 4, "mixup": 0.2, "cutmix": 1.0,
        "label_smoothing": 0.1, "learning_rate": 0.5, "schedule": "cosine", "lr_every": "epoch",
        "warmup_epochs": 5, "warmup_factor": 0.01, "warmup": "linear", "warmup_first": True,
        "weight_decay": 2e-5, "decay": "no_norm",
        # Of their 0.99998 the script makes this with batches of 1024, every 32 steps, in 600 epochs.
        "ema_decay": pytest.approx(1 - 2e-5 * 1024 * 32 / 600, rel=1e-12), "ema_every": 32,
    },
    "cifar10": NOTHING | {
        "initial": "pytorch", "small_stem": True, "image_size": 32, "crop": "center", "shift": 4,
        "batch_size": 256, "bn_group_size": 0, "epochs": 200,
        "learning_rate": 0.1, "schedule": "cosine", "nesterov": True, "weight_decay": 5e-4, "decay": "all",
    },
}  # fmt: skip
# Short side, crop, order of channels; then what is subtracted and divided by in 0..255.
INPUTS = {
    "in1k": (256, 224, "RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "in1k_megvii": (256, 224, "BGR", (0, 0, 0), (1, 1, 1)),
    "in1k_torchvision": (232, 224, "RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "cifar10": (32, 32, "RGB", (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_preset_has_every_number_of_its_source(name):
    config = PRESETS[name]
    assert {key: getattr(config, key) for key in FACTS[name]} == FACTS[name]
    taken = config.preprocess
    mean, std = (np.array(values) / taken.scale for values in (taken.mean, taken.std))
    *sides, mean_in_pixels, std_in_pixels = INPUTS[name]
    assert [taken.resize, taken.crop, taken.channel_order] == sides
    # Decimal fractions, rounded once more.
    assert_allclose((mean, std), (mean_in_pixels, std_in_pixels), rtol=1e-12)


def test_overrides_on_the_command_line_win_over_the_preset():
    config, options = parse(["--config", "digits", "--width", "1.5", "--batch-size", "32", "--remat"])
    changes = {"width": 1.5, "batch_size": 32, "remat": True}
    assert config == dataclasses.replace(PRESETS["digits"], **changes)
    assert options.config == "digits" and options.workdir is None


def test_large_images_are_evaluated_as_mmpretrain_does():
    assert TrainConfig(data="x").preprocess == MMPRETRAIN_EVAL
    small = TrainConfig(data="x", image_size=32).preprocess
    assert (small.resize, small.crop) == (32, 32)
