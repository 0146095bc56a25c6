"""`train.py`: trains a preset, with any of its settings overridden; the same command again resumes."""

import dataclasses
import json
import subprocess
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import simple_parsing

from .. import checkpoint, parallel, plots
from ..cli import CommandLine, progress, tell
from ..config import PRESETS, ModelInfo, TrainConfig
from ..data.pipeline import eval_batches, train_batches
from ..data.sources import open_source
from ..errors import InputError
from ..evaluation import eval_step, evaluate
from ..files import written_aside
from ..logs import Meter, MetricsLog
from ..rows import Epoch
from ..training import decay_table, init_state, make_schedule, train_step

DESCRIPTION = "Train a ShuffleNetV2. The same command again resumes; every setting below overrides the preset's."
# A resumed run gives the same numbers whatever these say, up to rounding.
FREE_TO_CHANGE = {"accumulate", "eval_batch_size", "keep", "workers", "max_damaged"}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")  # On which the numbers depend.


def main(argv):
    config, workdir = parse(argv)
    jax.config.update("jax_enable_x64", config.dtype == "float64")
    train_source, eval_source = open_sources(config)
    info = describe(config, train_source)
    layout = parallel.plan_batch(config)
    epoch = Epoch(len(train_source), layout)
    require_trainable(config, epoch)
    total_steps = config.epochs * epoch.steps
    prepare_workdir(workdir, config, info)

    module = checkpoint.module_of(info, dtype=jnp.dtype(config.dtype), lowering=config.lowering, remat=config.remat)
    evaluate_state = make_evaluate(module, config, eval_source)
    step_fn = parallel.map_train_step(partial(train_step, module, config, layout))

    with checkpoint.TrainingCheckpoints(workdir, keep=config.keep) as checkpoints:
        state, start = resume(checkpoints, init_state(module, config, total_steps))
        tell(f"{describe_run(config, epoch, total_steps)}\n{decay_table(state.params, config.decay)}")
        log = MetricsLog(workdir / "metrics.jsonl", last_step=start)
        report = make_report(config, log, epoch.steps, total_steps)
        batches = train_batches(
            train_source, config, layout, start_step=start, stop_step=total_steps, workers=config.workers
        )
        batches = parallel.feed(without_damage(batches, config, len(train_source)), layout)
        meter = Meter()
        for step, batch in enumerate(shown(batches, epoch, start, total_steps), start=start + 1):
            state, metrics = step_fn(state, batch)
            meter.add(step, metrics, epoch.images(step - 1))
            evaluating = step % (config.eval_every * epoch.steps) == 0 or step == total_steps
            # A checkpoint ends the current line of the log, so that a resumed run writes the same lines.
            if step % config.log_every == 0 or evaluating:
                report(step, "train", finite(meter, checkpoints))
            if evaluating:
                figures, _ = evaluate_state(state.variables)
                report(step, "eval", figures)
                checkpoints.save(step, jax.device_get(state.variables), jax.device_get(state.optimizer), figures)
                meter.restart()

    curves = plots.plot_curves(workdir, title=f"{config.width}x on {config.data}")
    tell(f"checkpoints: {checkpoints.directory}\ncurves: {curves}")
    return 0


def parse(argv):
    """The TrainConfig and the workdir that the command line asks for."""
    first = CommandLine(prog="train.py", add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    name = first.parse_known_args(argv)[0].config
    parser = Parser(
        prog="train.py",
        description=DESCRIPTION,
        add_option_string_dash_variants=simple_parsing.DashVariant.DASH,
        argument_generation_mode=simple_parsing.ArgumentGenerationMode.FLAT,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, choices=PRESETS, help="the preset: " + ", ".join(PRESETS))
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run (default: runs/ and the preset's name)")
    parser.add_arguments(TrainConfig, dest="settings", default=PRESETS.get(name, PRESETS["digits"]))
    options = parser.parse_args(argv)
    return options.settings, Path(options.workdir or f"runs/{options.config}").expanduser()


class Parser(CommandLine, simple_parsing.ArgumentParser):
    """simple_parsing's parser with our way to report misuse."""


def open_sources(config):
    train = open_source(config.data, config.train_split, data_dir=config.data_dir)
    return train, open_source(
        config.data,
        config.eval_split,
        data_dir=config.data_dir,
        classes=train.classes,
        num_classes=train.num_classes,
    )


def describe(config, source):
    """The model.json of the network that a run trains."""
    names = ("width", "layout", "small_stem", "in_chans", "dropout")
    return ModelInfo(
        **{name: getattr(config, name) for name in names},
        num_classes=source.num_classes,
        classes=source.classes,
        preprocess=config.preprocess,
        source={"config": dataclasses.asdict(config)},
    )


def prepare_workdir(workdir, config, info):
    """Writes config.json and model.json, or checks that the run which lies there has the same settings.

    A run that has not saved a checkpoint yet may be started anew with other settings.
    """
    settings, stored = dataclasses.asdict(config), workdir / "config.json"
    if stored.exists():
        if checkpoint.has_steps(workdir):
            require_same_settings(workdir, settings, stored)
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"{workdir} exists and is no training of ours; choose another --workdir")
    record = {"settings": settings, "versions": {name: version(name) for name in LIBRARIES}, "commit": commit()}
    for path, text in ((stored, json.dumps(record, indent=2) + "\n"), (workdir / checkpoint.INFO, info.to_json())):
        with written_aside(path) as draft:
            draft.write_text(text, encoding="utf-8")


def commit():
    """The commit of the checkout that this code runs from, with a `+` where it was changed since, or None."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def require_same_settings(workdir, settings, stored):
    """Raises InputError if the run in a workdir has other settings that change its numbers."""
    try:
        before = dict(json.loads(stored.read_text(encoding="utf-8"))["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{stored} is damaged: {error}; choose another --workdir") from error
    changed = [key for key in settings if key not in FREE_TO_CHANGE and settings[key] != before.get(key)]
    if changed:
        told = ", ".join(f"{key} is {before.get(key)} there and {settings[key]} here" for key in changed)
        raise InputError(f"{workdir} holds a run with other settings: {told}; choose another --workdir")


def resume(checkpoints, state):
    """The state to go on from, on all devices, and how many steps it has behind it."""
    step = checkpoints.latest_step()
    if step is not None:
        variables, optimizer = checkpoints.restore(step, state.variables, state.optimizer)
        state = state.replace(**variables, **optimizer)
        tell(f"going on after step {step}")
    return parallel.replicate(state), step or 0


def require_trainable(config, epoch):
    """Raises InputError if the last batch of a pass is too small for batch statistics."""
    last = -(-config.image_size // (8 if config.small_stem else 32))
    if epoch.share * last**2 < 2:
        raise InputError(
            f"the last batch of an epoch leaves {epoch.share} image to each group of {epoch.layout.group}, too few for "
            f"batch statistics at {config.image_size} pixels; change batch_size"
        )


def describe_run(config, epoch, total_steps):
    """What a run is going to do, in one line."""
    layout, last = epoch.layout, "" if epoch.left == epoch.layout.batch_size else f", the last with {epoch.left} images"
    parts = f", in {layout.parts} parts" if layout.parts > 1 else ""
    return (
        f"{epoch.size:,} images, {config.epochs} epochs of {epoch.steps:,} steps{last}: {total_steps:,} steps; "
        f"batches of {layout.batch_size} on {layout.devices} device(s){parts}, batch statistics over {layout.group}"
    )


def finite(meter, checkpoints):
    """What a Meter has gathered. Raises InputError once the loss or the gradient is no longer finite."""
    try:
        return meter.take()
    except FloatingPointError as error:
        last = checkpoints.latest_step()
        kept = (
            "no checkpoint was saved yet"
            if last is None
            else f"the last good one is {checkpoints.directory / str(last)}"
        )
        raise InputError(
            f"the loss or its gradient is not finite at step {error}; {kept}; lower learning_rate or look at the data"
        ) from error


def make_evaluate(module, config, source):
    """A function from variables to the figures of the evaluation split."""
    step = parallel.map_eval_step(partial(eval_step, module, config.preprocess))
    fitting = parallel.rows_that_fit(config.preprocess.crop) * jax.local_device_count()
    batch_size = min(config.eval_batch_size, len(source), fitting)
    return lambda variables: evaluate(step, variables, eval_batches(source, config.preprocess, batch_size=batch_size))


def make_report(config, log, steps, total_steps):
    """A function that logs a row of figures, and tells those of an evaluation on stderr."""
    learning_rate = make_schedule(config, total_steps)

    def report(step, split, figures):
        if figures is None:
            return
        names = ("loss", "top1", "top5")
        row = log.write(
            step=step,
            epoch=round(step / steps, 4),
            split=split,
            **{name: figures[name] for name in names},
            lr=float(learning_rate(step - 1)),
            images_per_second=figures.get("images_per_second"),
            grad_norm=figures.get("grad_norm"),
        )
        if split == "eval":
            told = f"step {step}, epoch {row['epoch']:.1f}: top-1 {row['top1']:.2f} %, loss {row['loss']:.4f}"
            tell(told)

    return report


def without_damage(batches, config, examples):
    """The batches as the devices take them; names each damaged image once, and stops when there are too many."""
    found = set()
    for batch in batches:
        for reason in set(batch.pop("damaged")) - found - {""}:
            found.add(reason)
            tell(f"warning: {reason}; another one takes its place")
        if len(found) > max(1, config.max_damaged * examples):
            raise InputError(
                f"{len(found)} of {examples} training images are damaged, more than the share max_damaged allows "
                f"({config.max_damaged}); repair the data or raise it"
            )
        yield batch


def shown(batches, epoch, start, total_steps):
    """The batches as they come, with a progress bar in images."""
    done, total = (step // epoch.steps * epoch.padded for step in (start, total_steps))
    done += start % epoch.steps * epoch.layout.batch_size
    with progress(total=total, initial=done, unit="image", desc="training") as bar:
        for step, batch in enumerate(batches, start=start):
            yield batch
            bar.update(epoch.images(step))
