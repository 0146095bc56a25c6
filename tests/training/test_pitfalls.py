"""Trainings that run but cannot reach what they are meant to are warned of; advice names what the command has."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from small_training import TINY_TABLE

from shufflenet_jax.batch_groups import Epoch, plan_batch
from shufflenet_jax.commands import evaluate, train
from shufflenet_jax.data.sources import Source
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.training.pitfalls import warn_of_collapse, warn_of_pitfalls

pytestmark = pytest.mark.usefixtures("three_units")

CONFIG = dataclasses.replace(PRESETS["digits"], batch_size=10, learning_rate=0.5, epochs=1)


def source_of(*labels, classes=("cat", "dog", "owl"), **settings):
    return Source(len(labels), pytest.fail, len(classes), classes, lambda: labels, **settings)


def warnings_of(caplog, train=(0, 1, 2) * 20, evaluated=(0, 1, 2), **settings):
    """What a training on these labels is warned of."""
    config, data = dataclasses.replace(CONFIG, **settings), source_of(*train)
    epoch = Epoch(len(data), plan_batch(config.batch_size, 0, 1))
    warn_of_pitfalls(config, epoch, data, source_of(*evaluated))
    return "\n".join(caplog.messages)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({}, None),
        # A tenth of a rate that falls from 0.5 in six steps: highest in the first one.
        ({"warmup_steps": 6}, "takes 6 steps, the run only 6: its learning rate reaches 0.05 instead of 0.5"),
        ({"warmup_steps": 5}, None),
        ({"warmup_epochs": 2}, "takes 12 steps, the run only 6"),
        # 0.5 (6 - t) / 6 (0.1 + 0.9 t / 6) is largest at t = 3.
        ({"warmup_steps": 6, "warmup": "linear"}, "reaches 0.138 instead of 0.5"),
        # In the last step: 0.5 (0.1 + 0.9 * 5 / 5000).
        ({"warmup_steps": 5000, "warmup": "linear", "schedule": "constant"}, "reaches 0.0505 instead of 0.5"),
        ({"steps": 4, "warmup_steps": 4}, "takes 4 steps, the run only 4"),
        ({"batch_size": 60}, None),
        ({"batch_size": 100}, "batch_size is 100, but there are only 60 training images: each of the 1 steps takes 60"),
        ({"batch_size": 100, "epochs": 7}, "each of the 7 steps takes 60 images"),
        ({"train": (0, 1) * 30, "evaluated": (0, 1)}, "of 3 classes these have no images at all: 1 (owl)"),
        ({"train": (0, 1) * 30}, "1 of 3 evaluation images are of classes without training images: 1 (owl)"),
        ({"train": (0, 1) * 30}, "top-1 cannot exceed 66.67 %"),
        ({"train": (1,) * 60, "evaluated": (0, 0, 2, 1)}, "3 of 4 evaluation images"),
    ],
)
def test_settings_and_data_that_cannot_lead_far_are_warned_of_with_their_numbers(case, said, caplog):
    found = warnings_of(caplog, **case)
    assert said in found if said else not found


def test_labels_that_would_have_to_be_read_are_not_read(caplog):
    epoch = Epoch(60, plan_batch(10, 0, 1))
    unread = dataclasses.replace(source_of(*[0] * 60, labels_at_hand=False), labels=pytest.fail)
    warn_of_pitfalls(CONFIG, epoch, unread, unread)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("predicted", "top1", "classes", "said"),
    [
        ((0, 9, 0), 30.0, ("cat", "dog", "owl"), "predicts class dog for all 9 evaluation images, 30.00 % of which"),
        ((0, 1200, 0), 30.0, None, "predicts class 1 for all 1,200 evaluation images"),
        ((9, 0), 0.0, ("n01440764", "x"), "predicts class tench for all"),
        ((0, 8, 1), 30.0, None, None),
        ((0, 9, 0), 100.0, None, None),
        ((0, 1, 0), 0.0, None, None),
    ],
)
def test_one_class_for_all_images_is_warned_of(predicted, top1, classes, said, caplog):
    warn_of_collapse(46, np.array(predicted), top1, 0.25, classes)
    if said:
        assert said in caplog.text and "step 46" in caplog.text and "rate of 0.25;" in caplog.text
    else:
        assert not caplog.text


def put_images(root, counts):
    """Write {<split>/<class>: number of images}."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


TRAINING = ("--config", "digits", "--image-size", 16, "--lowering", "reference", *TINY_TABLE)


def test_a_training_warns_at_its_start_and_in_its_log(tmp_path, call):
    data = put_images(tmp_path / "pets", {"train/cat": 32, "val/cat": 1, "val/dog": 3, "train/owl": 0})
    argv = (*TRAINING, "--data", data, "--batch-size", 64, "--epochs", 8, "--eval-every", 8, "--learning-rate", 0.5)
    status, _, stderr = call(train.main, *argv, "--warmup-steps", 8, "--workdir", tmp_path / "run")
    assert status == 0, stderr
    warned = [line for line in stderr.splitlines() if line.startswith("warning: ")]
    for words in (
        "the warm-up takes 8 steps, the run only 8: its learning rate reaches 0.05 instead of 0.5; shorten the warm-up "
        "(--warmup-steps, --warmup-epochs)",
        "batch_size is 64, but there are only 32 training images: each of the 8 steps takes 32 images; lower "
        "--batch-size",
        "3 of 4 evaluation images are of classes without training images: 1 (dog); top-1 cannot exceed 25.00 %",
        "of 3 classes these have no images at all: 1 (owl)",
        # It has seen nothing else.
        "step 8: the network predicts class cat for all 4 evaluation images, 25.00 % of which",
    ):
        assert sum(words in line for line in warned) == 1, (words, stderr)


FOLDERS = {
    "train alone": {"train/cat": 2, "train/dog": 2},
    "val alone": {"val/cat": 2, "val/dog": 2},
    "nothing": {"empty": 0},
}


@pytest.mark.parametrize(
    ("folder", "command", "said", "unsaid"),
    [
        ("train alone", train.main, "it has train; name another with --eval-split", "--split"),
        ("train alone", evaluate.main, "it has train; name another with --split", "--eval-split"),
        ("val alone", train.main, "no split 'train'; it has val; name another with --train-split", "--split"),
        ("nothing", train.main, "holds no images", "name another"),
        ("nothing", evaluate.main, "holds no images", "name another"),
    ],
)
def test_advice_on_splits_names_the_option_that_the_command_has(
    folder, command, said, unsaid, tmp_path, ten_classes, refused
):
    data = put_images(tmp_path / "pets", FOLDERS[folder])
    options = (*TRAINING, "--workdir", tmp_path / "run") if command is train.main else ("--checkpoint", ten_classes[0])
    line = refused(command, *options, "--data", data)
    assert said in line and unsaid not in line
    assert not (tmp_path / "run").exists()


def listed(root, lists):
    """A folder whose lists give {split: labels}."""
    put_images(root, {split: len(labels) for split, labels in lists.items()})
    (root / "meta").mkdir()
    for split, labels in lists.items():
        lines = (f"{i}.png {label}\n" for i, label in enumerate(labels))
        (root / f"meta/{split}.txt").write_text("".join(lines))
    return root


def test_a_training_is_given_no_advice_on_checkpoints(tmp_path, refused):
    data = listed(tmp_path / "lists", {"train": [0, 1, 0, 1], "val": [0, 1, 2]})
    line = refused(train.main, *TRAINING, "--data", data, "--workdir", tmp_path / "run")
    assert "has 3 classes, but the training data has 2; evaluate on classes that training has" in line
    assert "checkpoint" not in line and "--eval-split" in line and not (tmp_path / "run").exists()


def test_an_evaluation_is_given_advice_on_checkpoints(tmp_path, ten_classes, refused):
    data = listed(tmp_path / "lists", {"val": [0, 1, 12]})
    line = refused(evaluate.main, "--checkpoint", ten_classes[0], "--data", data)
    assert "has 13 classes, but the model has 10; choose a checkpoint that was trained on these classes" in line


def test_a_warm_up_that_comes_first_and_leaves_no_step_is_refused_before_anything_is_written(tmp_path, refused):
    argv = (*TRAINING, "--steps", 3, "--warmup-steps", 3, "--warmup-first", "true", "--workdir", tmp_path / "run")
    assert "the warm-up takes 3 steps of 3" in refused(train.main, *argv)
    assert not (tmp_path / "run").exists()
