import dataclasses
import inspect
import json

import pytest
import simple_parsing.docstring as docstring

from shufflenet_jax.commands.train import parse
from shufflenet_jax.config import DIGITS_EVAL, MMPRETRAIN_EVAL, PRESETS, ModelInfo, TrainConfig
from shufflenet_jax.errors import InputError

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


def test_overrides_on_the_command_line_win_over_the_preset():
    config, options = parse(["--config", "digits", "--width", "1.5", "--batch-size", "32", "--remat"])
    changes = {"width": 1.5, "batch_size": 32, "remat": True}
    assert config == dataclasses.replace(PRESETS["digits"], **changes)
    assert options.config == "digits" and options.workdir is None


def test_large_images_are_evaluated_as_mmpretrain_does():
    assert TrainConfig(data="x").preprocess == MMPRETRAIN_EVAL
    small = TrainConfig(data="x", image_size=32).preprocess
    assert (small.resize, small.crop) == (32, 32)
