"""`train.py`: trains a preset, with any of its settings overridden; the same command again resumes."""

import dataclasses
import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import simple_parsing

from .. import checkpoint, parallel, plots
from .. import workdir as workdirs
from ..cli import CommandLine, add_process_options, progress, tell, warn
from ..config import PRESETS, ModelInfo, TrainConfig
from ..data.pipeline import eval_batches, train_batches
from ..data.sources import KNOWN_SIZES, open_source
from ..errors import InputError
from ..evaluation import eval_step, evaluate
from ..files import path_of
from ..finetuning import initial_variables
from ..interruption import Interruption
from ..logs import Meter, MetricsLog
from ..model import init_variables
from ..rows import Epoch
from ..targets import load_extras
from ..training import count_steps, count_warmup, create_state, decay_table, make_schedule, peak_rate, train_step

DESCRIPTION = "Train a ShuffleNetV2. The same command again resumes; every setting below overrides the preset's."


def main(argv):
    config, options = parse(argv)
    jax.config.update("jax_enable_x64", config.dtype == "float64")
    if options.print_schedule:
        return print_schedule(config, options.print_schedule)
    workdir = path_of(options.workdir or f"runs/{options.config}")
    with parallel.joined(options.coordinator_address, options.num_processes, options.process_id):
        status = train(config, workdir)
    gc.collect()  # Only then JAX lets go of the batches that worker processes have shared; at exit it were too late.
    return status


def train(config, workdir):
    """Begins or goes on with a run in a workdir; returns the exit status. All processes of a run do this together."""
    train_source, eval_source = open_sources(config)
    info = describe(config, train_source)
    epoch = Epoch(len(train_source), parallel.plan_batch(config))
    require_trainable(config, epoch)
    parallel.require_same("settings", config)
    parallel.require_same("data", (len(train_source), len(eval_source), info.num_classes, info.classes))
    extras = load_extras(config, train_source, info)
    settings = {name: getattr(config, name) for name in ("lowering", "remat", "initial", "frozen")}
    module = checkpoint.module_of(info, dtype=jnp.dtype(config.dtype), **settings)
    begun = checkpoint.has_steps(workdir)
    variables = init_variables(module, seed=config.seed) if begun else initial_variables(module, config, info)
    total_steps = count_steps(config, epoch) + config.recalibrate

    with (
        Interruption() as interruption,
        workdirs.claimed(workdir, config, info),
        checkpoint.TrainingCheckpoints(workdir, keep=config.keep) as checkpoints,
    ):
        state, start = resume(checkpoints, create_state(module, config, epoch, variables))
        tell(f"{describe_run(config, epoch)}\n{decay_table(state.params, config.decay, config.frozen)}")
        batches = fed_batches(train_source, config, epoch, start, total_steps, stored=extras.stored)
        step = parallel.map_train_step(partial(train_step, module, config, epoch, teacher=extras.teacher))
        fixed = parallel.replicate(extras.fixed)
        with MetricsLog(workdir, last_step=start) if parallel.is_first() else nullcontext() as log:
            run = Run(
                config,
                epoch,
                step=lambda state, batch: step(state, batch, fixed),
                evaluate=make_evaluate(module, config, eval_source),
                report=make_report(config, log, epoch),
                checkpoints=checkpoints,
                interruption=interruption,
            )
            stopped = take_steps(run, state, start, batches)
    if stopped:
        tell(f"stopped after step {stopped}, which is saved; the same command goes on")
        return interruption.status
    tell(f"checkpoints: {checkpoints.directory}")
    if parallel.is_first():
        tell(f"curves: {plots.plot_curves(workdir, title=f'{config.width}x on {config.data}')}")
        (workdir / workdirs.FINISHED).touch()  # For scripts that start a run again until it is over.
    return 0


class Run(NamedTuple):
    """What the loop of a training works with."""

    config: TrainConfig
    epoch: Epoch
    step: Callable  # (State, batch) -> (State, metrics).
    evaluate: Callable  # Variables -> figures.
    report: Callable  # (step, split, figures) -> None.
    checkpoints: checkpoint.TrainingCheckpoints
    interruption: Interruption


def take_steps(run, state, start, batches):
    """Takes the steps from `start` on; returns the one after which it had to stop, or None at the end."""
    config, epoch, meter = run.config, run.epoch, Meter()
    learned = count_steps(config, epoch)
    last = learned + config.recalibrate
    for step, batch in enumerate(batches, start=start + 1):
        state, metrics = run.step(state, batch)
        meter.add(step, metrics, epoch.images(step - 1))
        evaluating = step % (config.eval_every * epoch.steps) == 0 or step in (learned, last)
        stopping = parallel.all_stop(step, run.interruption.wanted) and step < last
        # A checkpoint ends the current line of the log, so that a resumed run writes the same lines.
        if step % config.log_every == 0 or evaluating or stopping:
            run.report(step, "train", finite(meter, run.checkpoints))
        figures = None
        if evaluating:
            figures = run.evaluate(state.variables)
            run.report(step, "eval", figures)
            if state.ema:
                run.report(step, "eval_ema", run.evaluate(state.ema))
            meter.restart()
        if evaluating or stopping:
            run.checkpoints.save(step, parallel.to_host(items_of(state)), figures)
        if stopping:
            return step
    return None


def parse(argv):
    """The TrainConfig that the command line asks for, and its other options."""
    first = CommandLine(prog="train.py", add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    name = first.parse_known_args(argv)[0].config
    parser = Parser(
        prog="train.py",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        add_option_string_dash_variants=simple_parsing.DashVariant.DASH,
        argument_generation_mode=simple_parsing.ArgumentGenerationMode.FLAT,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, choices=PRESETS, help="the preset: " + ", ".join(PRESETS))
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run (default: runs/ and the preset's name)")
    parser.add_argument(
        "--print-schedule",
        metavar="FILE.png",
        nargs="?",
        const=True,
        help="only print the learning rate over the run, and draw it into the file",
    )
    add_process_options(parser)
    parser.add_arguments(TrainConfig, dest="settings", default=PRESETS.get(name, PRESETS["digits"]))
    options = parser.parse_args(argv)
    return options.settings, options


class Parser(CommandLine, simple_parsing.ArgumentParser):
    """simple_parsing's parser with our way to report misuse."""


class HelpFormatter(simple_parsing.SimpleHelpFormatter):
    """simple_parsing's formatter, which is silent about defaults where there are none."""

    def _get_help_string(self, action):
        told = super()._get_help_string(action)
        return told.replace(" (default: %(default)s)", "") if action.default is None else told


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


def items_of(state):
    """What a checkpoint holds of a State."""
    items = {checkpoint.VARIABLES: state.variables, checkpoint.OPTIMIZER: state.optimizer}
    return items | {checkpoint.EMA: state.ema} if state.ema else items


def resume(checkpoints, state):
    """The state to go on from, on all devices, and how many steps it has behind it.

    Damaged checkpoints are named and taken out of the way, once an older one is found whole.
    """
    damaged, found, step = {}, None, 0
    for number in checkpoints.steps():
        try:
            found, step = checkpoints.restore(number, items_of(state)), number
            break
        except InputError as error:
            damaged[number] = error
    if damaged and not found:
        raise InputError(f"no checkpoint can be read any more; the newest: {next(iter(damaged.values()))}")
    parallel.require_same("checkpoints", (step, *damaged))
    for bad, reason in damaged.items():
        tell(f"warning: {reason}; it lies in {checkpoints.set_aside(bad)} now")
    if found:
        averages = found.get(checkpoint.EMA)
        state = state.replace(**found[checkpoint.VARIABLES], **found[checkpoint.OPTIMIZER], ema=averages)
        tell(f"going on after step {step}")
    return parallel.replicate(state), step


def require_trainable(config, epoch):
    """Raises InputError if the last batch of a pass is too small for batch statistics."""
    last = -(-config.image_size // (8 if config.small_stem else 32))
    if epoch.share * last**2 < 2:
        raise InputError(
            f"the last batch of an epoch leaves {epoch.share} image to each group of {epoch.layout.group}, too few for "
            f"batch statistics at {config.image_size} pixels; change batch_size"
        )


def describe_run(config, epoch):
    """What a run is going to do, in two lines."""
    layout = epoch.layout
    last = "" if epoch.left == layout.batch_size else f", the last with {epoch.left} images"
    parts = f", in {layout.parts} parts" if layout.parts > 1 else ""
    length = "epochs" if config.steps else f"{config.epochs} epochs"
    further = f" and {config.recalibrate:,} for the running statistics" if config.recalibrate else ""
    usual = f" ({config.learning_rate:g} for batches of {config.scale_lr_from})" if config.scale_lr_from else ""
    return (
        f"{epoch.size:,} images, {length} of {epoch.steps:,} steps{last}: {count_steps(config, epoch):,} steps"
        f"{further}\nbatches of {layout.batch_size} on {layout.devices} device(s){parts}, batch statistics over "
        f"{layout.group}; learning rate {peak_rate(config):g}{usual}, {config.schedule}"
    )


def finite(meter, checkpoints):
    """What a Meter has gathered. Raises InputError once the loss or the gradient is no longer finite."""
    try:
        return meter.take()
    except FloatingPointError as error:
        saved = checkpoints.steps()
        kept = (
            f"the last good one is {checkpoints.directory / str(saved[0])}" if saved else "no checkpoint was saved yet"
        )
        raise InputError(
            f"the loss or its gradient is not finite at step {error}; {kept}; lower learning_rate or look at the data"
        ) from error


def make_evaluate(module, config, source):
    """A function from variables to the figures of the evaluation split."""
    step = parallel.map_eval_step(partial(eval_step, module, config.preprocess))
    fitting = parallel.rows_that_fit(config.preprocess.crop) * jax.device_count()
    batch_size = parallel.shared_equally(min(config.eval_batch_size, len(source), fitting))

    def evaluate_state(variables):
        batches = eval_batches(source, config.preprocess, batch_size=batch_size, **parallel.own_slice())
        return evaluate(step, variables, batches)[0]

    return evaluate_state


def make_report(config, log, epoch):
    """A function that logs a row of figures, and tells those of an evaluation on stderr; without a log, none."""
    learning_rate = make_schedule(config, epoch)

    def report(step, split, figures):
        if figures is None or log is None:
            return
        names = ("loss", "top1", "top5")
        row = log.write(
            step=step,
            epoch=round(step / epoch.steps, 4),
            split=split,
            **{name: figures[name] for name in names},
            lr=float(learning_rate(step - 1)),
            images_per_second=figures.get("images_per_second"),
            grad_norm=figures.get("grad_norm"),
        )
        if split != "train":
            whose = " of the average" if split == "eval_ema" else ""
            told = f"step {step}, epoch {row['epoch']:.1f}: top-1{whose} {row['top1']:.2f} %, loss {row['loss']:.4f}"
            tell(told)

    return report


def fed_batches(source, config, epoch, start, stop, *, stored=None):
    """The batches of steps start .. stop - 1 on the devices, with a progress bar and a word about damaged images."""
    which = {"start_step": start, "stop_step": stop, **parallel.own_slice()}
    batches = train_batches(source, config, epoch.layout, **which, workers=config.workers, stored=stored)
    fed = parallel.feed(without_damage(batches, config, len(source)), epoch.layout)
    return shown(fed, epoch, start, stop)


def without_damage(batches, config, examples):
    """The batches as the devices take them; names each damaged image once, and stops when there are too many."""
    found = set()
    for batch in batches:
        for reason in set(batch.pop("damaged")) - found - {""}:
            found.add(reason)
            warn(f"{reason}; another one takes its place")
        if len(found) > max(1, config.max_damaged * examples):
            raise InputError(
                f"{len(found)} of {examples} training images are damaged, more than the share max_damaged allows "
                f"({config.max_damaged}); repair the data or raise it"
            )
        yield batch


def shown(batches, epoch, start, total_steps):
    """The batches as they come, with a progress bar in images."""
    done, total = map(epoch.images_before, (start, total_steps))
    with progress(total=total, initial=done, unit="image", desc="training") as bar:
        for step, batch in enumerate(batches, start=start):
            yield batch
            bar.update(epoch.images(step))


def print_schedule(config, picture):
    """Prints the learning rate over a run, a line for each point worth knowing, and draws it where asked to."""
    try:
        size = len(open_source(config.data, config.train_split, data_dir=config.data_dir))
    except InputError:
        if config.data not in KNOWN_SIZES:
            raise
        size = KNOWN_SIZES[config.data]
    epoch = Epoch(size, parallel.plan_batch(config))
    total, warmup = count_steps(config, epoch), count_warmup(config, epoch)
    schedule = jax.jit(jax.vmap(make_schedule(config, epoch)))
    edges = {warmup - 1, warmup} if warmup else set()
    steps = np.array(sorted({*edges, *range(0, total, -(-total // 20)), total - 1}))
    rates, highest = schedule(steps), peak_rate(config) or 1.0
    print(f"{describe_run(config, epoch)}\n{'step':>10}{'epoch':>9}{'learning rate':>15}")
    for step, rate in zip(steps, rates, strict=True):
        bar = "#" * round(float(40 * rate / highest))
        print(f"{step:10,}{step / epoch.steps:9.2f}{rate:15.6g}  {bar}".rstrip())
    if picture is not True:
        every = np.unique(np.linspace(0, total - 1, 2000).astype(int))
        plots.plot_schedule(every / epoch.steps, schedule(every), Path(picture))
        print(f"picture: {picture}")
    return 0
