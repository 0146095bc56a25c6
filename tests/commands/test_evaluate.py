import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT, figures_of, lively_network
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from shufflenet_jax import __main__, parallel
from shufflenet_jax.commands import evaluate, from_torch
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.data.pipeline import eval_batches
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.evaluation.counting import eval_step
from shufflenet_jax.evaluation.counting import evaluate as evaluate_all
from shufflenet_jax.loading import load_model

# eval.py


def test_eval_prints_counts_and_percentages_and_keeps_predictions(ten_classes, tmp_path, call):
    model, data = ten_classes
    status, out, _ = call(evaluate.main, "--checkpoint", model, "--data", data, "--predictions", tmp_path / "p.npz")
    figures = figures_of(out)
    assert status == 0 and figures["images"] == 12
    assert figures["top1"] == round(100 * figures["top1_correct"] / 12, 2)
    rows = np.load(tmp_path / "p.npz")
    assert set(rows.files) == {"name", "label", "logits"} and rows["logits"].shape == (12, 10)
    assert list(rows["label"]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and rows["name"][3] == "kind1/1.JPEG"
    assert figures["top1_correct"] == (rows["logits"].argmax(1) == rows["label"]).sum()
    status, out, _ = call(evaluate.main, "--checkpoint", model, "--data", data, "--limit", 5, "--tta", "flip")
    assert status == 0 and figures_of(out)["images"] == 5


def test_eval_exits_1_when_an_expectation_is_missed(ten_classes, call):
    model, data = ten_classes
    argv = ("--checkpoint", model, "--data", data)
    figures = figures_of(call(evaluate.main, *argv)[1])
    names = ("top1_correct", "top5_correct", "top1", "top5")
    met = [word for name in names for word in ("--expect-" + name.replace("_", "-"), figures[name])]
    assert call(evaluate.main, *argv, *met)[0] == 0
    status, out, stderr = call(evaluate.main, *argv, "--expect-top1-correct", figures["top1_correct"] + 1)
    assert status == 1 and figures_of(out) == figures and "--expect-top1-correct" in stderr


def test_eval_refuses_bad_input_in_one_line(ten_classes, tmp_path, refused):
    model, data = ten_classes
    cases = {
        ("--checkpoint", tmp_path / "none", "--data", data): "no model at",
        ("--checkpoint", data, "--data", data): "no model at",
        ("--checkpoint", model, "--data", tmp_path / "none"): "no data at",
        ("--checkpoint", model, "--data", "digits"): "other classes",
        ("--checkpoint", model, "--data", data, "--split", "test"): "no split 'test'",
        ("--checkpoint", model, "--data", data, "--batch-size", "0"): "--batch-size",
        ("--checkpoint", model, "--data", data, "--limit", "x"): "--limit",
        ("--checkpoint", model, "--data", data, "--nonsense"): "--nonsense",
        ("--checkpoint", model): "--data",
        ("--checkpoint", model, "--data", data, "--predictions", model / "model.json" / "p.npz"): "cannot be written",
    }
    for argv, told in cases.items():
        before = sorted(tmp_path.rglob("*"))
        assert told in refused(evaluate.main, *argv), argv
        assert sorted(tmp_path.rglob("*")) == before, argv


def test_predictions_never_take_the_place_of_a_folder(ten_classes, tmp_path, refused):
    model, data = ten_classes
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    line = refused(evaluate.main, "--checkpoint", model, "--data", data, "--predictions", tmp_path / "mine")
    assert "is a folder" in line and (tmp_path / "mine/thesis.txt").exists()


def test_eval_names_a_damaged_image_in_the_middle_of_a_folder_and_writes_nothing(ten_classes, tmp_path, refused):
    model, data = ten_classes
    shutil.copytree(data, tmp_path / "data")
    image = tmp_path / "data/val/kind3/0.JPEG"
    image.write_bytes(image.read_bytes()[:-200])
    argv = ("--checkpoint", model, "--data", tmp_path / "data", "--predictions", tmp_path / "p.npz", "--batch-size", 2)
    assert "kind3/0.JPEG is damaged" in refused(evaluate.main, *argv)
    assert not (tmp_path / "p.npz").exists()


def test_a_cut_png_is_named_and_nothing_else_is_said(ten_classes, tmp_path, refused):
    model, _ = ten_classes
    (tmp_path / "val/kind0").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "val/kind0/a.png")
    whole = (tmp_path / "val/kind0/a.png").read_bytes()
    (tmp_path / "val/kind0/a.png").write_bytes(whole[: len(whole) // 2])
    assert "kind0/a.png is damaged" in refused(evaluate.main, "--checkpoint", model, "--data", tmp_path)


def test_eval_refuses_a_damaged_model_directory(ten_classes, tmp_path, refused):
    model, data = ten_classes

    def damaged(name):
        shutil.copytree(model, tmp_path / name)
        return tmp_path / name

    def told(directory):
        return refused(evaluate.main, "--checkpoint", directory, "--data", data)

    (damaged("text") / "model.json").write_text("{")
    assert "not a model description" in told(tmp_path / "text")
    info = json.loads((model / "model.json").read_text())
    (damaged("field") / "model.json").write_text(json.dumps({**info, "colour": "red"}))
    assert "colour" in told(tmp_path / "field")
    (damaged("width") / "model.json").write_text(json.dumps({**info, "width": 1.0}))
    assert "does not fit" in told(tmp_path / "width")
    (damaged("layout") / "model.json").write_text(json.dumps({**info, "layout": "other"}))
    assert "layout = 'other'" in told(tmp_path / "layout")
    shutil.rmtree(damaged("gone") / "variables")
    assert "no finished checkpoint" in told(tmp_path / "gone")
    for path in (damaged("cut") / "variables").rglob("*"):
        if path.is_file() and path.stat().st_size > 100_000:
            path.write_bytes(path.read_bytes()[:1000])
    assert "damaged" in told(tmp_path / "cut")


def test_numbers_that_are_not_those_that_were_saved_are_refused(ten_classes, tmp_path, refused):
    model = shutil.copytree(ten_classes[0], tmp_path / "model")
    info = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(info | {"sha256": "0" * 64}))
    line = refused(evaluate.main, "--checkpoint", model, "--data", ten_classes[1])
    assert "its numbers are not those that were saved" in line


def test_a_backbone_without_classifier_has_no_accuracy(tmp_path, call, refused):
    torch.save(lively_network("megvii-stages", num_classes=0, conv5=False).state_dict(), tmp_path / "b.pth")
    assert call(from_torch.main, tmp_path / "b.pth", "--out", tmp_path / "b", "--no-verify")[0] == 0
    assert "no classifier" in refused(evaluate.main, "--checkpoint", tmp_path / "b", "--data", "digits")


# Real weights on real images


@pytest.fixture(scope="session")
def real_models(shared, tmp_path_factory):
    """{dialect: model directory} of the real 1.0x weights."""
    root = tmp_path_factory.mktemp("real")
    for name in ("mmpretrain", "torchvision"):
        source = shared / f"weights/shufflenet_v2_x1_0_{name}.pth"
        assert from_torch.main([str(source), "--out", str(root / name), "--no-verify"]) == 0
    return {path.name: path for path in root.iterdir()}


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "data", "images", "top1", "top5", "lowering"),
    [
        ("mmpretrain", "imagenet-val227", 650, 466, 592, "auto"),
        ("mmpretrain", "imagenet-original", 201, 161, 189, "auto"),
        ("mmpretrain", "imagenet-original", 201, 161, 189, "reference"),
        ("torchvision", "imagenet-original", 201, 162, 189, "auto"),
    ],
)
def test_real_weights_give_the_reference_counts(
    name, data, images, top1, top5, lowering, real_models, shared, tmp_path, call
):
    status, out, stderr = call(
        evaluate.main,
        *("--checkpoint", real_models[name], "--data", shared / data, "--predictions", tmp_path / "p.npz"),
        *("--lowering", lowering),
        *("--expect-top1-correct", top1, "--expect-top5-correct", top5),
    )
    assert status == 0, stderr
    figures = figures_of(out)
    assert (figures["images"], figures["top1_correct"], figures["top5_correct"]) == (images, top1, top5)

    ours, reference = np.load(tmp_path / "p.npz"), np.load(shared / data / "mmpretrain_reference.npz")
    rank = {name: i for i, name in enumerate(reference["name"])}
    order = [rank[path.split("/")[-1]] for path in ours["name"]]
    assert_array_equal(ours["label"], reference["label"][order])
    differences = np.abs(ours["logits"] - reference["logits"][order]).max(1)
    # torchvision's preprocessing ignores the EXIF orientation, which one image has.
    assert (differences > 1e-3).sum() == (1 if (name, data) == ("torchvision", "imagenet-original") else 0)


@pytest.mark.real_data
def test_the_cpu_lowering_gives_the_reference_counts_with_its_batch_norm_as_trained_too(real_models, shared):
    module, variables, info = load_model(real_models["mmpretrain"], lowering="cpu")
    source = open_source(shared / "imagenet-original", classes=tuple(imagenet_classes()))
    step = parallel.map_eval_step(partial(eval_step, module, info.preprocess), jax.devices()[:1])
    batches = eval_batches(source, info.preprocess, batch_size=16)
    found, _ = evaluate_all(step, parallel.replicate(variables, jax.devices()[:1]), batches)
    assert found | {"images": 201, "top1_correct": 161, "top5_correct": 189} == found


@pytest.mark.real_data
def test_devices_and_batch_sizes_change_no_count_and_no_logit_of_real_images(real_models, shared):
    module, variables, info = load_model(real_models["mmpretrain"])
    source = open_source(shared / "imagenet-original", classes=tuple(imagenet_classes()))
    found = []
    for count, batch_size in {1: 128, 3: 7, 4: 1}.items():
        devices = jax.devices()[:count]
        step = parallel.map_eval_step(partial(eval_step, module, info.preprocess), devices)
        batches = eval_batches(source, info.preprocess, batch_size=batch_size, limit=40)
        found.append(evaluate_all(step, parallel.replicate(variables, devices), batches, keep_logits=True))
    (first, rows), *others = found
    for figures, other in others:
        assert [figures[key] for key in ("images", "top1_correct", "top5_correct")] == [
            first[key] for key in ("images", "top1_correct", "top5_correct")
        ]
        assert_array_equal(other.name, rows.name)
        assert_allclose(other.logits, rows.logits, atol=1e-4)  # Products of another shape sum in another order.


# The scripts and the package's own command


@pytest.mark.parametrize(
    "command",
    [
        ("train.py",),
        ("eval.py",),
        ("convert/from_torch.py",),
        ("convert/to_torch.py",),
        ("-m", "shufflenet_jax"),
    ],
)
def test_scripts_run_from_the_checkout_without_installation(command, tmp_path):
    words = [str(ROOT / word) if word.endswith(".py") else word for word in command]
    where = ROOT if command[0] == "-m" else tmp_path
    done = subprocess.run([sys.executable, *words, "--help"], cwd=where, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage:") and not done.stderr


@pytest.fixture
def interruptible():
    """Processes that are started take Ctrl-C as usual, also where this one was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks there at what a process has loaded")
@pytest.mark.parametrize("library", ["_ctypes", "numpy", "jaxlib"])
@pytest.mark.parametrize("command", [("train.py",), ("-m", "shufflenet_jax", "eval")])
def test_ctrl_c_during_imports_ends_a_command_quietly(command, library, interruptible):
    """Wait until a library is loaded, send the signal, and expect a shell's status for it and no word."""
    argv = [sys.executable, *command, "--help"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while library not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None, "it has ended before the library was loaded"
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        out, stderr = process.communicate(timeout=60)
    assert (process.returncode, out, stderr) == (130, "", "")


def test_the_package_runs_the_scripts_own_code(ten_classes, call, refused):
    model, data = ten_classes
    status, out, _ = call(__main__.main, "eval", "--checkpoint", model, "--data", data)
    assert status == 0 and figures_of(out)["images"] == 12
    assert "invalid choice" in refused(__main__.main, "evaluate")
    assert "COMMAND" in refused(__main__.main)


def test_debug_shows_where_an_error_came_from(tmp_path, call):
    with pytest.raises(ValueError, match="no model at"):
        call(evaluate.main, "--checkpoint", tmp_path, "--data", "digits", "--debug")
