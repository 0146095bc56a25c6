import dataclasses
import fcntl
import gzip
import json
import logging
import resource
import shutil
import signal
import struct

import jax
import numpy as np
import pytest
from conftest import figures_of
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from small_training import TINY_TABLE, few_units, interrupted
from tensorboardX.proto import event_pb2

from shufflenet_jax import __main__, checkpoint
from shufflenet_jax.commands import evaluate, info, to_torch, train
from shufflenet_jax.config import TrainConfig
from shufflenet_jax.data import normalization
from shufflenet_jax.data.pipeline import train_batches
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.errors import InputError
from shufflenet_jax.inference import get_model
from shufflenet_jax.loading import load_model
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.training import loop, profiling
from shufflenet_jax.training.beginning import initial_variables
from shufflenet_jax.training.supervision import load_predictions

DIGITS = ("--config", "digits", "--image-size", 16)
TINY = (*DIGITS, "--epochs", 2, "--eval-every", 1, "--log-every", 10, "--mixup", 0.2, "--ema-decay", 0.9)
SMALL = (*DIGITS, "--lowering", "reference")  # Compiles sooner.


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    with few_units():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a short training on the digits; a trace of its steps lies beside it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    options = (*TINY, "--workdir", workdir, "--profile", workdir.parent / "new/trace")
    assert train.main([str(word) for word in options]) == 0
    return workdir


def read_rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_leaves_its_settings_its_metrics_and_a_picture(trained):
    assert {path.name for path in trained.iterdir()} == {
        "checkpoints", "config.json", "curves.png", "events", "finished", "lock", "metrics.jsonl", "model.json",
        "summary.json",
    }  # fmt: skip
    rows = read_rows(trained)
    names = {"step", "epoch", "split", "loss", "top1", "top5", "lr", "images_per_second", "grad_norm"}
    of_classes = {"precision", "recall", "f1", "balanced_accuracy"}
    assert all(set(row) == names | (of_classes if row["split"] != "train" else set()) for row in rows)
    assert [(row["step"], row["split"]) for row in rows] == [
        (10, "train"), (20, "train"), (23, "train"), (23, "eval"), (23, "eval_ema"),
        (30, "train"), (40, "train"), (46, "train"), (46, "eval"), (46, "eval_ema"),
    ]  # fmt: skip
    # Two thirds are right after 46 steps; a mistake in loss, gradient or data leaves it at a tenth.
    assert rows[-2]["top1"] > 30 and rows[-3]["loss"] < rows[0]["loss"]
    assert rows[0]["lr"] == pytest.approx(0.02 * (46 - 9) / 46)
    record = json.loads((trained / "config.json").read_text())
    assert record["settings"]["epochs"] == 2 and record["versions"]["jax"] == jax.__version__
    assert record["commit"] is None or len(record["commit"].rstrip("+")) == 40
    with Image.open(trained / "curves.png") as picture:
        assert picture.size[0] > 1000


def steps_of(trace):
    """The numbers of the steps in what a trace gives Perfetto, in order of time."""
    (path,) = trace.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == "train" and "step_num" in event.get("args", {})]
    return [int(event["args"]["step_num"]) for event in sorted(steps, key=lambda event: event["ts"])]


def test_a_profile_holds_steps_20_to_30_for_tensorboard_and_perfetto(trained):
    trace = trained.parent / "new/trace"
    assert steps_of(trace) == list(range(20, 31))
    assert len(list(trace.glob("plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize(
    ("steps", "traced", "told"),
    [(19, [], "but the trace begins at step 20"), (22, [120, 121, 122], "trace of steps 120 to 122: ")],
)
def test_the_trace_of_a_run_that_ends_before_step_30_has_what_there_is(tmp_path, caplog, steps, traced, told):
    """The run continues after step 100."""
    caplog.set_level(logging.INFO)
    with profiling.traced(lambda state, batch: (state + batch, {}), tmp_path / "trace", 100) as step:
        state = np.float32(0)
        for _ in range(steps):
            state, _ = step(state, np.float32(1))
    assert state == steps and told in caplog.text
    assert (steps_of(tmp_path / "trace") if traced else []) == traced


def test_a_profile_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, refused):
    (tmp_path / "file").touch()
    options = (*SMALL, "--workdir", tmp_path / "run", "--profile", tmp_path / "file/trace")
    assert "file/trace cannot be written" in refused(train.main, *options)


def events_of(workdir):
    """{(tag, step): value} of all TensorBoard events, in the order of their files."""
    found = {}
    for path in sorted((workdir / "events").iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):  # Length, checksum, event, checksum.
            (length,) = struct.unpack_from("<Q", data, position)
            event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            position += length + 16
    return found


def test_tensorboard_sees_the_figures_of_the_log(trained):
    events, expected = events_of(trained), {}
    for row in read_rows(trained):
        figures = {name: value for name, value in row.items() if name not in ("step", "epoch", "split")}
        expected |= {(f"{row['split']}/{name}", row["step"]): v for name, v in figures.items() if v is not None}
    assert events.keys() == expected.keys() and ("eval_ema/top1", 46) in events
    assert_allclose([events[key] for key in expected], list(expected.values()), rtol=1e-6)  # Stored as float32.


def test_moving_averages_are_evaluated_on_request(trained, ten_classes, call, refused):
    best = max((row for row in read_rows(trained) if row["split"] == "eval"), key=lambda r: (r["top1"], r["step"]))
    (average,) = (r for r in read_rows(trained) if r["split"] == "eval_ema" and r["step"] == best["step"])
    _, out, _ = call(evaluate.main, "--checkpoint", trained, "--data", "digits", "--ema")
    assert figures_of(out)["loss"] == pytest.approx(average["loss"], abs=1e-5)
    assert average["loss"] != best["loss"]
    model, data = ten_classes
    assert "no moving averages" in refused(evaluate.main, "--checkpoint", model, "--data", data, "--ema")


def test_plot_draws_the_curves_again(trained, tmp_path, call, refused):
    run = tmp_path / "run $^$"  # No formula, as Matplotlib would have it.
    run.mkdir()
    shutil.copy(trained / "metrics.jsonl", run)
    assert call(__main__.main, "plot", run)[:2] == (0, f"{run / 'curves.png'}\n")
    with Image.open(run / "curves.png") as ours, Image.open(trained / "curves.png") as theirs:
        assert ours.size == theirs.size
    row = {"step": 1, "epoch": 1.0, "split": "eval", "loss": 0.0, "top1": 100.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")  # Of one class: Matplotlib would warn of its logarithm.
    assert call(__main__.main, "plot", run)[0] == 0
    assert "holds no metrics.jsonl" in refused(__main__.main, "plot", tmp_path)


def test_a_network_learns_from_a_teacher_with_weighted_classes_and_recalibrates(trained, tmp_path, call, refused):
    np.savetxt(tmp_path / "weights.txt", np.linspace(0.5, 1.5, 10))
    argv = (*SMALL, "--steps", 3, "--recalibrate", 1, *TINY_TABLE, "--teacher", trained)
    argv += ("--class-weights", tmp_path / "weights.txt", "--scale-lr-from", 128)
    status, _, told = call(train.main, *argv, "--workdir", tmp_path / "run")
    assert status == 0 and "3 steps and 1 for the running statistics" in told
    assert "learning rate 0.01 (0.02 for batches of 128)" in told
    rows = read_rows(tmp_path / "run")
    assert [(row["step"], row["split"]) for row in rows] == [(3, "train"), (3, "eval"), (4, "train"), (4, "eval")]
    assert rows[2]["lr"] == 0 and rows[3]["loss"] != rows[1]["loss"]

    np.savetxt(tmp_path / "nine.txt", np.ones(9))
    (tmp_path / "words.txt").write_text("many\n")
    np.savez(tmp_path / "few.npz", label=np.zeros(3, int), logits=np.zeros((3, 10)))
    np.savez(tmp_path / "other.npz", logits=np.zeros((3, 10)))
    cases = {
        ("--class-weights", tmp_path / "nine.txt"): "10 classes",
        ("--class-weights", tmp_path / "words.txt"): "cannot be read",
        ("--class-weights", tmp_path / "none.txt"): "cannot be read",
        ("--teacher", tmp_path / "none"): "no model at",
        ("--teacher", tmp_path / "few.npz"): "logits of shape (3, 10)",
        ("--teacher", tmp_path / "other.npz"): "no predictions",
        ("--teacher", tmp_path / "none.npz"): "no predictions",
        ("--teacher", trained, "--preprocessing", "cifar10"): "in_chans 1",
    }
    for words, reason in cases.items():
        assert reason in refused(train.main, *SMALL, *words, "--workdir", tmp_path / "other"), words
        assert not (tmp_path / "other").exists()


def test_a_training_begins_with_a_checkpoints_weights_and_a_new_classifier(trained, tmp_path, call, refused):
    argv = (*SMALL, "--init-from", trained, "--freeze", "backbone", "--steps", 1, "--workdir", tmp_path / "run")
    status, _, told = call(train.main, *argv)
    assert status == 0 and "begins with 102 of 102 tensors" in told and "reinitialized" not in told
    assert "conv1, stage2, stage3, stage4, conv5, with their statistics" in told
    (_, before, _), (_, after, _) = load_model(trained), load_model(tmp_path / "run")
    for tree in before, after:
        assert tree["params"].pop("fc")
    jax.tree.map(assert_array_equal, after, before)
    status, _, told = call(train.main, *argv)
    assert status == 0 and "continuing after step 1" in told and "begins with" not in told

    cases = {
        ("--layout", "megvii", "--init-from", trained): "has layout torchvision",
        ("--width", 1.0, "--init-from", trained, "--freeze", "backbone"): "cannot be frozen",
        ("--init-from", tmp_path / "none"): "no model at",
        ("--freeze", "stage1,fc"): "freeze names",
        ("--in-chans", 4): "images have 1 (grey) or 3 channels",
    }
    for words, reason in cases.items():
        assert reason in refused(train.main, *SMALL, *words, "--workdir", tmp_path / "other"), words
        assert not (tmp_path / "other").exists()


def test_other_classes_reinitialize_the_classifier(ten_classes, caplog):
    model, _ = ten_classes
    module, stored, info = load_model(model)
    config = TrainConfig(data="x", width=0.5, init_from=str(model), preprocessing="megvii")
    caplog.set_level(logging.INFO, "shufflenet_jax")
    found = initial_variables(
        module.clone(num_classes=3), config, dataclasses.replace(info, num_classes=3, classes=None)
    )
    assert "reinitialized: fc" in caplog.text and "normalized in another way" in caplog.text
    assert found["params"].pop("fc")["kernel"].shape == (1024, 3) and stored["params"].pop("fc")
    jax.tree.map(assert_array_equal, found, stored)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_a_network_for_colours_begins_a_training_of_other_channels_as_get_model_adapts_it(
    in_chans, ten_classes, caplog
):
    model, _ = ten_classes
    expected = get_model(model, in_chans=in_chans)
    config = TrainConfig(data="x", width=0.5, init_from=str(model), in_chans=in_chans if in_chans < 4 else 0)
    caplog.set_level(logging.INFO, "shufflenet_jax")
    jax.tree.map(assert_array_equal, initial_variables(expected.module, config, expected.info), expected.variables)
    assert ("conv1 takes" in caplog.text) == (in_chans != 3)
    assert config.preprocess.channels == (in_chans if in_chans < 4 else 3)


def test_a_stem_of_another_stride_is_warned_of(ten_classes, caplog):
    model, _ = ten_classes
    module, _, info = load_model(model)
    small = dataclasses.replace(info, small_stem=True)
    initial_variables(module, TrainConfig(data="x", width=0.5, init_from=str(model)), info)
    assert not caplog.text
    config = TrainConfig(data="x", width=0.5, init_from=str(model), small_stem=True)
    initial_variables(module.clone(small_stem=True), config, small)
    assert "stride 2 with a max pool, and the network to train has a stem of stride 1" in caplog.text


@pytest.mark.parametrize(("name", "in_chans"), [("digits", 3), ("cifar10", 1), ("in1k_megvii", 1)])
def test_images_have_the_channels_asked_for_whatever_the_preprocessing(name, in_chans):
    config = dataclasses.replace(
        PRESETS[name], in_chans=in_chans, image_size=16, batch_size=8, color_jitter=0.4, trivial_augment=True
    )
    source = open_source("digits", "train")
    assert next(iter(train_batches(source, config, stop_step=1)))["images"].shape == (8, 16, 16, in_chans)
    info = loop.describe_model(config, source)
    assert info.in_chans == info.preprocess.channels == in_chans


@pytest.mark.parametrize(
    ("backend", "cache", "words"),
    [("cpu", "cache", None), ("gpu", "cache", "results in cache"), ("gpu", None, "every run does so again")],
)
def test_the_first_minutes_on_a_gpu_are_announced(backend, cache, words):
    note = loop.describe_start(backend, cache)
    assert note is None if words is None else words in note


def test_stored_predictions_travel_with_their_examples(trained, tmp_path, call):
    argv = ("--checkpoint", trained, "--data", "digits", "--split", "train", "--predictions", tmp_path / "p.npz")
    assert call(evaluate.main, *argv)[0] == 0
    config = dataclasses.replace(PRESETS["digits"], image_size=16, shift=0)
    source = open_source("digits", "train")
    stored = load_predictions(tmp_path / "p.npz", source)
    batch = next(iter(train_batches(source, config, stop_step=1, stored=stored)))
    module, variables, info = load_model(trained)
    logits = module.apply(variables, normalization.normalize(batch["images"], info.preprocess))[0]
    assert_allclose(batch["teacher"], logits, atol=1e-4)  # Folding rounds in another order.
    wrong = stored._replace(label=(stored.label + 1) % 10)
    with pytest.raises(InputError, match="belong to other data"):
        next(iter(train_batches(source, config, stop_step=1, stored=wrong)))


def test_the_schedule_is_printed_and_drawn_without_data_or_workdir(tmp_path, call, refused):
    argv = ("--config", "in1k", "--data-dir", tmp_path, "--print-schedule", tmp_path / "lr.png")
    status, out, _ = call(train.main, *argv)
    rows = {int(words[0].replace(",", "")): float(words[2]) for words in map(str.split, out.splitlines()[3:-1])}
    assert status == 0 and "1,281,167 images, 300 epochs of 1,252 steps, the last with 144 images" in out
    for step, rate in {0: 0.05, 4999: 0.0493345, 5000: 0.493344, 187_800: 0.25, 375_599: 1.3312e-6}.items():
        assert rows[step] == pytest.approx(rate, rel=1e-4)
    with Image.open(tmp_path / "lr.png") as picture:
        assert picture.size[0] > 500
    assert [path.name for path in tmp_path.iterdir()] == ["lr.png"]
    for name, told in {"in1k_megvii": "300,000 steps and 1,250 for the running", "in1k_torchvision": "0.005\n"}.items():
        status, out, _ = call(train.main, "--config", name, "--data-dir", tmp_path, "--print-schedule")
        assert status == 0 and told in out
    assert "no data at" in refused(train.main, "--config", "in1k", "--data", tmp_path / "none", "--print-schedule")


def test_a_workdir_is_a_checkpoint_its_best_one(trained, call, tmp_path):
    rows = [row for row in read_rows(trained) if row["split"] == "eval"]
    best = max(rows, key=lambda row: (row["top1"], row["step"]))
    _, out, _ = call(evaluate.main, "--checkpoint", trained, "--data", "digits")
    assert figures_of(out)["top1"] == round(best["top1"], 2)
    # With the best gone, the newest is what there is.
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / f"run/checkpoints/{best['step']}")
    (other,) = (row for row in rows if row["step"] != best["step"])
    _, out, _ = call(evaluate.main, "--checkpoint", tmp_path / "run", "--data", "digits")
    assert figures_of(out)["top1"] == round(other["top1"], 2)


def test_to_load_a_workdir_in_python_warns_of_nothing(trained, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("absl"), "level", logging.WARNING)  # As it is before any command has run.
    load_model(trained)
    assert not caplog.records


def state_of(workdir, step):
    with checkpoint.TrainingCheckpoints(workdir, read_only=True) as checkpoints:
        folder = checkpoints.directory / str(step)
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        return [checkpointer.restore(folder / name) for name in ("variables", "optimizer", "ema")]


def damage(folder):
    """Cuts the large files of a checkpoint."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 100_000:
            path.write_bytes(path.read_bytes()[:1000])


def test_a_stopped_run_saves_and_the_same_command_goes_on_to_the_same_numbers(trained, tmp_path, call, monkeypatch):
    """From the last whole checkpoint: the newest is damaged."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    damage(workdir / "checkpoints/46")
    monkeypatch.setattr(loop, "shown", interrupted(loop.shown, 29, signal.SIGTERM))
    status, _, stderr = call(train.main, *TINY, "--workdir", workdir)
    assert status == 0 and "checkpoints/46/variables is damaged" in stderr and "continuing after step 23" in stderr
    assert "stopped after step 30, which is saved" in stderr and (workdir / "damaged-46").is_dir()
    assert not (workdir / "finished").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    status, _, stderr = call(train.main, *TINY, "--workdir", workdir)
    assert status == 0 and "continuing after step 30" in stderr
    for ours, theirs in zip(*map(jax.tree.leaves, (state_of(workdir, 46), state_of(trained, 46))), strict=True):
        assert_array_equal(ours, theirs)

    def timeless(workdir):
        return [{key: row[key] for key in row if key != "images_per_second"} for row in read_rows(workdir)]

    assert timeless(workdir) == timeless(trained)
    assert events_of(workdir).keys() == events_of(trained).keys()


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_changes_nothing(trained, tmp_path, refused):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for step in (23, 46):
        damage(workdir / f"checkpoints/{step}")
    assert "no checkpoint can be read any more" in refused(train.main, *TINY, "--workdir", workdir)
    assert len(list((workdir / "checkpoints").iterdir())) == 2 and read_rows(workdir) == read_rows(trained)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_damaged_metrics_name_their_checkpoint(content, trained, tmp_path, refused):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "checkpoints/23/metrics/metrics").write_bytes(content)
    for main, argv in (train.main, (*TINY, "--workdir", workdir)), (info.main, ("--checkpoint", workdir)):
        line = refused(main, *argv)
        assert "damaged" in line and str(workdir / "checkpoints") in line, line
    assert read_rows(workdir) == read_rows(trained)


def test_a_second_process_on_a_workdir_is_refused(trained, tmp_path, refused):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    with open(workdir / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process trains in" in refused(train.main, *TINY, "--workdir", workdir)
    assert read_rows(workdir) == read_rows(trained)


@pytest.fixture
def small_files():
    """No file may become as large as a checkpoint's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_no_earlier_checkpoint(trained, tmp_path, call, request):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints/46")
    before = state_of(workdir, 23)
    request.getfixturevalue("small_files")
    status, _, stderr = call(train.main, *TINY, "--workdir", workdir)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "cannot be written" in errors[0], stderr
    assert "Traceback" not in stderr
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()] == ["23"]
    jax.tree.map(assert_array_equal, state_of(workdir, 23), before)


def test_a_finished_run_stays_as_it_is(trained, tmp_path, call):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    assert call(train.main, *TINY, "--workdir", workdir)[0] == 0
    assert read_rows(workdir) == read_rows(trained)


def test_train_refuses_bad_input_in_one_line_and_leaves_no_workdir(trained, tmp_path, refused):
    workdir = tmp_path / "run"
    cases = {
        (): "--config",
        ("--config", "in22k"): "'in22k'",
        ("--config", "digits", "--width", "0.7"): "width is 0.7",
        ("--config", "digits", "--epochs", "0"): "epochs is 0",
        ("--config", "digits", "--momentum", "1"): "momentum is 1.0",
        ("--config", "digits", "--seed", "-1"): "seed is -1",
        ("--config",): "--config",
        ("--config", "digits", "--learning-rate", "nan"): "learning_rate is nan",
        ("--config", "digits", "--bacth-size", "3"): "--bacth-size",
        ("--config", "digits", "--data", tmp_path / "none"): "no data at",
        ("--config", "digits", "--train-split", "extra"): "no split 'extra'",
    }
    for argv, told in cases.items():
        assert told in refused(train.main, "--workdir", workdir, *argv), argv
        assert not workdir.exists(), argv
    before = read_rows(trained)
    line = refused(train.main, *TINY, "--width", 1.0, "--seed", 3, "--workdir", trained)
    assert "seed is 0 there and 3 here" in line and "width is 0.5 there and 1.0 here" in line
    assert read_rows(trained) == before


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path, refused):
    line = refused(train.main, *TINY, "--batch-size", 66, "--workdir", tmp_path / "run")
    assert "multiple of the 4 devices" in line and not (tmp_path / "run").exists()


def test_a_folder_that_is_no_training_is_left_alone(ten_classes, tmp_path, refused):
    model, _ = ten_classes
    shutil.copytree(model, tmp_path / "model")
    before = (tmp_path / "model/model.json").read_text()
    assert "not the folder of a training run" in refused(train.main, *TINY, "--workdir", tmp_path / "model")
    assert (tmp_path / "model/model.json").read_text() == before
    assert len(list((tmp_path / "model").iterdir())) == 2


def test_a_run_that_is_not_finite_names_its_last_checkpoint_and_without_one_may_change_its_settings(tmp_path):
    argv = (
        *SMALL,
        *TINY_TABLE,
        "--batch-size",
        480,
        "--epochs",
        2,
        "--eval-every",
        1,
        "--log-every",
        1,
        "--learning-rate",
        1e30,
    )
    argv += ("--workdir", tmp_path / "run")
    with pytest.raises(InputError, match=r"not finite at step .*; no checkpoint was saved yet"):
        train.main(list(map(str, argv)))
    info = tmp_path / "run/model.json"
    info.unlink()  # As if it had been stopped between its two files.
    # Now the rate is 0 in the first epoch of 3 steps.
    argv += ("--dropout", 0.5, "--warmup-epochs", 1, "--warmup-factor", 0)
    with pytest.raises(InputError, match=r"not finite at step [56]; the last good one is .*/run/checkpoints/3; lower"):
        train.main(list(map(str, argv)))
    assert json.loads(info.read_text())["dropout"] == 0.5
    load_model(tmp_path / "run")  # Which refuses numbers that are not finite.


def test_a_last_batch_too_small_for_batch_statistics_is_refused_before_anything_is_written(tmp_path, refused):
    argv = ("--config", "digits", "--image-size", 8, "--bn-group-size", 2)
    assert "change --batch-size" in refused(train.main, *argv, "--workdir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_groups_that_do_not_divide_a_batch_are_refused(tmp_path, refused):
    argv = (*TINY, "--bn-group-size", 24, "--workdir", tmp_path / "run")
    assert "multiple of bn_group_size, 24" in refused(train.main, *argv)
    argv = (*TINY, "--batch-size", 96, "--bn-group-size", 32, "--accumulate", 1, "--workdir", tmp_path / "run")
    assert "whole groups of 32" in refused(train.main, *argv)


def test_training_names_a_damaged_image_once_and_stops_at_too_many(caplog):
    config = TrainConfig(data="x", max_damaged=0.05)
    labels = np.ones(2, int)
    names = ("a is cut", "a is cut", "", "b is cut")
    batches = [{"labels": labels, "damaged": np.array(["", name])} for name in names]
    passed = loop.without_damage(batches, config, examples=40)
    assert [list(batch) for batch in passed] == [["labels"]] * 4
    assert caplog.text.count("a is cut") == 1
    assert caplog.messages[-1] == "b is cut; another image replaces it" and caplog.records[-1].levelname == "WARNING"
    batches = [{"labels": labels, "damaged": np.array([f"{name} is cut"])} for name in "abc"]
    with pytest.raises(InputError, match="3 of 40 training images are damaged"):
        list(loop.without_damage(batches, config, examples=40))


def test_the_schedule_of_a_learning_rate_of_zero_is_printed(call):
    status, out, stderr = call(train.main, "--config", "digits", "--learning-rate", 0, "--print-schedule")
    assert status == 0, stderr
    assert "learning rate 0" in out


def test_more_steps_than_an_int32_counts_are_refused(refused, call):
    for name in ("steps", "epochs", "warmup-steps", "ema-every", "batch-size"):
        message = refused(train.main, "--config", "digits", f"--{name}", 2**31, "--print-schedule")
        assert f"{name.replace('-', '_')} is 2147483648, but must be at most 2147483647" in message
    long = {"--epochs": 2**31 - 1, "--steps": 2**31 - 2}
    for option, count in long.items():
        message = refused(train.main, "--config", "digits", option, count, "--recalibrate", 2, "--print-schedule")
        assert "steps, but 2,147,483,647 are the most" in message
    status, out, stderr = call(train.main, "--config", "digits", "--steps", 2**31 - 1, "--print-schedule")
    assert status == 0 and "2,147,483,646" in out, stderr
    argv = ("--steps", 5, "--warmup-epochs", 2**31 - 1, "--warmup-first", "false", "--print-schedule")
    status, _, stderr = call(train.main, "--config", "digits", *argv)
    assert status == 0, stderr


def test_a_checkpoint_that_is_a_loop_of_links_is_refused(refused, tmp_path):
    (tmp_path / "model").symlink_to("model")
    assert "model" in refused(to_torch.main, tmp_path / "model", "--dialect", "mmpretrain", "--out", tmp_path / "x.pth")
    assert "model" in refused(evaluate.main, "--checkpoint", tmp_path / "model", "--data", "digits")
