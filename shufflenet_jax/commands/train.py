"""`train.py`: trains a preset, with any of its settings overridden; the same command again resumes."""

import dataclasses
import json
from functools import partial
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
from ..training import init_state, make_schedule, train_step

DESCRIPTION = "Train a ShuffleNetV2. The same command again resumes; every setting below overrides the preset's."
# A resumed run gives the same numbers whatever these say.
FREE_TO_CHANGE = {"eval_batch_size", "keep", "workers", "max_damaged"}


def main(argv):
    config, workdir = parse(argv)
    jax.config.update("jax_enable_x64", config.dtype == "float64")
    train_source, eval_source = open_sources(config)
    total_steps = max(1, config.epochs * len(train_source) // config.batch_size)
    info = describe(config, train_source)
    parallel.require_divisible(config.batch_size)
    prepare_workdir(workdir, config, info)

    module = checkpoint.module_of(info, dtype=jnp.dtype(config.dtype), lowering=config.lowering, remat=config.remat)
    evaluate_state = make_evaluate(module, config, eval_source)
    step_fn = parallel.map_train_step(partial(train_step, module, config.preprocess, config.seed))

    with checkpoint.TrainingCheckpoints(workdir, keep=config.keep) as checkpoints:
        state, start = resume(checkpoints, init_state(module, config, total_steps))
        log = MetricsLog(workdir / "metrics.jsonl", last_step=start)
        report = make_report(config, log, len(train_source), total_steps)
        batches = train_batches(train_source, config, start_step=start, stop_step=total_steps, workers=config.workers)
        batches = parallel.feed(without_damage(batches, config, len(train_source)))
        evaluate_at = evaluation_steps(config, len(train_source), total_steps)
        meter = Meter()
        for step, batch in enumerate(shown(batches, config, start, total_steps), start=start + 1):
            state, metrics = step_fn(state, batch)
            meter.add(metrics, config.batch_size)
            # A checkpoint ends the current line of the log, so that a resumed run writes the same lines.
            if step % config.log_every == 0 or step in evaluate_at:
                report(step, "train", meter.take())
            if step in evaluate_at:
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
    for path, text in ((stored, json.dumps(settings, indent=2) + "\n"), (workdir / checkpoint.INFO, info.to_json())):
        with written_aside(path) as draft:
            draft.write_text(text, encoding="utf-8")


def require_same_settings(workdir, settings, stored):
    """Raises InputError if the run in a workdir has other settings that change its numbers."""
    try:
        before = dict(json.loads(stored.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
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


def evaluation_steps(config, examples, total_steps):
    """The steps before an evaluation and a checkpoint: the last of every `eval_every` epochs, and of the run."""
    epochs = range(config.eval_every, config.epochs, config.eval_every)
    return {-(-epoch * examples // config.batch_size) for epoch in epochs} | {total_steps}


def make_evaluate(module, config, source):
    """A function from variables to the figures of the evaluation split."""
    step = parallel.map_eval_step(partial(eval_step, module, config.preprocess))
    batch_size = min(config.eval_batch_size, len(source))
    return lambda variables: evaluate(step, variables, eval_batches(source, config.preprocess, batch_size=batch_size))


def make_report(config, log, examples, total_steps):
    """A function that logs a row of figures, and tells those of an evaluation on stderr."""
    learning_rate = make_schedule(config, total_steps)

    def report(step, split, figures):
        if figures is None:
            return
        names = ("loss", "top1", "top5")
        row = log.write(
            step=step,
            epoch=round(step * config.batch_size / examples, 4),
            split=split,
            **{name: figures[name] for name in names},
            lr=float(learning_rate(step - 1)),
            images_per_second=figures.get("images_per_second"),
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


def shown(batches, config, start, total_steps):
    """The batches as they come, with a progress bar in images."""
    size = config.batch_size
    with progress(total=total_steps * size, initial=start * size, unit="image", desc="training") as bar:
        for batch in batches:
            yield batch
            bar.update(size)
