"""Real weights on real images, where the short tests take fewer images or another lowering."""

import pytest
from conftest import figures_of
from numpy.testing import assert_allclose
from preparation.test_dataset import read_all, tar_of
from share import in_full
from training.test_step import Step, assert_same_to, real_steps  # noqa: F401

from shufflenet_jax.commands import evaluate, from_torch, prepare

pytestmark = pytest.mark.real_data


def test_the_official_tar_gives_the_reference_counts(shared, card_at_hand, tmp_path, call):
    """The labels of its images come from the challenge's list."""
    images = sorted((shared / "imagenet-val227/val").iterdir())
    source, sets, model = tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "sets", tmp_path / "model"
    tar_of([(path.name, path.read_bytes()) for path in images], source)
    argv = ("--source", source, "--name", "imagenet2012", "--out", sets, "--processes", 1)
    status, _, stderr = call(prepare.main, *argv)
    assert status == 0, stderr
    listed = (line.split() for line in (shared / "imagenet-val227/meta/val.txt").read_text().splitlines())
    labels = {row[0]: row[1] for row in read_all("imagenet2012", "validation", sets)}
    assert labels == {file: int(label) for file, label in listed}

    assert call(from_torch.main, card_at_hand, "--out", model, "--no-verify")[0] == 0
    status, out, stderr = call(evaluate.main, "--checkpoint", model, "--data", "tfds:imagenet2012", "--data-dir", sets)
    assert status == 0, stderr
    figures = figures_of(out)
    assert (figures["images"], figures["top1_correct"], figures["top5_correct"]) == (650, 466, 592)

    # What eval.py does without arguments, but for the place of the data.
    status, out, stderr = call(evaluate.main, "--data-dir", sets)
    assert status == 1 and figures_of(out) == figures
    assert "top1 is 71.69, not 69.55 as --expect-top1 expects" in stderr


@in_full
def test_torchvisions_names_give_the_same_counts(shared, call):
    argv = ("--checkpoint", shared / "weights/shufflenet_v2_x1_0_torchvision.pth", "--data", shared / "imagenet-val227")
    status, _, stderr = call(evaluate.main, *argv, "--expect-top1-correct", 466, "--expect-top5-correct", 592)
    assert status == 0, stderr


@in_full
def test_one_image_with_exif_separates_torchvision_from_mmpretrain(shared, call):
    argv = ("--checkpoint", shared / "weights/shufflenet_v2_x1_0_mmpretrain.pth", "--preprocess", "all")
    status, out, stderr = call(evaluate.main, *argv, "--data", shared / "imagenet-original")
    assert status == 0, stderr
    assert (figures_of(out)["top1_correct"], figures_of(out)["top5_correct"]) == (161, 189)
    theirs = figures_of(out)["preprocess"]["as torchvision does"]
    assert (theirs["top1_correct"], theirs["top5_correct"], theirs["flips"]) == (162, 189, 1)
    (told,) = (line for line in out.splitlines() if line.startswith("as torchvision does"))
    assert told.endswith("n02951585/n02951585_can_opener.JPEG")
    # It is EXIF's rotation that separates them, not what decodes.
    found = figures_of(out)["preprocess"]
    assert found["EXIF's rotation ignored"]["flipped"] == theirs["flipped"]
    assert found["EXIF's rotation ignored"]["top1_correct"] == 162
    assert (found["decoded by Pillow"]["flips"], found["decoded by Pillow"]["top1_correct"]) == (0, 161)


@in_full
def test_three_steps_for_gpus_are_pytorchs_in_float64(x64, real_steps):  # noqa: F811
    recipe = {"mixup": 1.0, "label_smoothing": 0.1, "ema_decay": 0.9, "warmup_steps": 1}
    step = Step(*real_steps, groups=2, **recipe)
    (ours, our_loss), (theirs, their_loss) = step.in_jax("float64", "gpu"), step.in_pytorch("float64")
    assert_allclose(our_loss, their_loss, rtol=1e-9)
    assert_same_to(1e-7, ours, theirs)  # A wrong term in any gradient is far above.
