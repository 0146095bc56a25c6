"""A training from its first step to its last, with evaluations, checkpoints and a log."""

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import checkpoint, parallel, progress
from ..architecture import TABLE_FIELDS, name_of
from ..batch_groups import Epoch
from ..config import ModelInfo, TrainConfig
from ..data.fingerprint import take_fingerprint
from ..data.inventory import Note, report_notes
from ..data.pipeline import eval_batches, train_batches
from ..data.sources import Reader, Source, open_source
from ..errors import InputError
from ..evaluation.classes import MEANS, ClassScores
from ..evaluation.counting import eval_step, evaluate, predict_classes
from ..files import path_of, printable, writing
from ..model import ShuffleNetV2, init_variables
from . import workdir as workdirs
from .beginning import initial_variables
from .curves import plot_curves
from .interruption import Interruption
from .logs import METRICS, Meter, MetricsLog, read_metrics
from .optimizer import decay_table
from .packing import Packing, packing_for
from .patience import Patience
from .pitfalls import warn_of_collapse, warn_of_pitfalls
from .probe import probe
from .profiling import make_folder, traced
from .resuming import Data
from .rule import settle
from .schedule import count_steps, make_schedule, peak_rate
from .state import State, create_state
from .step import train_step
from .summary import Summary, read_summary, summarize, write_summary
from .supervision import load_supervision

logger = logging.getLogger(__name__)

EVALUATION = Reader(
    split="eval_split",
    owner="the training data",
    advice="evaluate on classes that training has: correct `eval_split`, `train_split` or the data",
)


class Evaluation(NamedTuple):
    """The figures of one evaluation during a run."""

    step: int
    epoch: float
    loss: float
    top1: float  # Percent.
    top5: float  # Percent.
    # Percent, over the classes; None where an older version logged the evaluation.
    balanced_accuracy: float | None = None
    f1: float | None = None


class Outcome(NamedTuple):
    """What an evaluation of a network gives."""

    figures: dict[str, float]  # Those of `evaluate`, and the means of `ClassScores`.
    pairs: np.ndarray  # int (N, 2), label and prediction of each image.


class TrainResult(NamedTuple):
    """What a run reached.

    Attributes:
      workdir: its folder, which is a checkpoint for every other command: the best one, else the latest.
      step: the last step that is saved.
      finished: False if a signal stopped the run; the same call continues it.
      signal: the number of that signal, or None. Where several processes agreed to stop, it may be another's.
      last: the last Evaluation, or None before the first one.
      best: the Evaluation with the highest top-1, or None.
      summary: the Summary of a finished run, or None.
    """

    workdir: Path
    step: int
    finished: bool
    signal: int | None
    last: Evaluation | None
    best: Evaluation | None
    summary: Summary | None = None


class Ending(NamedTuple):
    """How a loop ended."""

    step: int  # The last one.
    stopped: bool  # Whether a signal ended it, so that it is to continue.
    pairs: np.ndarray | None  # As in an Outcome, of the last evaluation; None where there was none.


def train(
    config: TrainConfig, workdir: str | Path, *, changed_data: bool = False, profile: str | Path | None = None
) -> TrainResult:
    """Train a network in a workdir, or continue the training that it holds.

    All processes of a run on several hosts call this together, inside `parallel.joined`.

    Args:
      config: the settings, such as `recipes.PRESETS["digits"]`.
      workdir: folder of the run; it is made if there is none.
      changed_data: continue the training also where examples were added, removed or changed since it last started.
      profile: folder for a trace of steps 20 to 30 after the start, of the first process; None: no trace.
    Returns:
      What the run reached.
    Raises:
      InputError: the data, the settings or the workdir cannot be used, or the loss is no longer finite.
    """
    parallel.require_platform()
    if not isinstance(config, TrainConfig):
        raise InputError(f"config is {config!r}, but must be a TrainConfig, like one of PRESETS")
    with jax.enable_x64(config.dtype == "float64"):
        folder = make_folder(profile) if profile is not None and parallel.is_first() else None
        result = _train(config, path_of(workdir), changed_data=changed_data, profile=folder)
    gc.collect()  # Only then JAX releases the batches that worker processes have shared; at exit it is too late.
    return result


def _train(config, workdir, *, changed_data, profile):
    train_source, eval_source = open_sources(config)
    config, chosen = settle(config, train_source, workdirs.stored_settings(workdir))
    if chosen:
        logger.info("%s", chosen.text)
    info = describe_model(config, train_source)
    epoch = Epoch(len(train_source), parallel.plan_for_devices(config))
    if not config.linear_probe:
        require_trainable(config, epoch)
    parallel.require_same("settings", config)
    data = Data(*map(take_fingerprint, (train_source, eval_source)))
    parallel.require_same("data", (data, info.num_classes, info.classes))
    supervision = load_supervision(config, train_source, info)
    module = network_of(config, info)
    begun = checkpoint.has_steps(workdir)
    if begun:  # What the checkpoint holds replaces them.
        variables = init_variables(module, seed=config.seed)
    else:
        variables = initial_variables(module, config, info)
        if config.probe_first and not config.linear_probe:
            variables = probe(module, config, variables, train_source, supervision.constants.class_weights)
    fresh = create_state(module, config, epoch, variables)
    total_steps = count_steps(config, epoch) + (0 if config.linear_probe else config.recalibrate)

    with (
        Interruption() as interruption,
        workdirs.claimed(workdir, config, info, data, chosen=chosen, changed_data=changed_data),
        checkpoint.TrainingCheckpoints(workdir, keep=config.keep) as checkpoints,
    ):
        state, start = resume(checkpoints, fresh, total_steps)
        announce(config, epoch, state)
        if parallel.is_first():
            warn_of_pitfalls(config, epoch, train_source, eval_source)
        patience = Patience(config.patience, (row["top1"] for row in evaluations(workdir) if row["step"] <= start))
        end = start if patience.over else total_steps
        batches = fed_batches(train_source, config, epoch, start, end, stored=supervision.stored)
        packing = packing_for(module, config, variables)
        step = map_step(module, config, epoch, teacher=supervision.teacher, packing=packing)
        constants = parallel.replicate(supervision.constants)
        with (
            MetricsLog(workdir, last_step=start) if parallel.is_first() else nullcontext() as log,
            traced(lambda state, batch: step(state, batch, constants), profile, start) as traced_step,
        ):
            if log and begun:
                workdirs.record_start(workdir, config, info, data, continues=start < end)
            run = Run(
                config,
                epoch,
                step=traced_step,
                packing=packing,
                evaluate=make_evaluate(module, config, eval_source),
                report=make_report(config, log, epoch, eval_source.classes),
                checkpoints=checkpoints,
                interruption=interruption,
                patience=patience,
            )
            if config.linear_probe:
                ending = take_probe(run, module, state, start, train_source, supervision.constants.class_weights)
            else:
                ending = take_steps(run, state, start, batches)
    if ending.stopped:
        logger.info("stopped after step %s, which is saved; the same command continues the run", ending.step)
    else:
        logger.info("checkpoints: %s", checkpoints.directory)
        if parallel.is_first():
            leave_results(workdir, config, info, ending)
    return result_of(workdir, ending.step, finished=not ending.stopped, signal=interruption.number)


def announce(config: TrainConfig, epoch: Epoch, state: State) -> None:
    """Report what a run is about to do."""
    logger.info("%s", describe_run(config, epoch))
    if not config.linear_probe:
        logger.info("%s", decay_table(state.params, config.decay, config.frozen))
    if note := describe_start(jax.default_backend(), jax.config.jax_compilation_cache_dir):
        logger.info(note)


def leave_results(workdir: Path, config: TrainConfig, info: ModelInfo, ending: Ending) -> None:
    """Write what a finished run leaves beside its checkpoints: a summary, its curves, and a mark that it is over."""
    if ending.pairs is not None:
        write_summary(workdir, summarize(ending.step, ending.pairs, info.num_classes, best_of(workdir)))
    title = printable(f"{name_of(config.table)} on {config.data}")
    logger.info("curves: %s", plot_curves(workdir, title=title))
    with writing(workdir):
        (workdir / workdirs.FINISHED).touch()  # For scripts that start a run again until it is over.


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows about evaluations in the log of a workdir that have a top-1."""
    rows = read_metrics(workdir / METRICS) if (workdir / METRICS).exists() else []
    return [row for row in rows if row["split"] == "eval" and row.get("top1") is not None]


def best_of(workdir: Path) -> tuple[int, float]:
    """Return the step with the highest top-1 in the log of a workdir, and that in percent."""
    best = max(evaluations(workdir), key=lambda row: row["top1"])
    return best["step"], best["top1"]


def result_of(workdir, step, *, finished, signal):
    """Return the TrainResult of a run, with the evaluations of its log."""
    found = [Evaluation(*(row.get(name) for name in Evaluation._fields)) for row in evaluations(workdir)]
    found = [evaluation for evaluation in found if None not in evaluation[: -len(Evaluation._field_defaults)]]
    last, best = (found[-1], max(found, key=lambda evaluation: evaluation.top1)) if found else (None, None)
    return TrainResult(workdir, step, finished, signal, last, best, read_summary(workdir) if finished else None)


class Run(NamedTuple):
    """What the loop of a training works with."""

    config: TrainConfig
    epoch: Epoch
    step: Callable  # (packed State, batch) -> (packed State, metrics).
    packing: Packing
    evaluate: Callable  # Variables -> Outcome.
    report: Callable  # (step, split, figures, [predictions of each class]) -> None.
    checkpoints: checkpoint.TrainingCheckpoints
    interruption: Interruption
    patience: Patience


def take_steps(run: Run, state: State, start: int, batches: Iterable[Any]) -> Ending:
    """Take the steps from `start` on."""
    config, epoch, meter = run.config, run.epoch, Meter()
    learned = count_steps(config, epoch)
    last = learned + config.recalibrate
    packed = run.packing.pack_state(state)
    step, pairs = start, None
    for step, batch in enumerate(batches, start=start + 1):
        packed, metrics = run.step(packed, batch)
        meter.add(step, metrics, epoch.images(step - 1))
        evaluating = step % (config.eval_every * epoch.steps) == 0 or step in (learned, last)
        stopping = parallel.all_stop(step, run.interruption.wanted) and step < last
        # A checkpoint ends the current line of the log, so that a resumed run writes the same lines.
        if step % config.log_every == 0 or evaluating or stopping:
            run.report(step, "train", finite(meter, run.checkpoints))
        figures = None
        if evaluating or stopping:
            state = run.packing.unpack_state(packed)
        if evaluating:
            figures, pairs = run.evaluate(state.variables)
            run.report(step, "eval", figures, pairs)
            if state.ema:
                run.report(step, "eval_ema", run.evaluate(state.ema).figures)
            run.patience.add(figures["top1"])
            meter.restart()
        if evaluating or stopping:
            run.checkpoints.save(step, parallel.to_host(items_of(state)), figures)
        if stopping:
            return Ending(step, True, pairs)
        if run.patience.over:
            logger.info("ends early: %d evaluations without a higher top-1", config.patience)
            break
    return Ending(step, False, pairs)


def take_probe(run: Run, module: ShuffleNetV2, state: State, start: int, source: Source, class_weights: Any) -> Ending:
    """Fit the classifier alone, as the only step of a run."""
    if start:
        return Ending(start, False, None)
    variables = probe(module, run.config, jax.device_get(state.variables), source, class_weights)
    figures, pairs = run.evaluate(parallel.replicate(variables))
    run.report(1, "eval", figures, pairs)
    state = state.replace(step=jnp.ones((), jnp.int32), **variables, ema=variables if state.ema else None)
    run.checkpoints.save(1, parallel.to_host(items_of(state)), figures)
    return Ending(1, False, pairs)


def open_sources(config):
    """Open the data to train and to evaluate on, and report what was decided and ignored."""
    place = {"data_dir": config.data_dir, "val_share": config.val_share}
    train = open_source(config.data, config.train_split, **place, reader=Reader("train_split"))
    known = {"classes": train.classes, "num_classes": train.num_classes}
    evaluated = open_source(config.data, config.eval_split, **place, **known, reader=EVALUATION)
    if parallel.is_first():
        report_notes((*train.notes, *evaluated.notes, *_notes_on_names(config, train, evaluated)))
    return train, evaluated


def _notes_on_names(config: TrainConfig, train: Source, evaluated: Source) -> tuple[Note, ...]:
    """Return a warning where one split has names of classes, and the other a list of labels without names."""
    names = train.classes or evaluated.classes
    if not names or (train.classes and evaluated.classes):
        return ()
    listed = "evaluation" if train.classes else "training"
    pairs = ", ".join([f"label {label} is {name}" for label, name in enumerate(names[:3])] + ["..."] * (len(names) > 3))
    told = f"the labels for {listed} in {config.data} have no names: taken in the order of the class folders, {pairs}"
    return (Note(logging.WARNING, told),)


def describe_model(config, source):
    """The model.json of the network that a run trains."""
    names = (*TABLE_FIELDS, "layout", "small_stem", "dropout")
    return ModelInfo(
        **{name: getattr(config, name) for name in names},
        in_chans=config.preprocess.channels,
        num_classes=source.num_classes,
        classes=source.classes,
        preprocess=config.preprocess,
        source={"config": dataclasses.asdict(config)},
    )


def network_of(config, info):
    """Return the ShuffleNetV2 that a run trains, from the TrainConfig and the ModelInfo of `describe_model`."""
    settings = {name: getattr(config, name) for name in ("lowering", "remat", "initial", "frozen")}
    return checkpoint.module_of(info, dtype=jnp.dtype(config.dtype), **settings)


def map_step(module, config, epoch, *, packing, teacher=None, devices=None):
    """Return the step of a run as one call on a whole batch: `parallel.map_train_step` of `train_step`."""
    return parallel.map_train_step(
        partial(train_step, module, config, epoch, teacher=teacher, packing=packing), devices
    )


def items_of(state):
    """What a checkpoint holds of a State."""
    items = {checkpoint.VARIABLES: state.variables, checkpoint.OPTIMIZER: state.optimizer}
    return items | {checkpoint.EMA: state.ema} if state.ema else items


def resume(checkpoints, state, total_steps):
    """The state to go on from, on all devices, and how many steps it has behind it.

    Damaged checkpoints are named and taken out of the way, once an older one is found whole.

    Raises:
      InputError: no checkpoint can be read, or it has more steps behind it than the run shall take.
    """
    damaged, found, step = {}, None, 0
    for number in checkpoints.steps():
        try:
            found, step = checkpoints.restore(number, items_of(state)), number
            break
        except checkpoint.DamagedError as error:
            damaged[number] = error
    if damaged and not found:
        raise InputError(f"no checkpoint can be read any more; the newest: {next(iter(damaged.values()))}")
    if step > total_steps:
        raise InputError(
            f"{checkpoints.directory.parent} holds a run of {step:,} steps, but with the data as they are now it ends "
            f"after {total_steps:,}; restore the data, or choose another `workdir`"
        )
    parallel.require_same("checkpoints", (step, *damaged))
    for bad, reason in damaged.items():
        place = checkpoints.set_aside(bad)
        if parallel.is_first():
            logger.warning("%s; it lies in %s now", reason, place)
    if found:
        averages = found.get(checkpoint.EMA)
        state = state.replace(**found[checkpoint.VARIABLES], **found[checkpoint.OPTIMIZER], ema=averages)
        logger.info("continuing after step %s", step)
    return parallel.replicate(state), step


def require_trainable(config, epoch):
    """Raises InputError if the last batch of a pass is too small for batch statistics."""
    height, width = (-(-side // (8 if config.small_stem else 32)) for side in config.train_preprocess.size)
    if epoch.share * height * width < 2:
        raise InputError(
            f"the last batch of an epoch leaves {epoch.share} image to each group of {epoch.plan.group}, too few for "
            f"batch statistics at {config.image_size} pixels; change batch_size"
        )


def describe_run(config, epoch):
    """What a run is going to do, in two lines."""
    if config.linear_probe:
        return f"the classifier alone, by logistic regression on the features of {epoch.size:,} images"
    plan = epoch.plan
    last = "" if epoch.left == plan.batch_size else f", the last with {epoch.left} images"
    parts = f", in {plan.parts} parts" if plan.parts > 1 else ""
    length = "epochs" if config.steps else f"{config.epochs} epochs"
    further = f" and {config.recalibrate:,} for the running statistics" if config.recalibrate else ""
    usual = f" ({config.learning_rate:g} for batches of {config.scale_lr_from})" if config.scale_lr_from else ""
    return (
        f"{epoch.size:,} images, {length} of {epoch.steps:,} steps{last}: {count_steps(config, epoch):,} steps"
        f"{further}\nbatches of {plan.batch_size} on {plan.devices} device(s){parts}, batch statistics over "
        f"{plan.group}; learning rate {peak_rate(config):g}{usual}, {config.schedule}"
    )


def describe_start(backend: str, cache: str | None) -> str | None:
    """Return what the first minutes of a run are, where it is minutes: JAX's backend, and where it keeps programs."""
    if backend != "gpu":
        return None
    what = "the first step takes minutes: XLA compiles it, and times several kernels for each operation"
    if cache is None:
        return f"{what}; without a compilation cache, every run does so again"
    return f"{what}; later runs find the results in {cache}"


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
    """Return a function from variables to the Outcome on the evaluation split."""
    step = parallel.map_eval_step(partial(predict_classes, partial(eval_step, module, config.preprocess)))
    fitting = parallel.rows_that_fit(config.preprocess.size) * jax.device_count()
    batch_size = parallel.shared_equally(min(config.eval_batch_size, len(source), fitting))

    def evaluate_state(variables):
        found = []

        def paired(variables, batch):
            sums, pairs = step(variables, batch)
            found.append(pairs)
            return sums, pairs

        batches = eval_batches(source, config.preprocess, batch_size=batch_size, **parallel.own_slice())
        figures, _ = evaluate(paired, variables, batches)
        pairs = parallel.gather(np.concatenate([np.asarray(rows).reshape(-1, 2) for rows in found]))
        pairs = pairs[pairs[:, 0] >= 0]
        return Outcome(figures | ClassScores(*pairs.T, module.num_classes).means, pairs)

    return evaluate_state


def make_report(config, log, epoch, classes):
    """Return a function that logs a row of figures and reports evaluations; without a log it does nothing."""
    learning_rate = make_schedule(config, epoch)

    def report(step, split, figures, pairs=None):
        if figures is None or log is None:
            return
        names = ("loss", "top1", "top5", *(MEANS if split != "train" else ()))
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
            accuracy = (
                f"top-1{whose} {row['top1']:.2f} %, balanced {row['balanced_accuracy']:.2f} %, loss {row['loss']:.4f}"
            )
            when = "linear probe" if config.linear_probe else f"step {step}, epoch {row['epoch']:.1f}"
            logger.info("%s: %s", when, accuracy)
        if pairs is not None:
            warn_of_collapse(step, np.bincount(pairs[:, 1]), row["top1"], row["lr"], classes)

    return report


def fed_batches(source, config, epoch, start, stop, *, stored=None):
    """The batches of steps start .. stop - 1 on the devices, with a progress bar and a word about damaged images."""
    which = {"start_step": start, "stop_step": stop, **parallel.own_slice()}
    batches = train_batches(source, config, epoch.plan, **which, workers=config.workers, stored=stored)
    fed = parallel.feed(without_damage(batches, config, len(source)), epoch.plan)
    return shown(fed, epoch, start, stop)


def without_damage(batches, config, examples):
    """The batches as the devices take them; names each damaged image once, and stops when there are too many."""
    found = set()
    for batch in batches:
        for reason in set(batch.pop("damaged")) - found - {""}:
            found.add(reason)
            logger.warning("%s; another one takes its place", reason)
        if len(found) > max(1, config.max_damaged * examples):
            raise InputError(
                f"{len(found)} of {examples} training images are damaged, more than the share max_damaged allows "
                f"({config.max_damaged}); repair the data or raise it"
            )
        yield batch


def shown(batches, epoch, start, total_steps):
    """The batches as they come, with a progress bar in images."""
    done, total = map(epoch.images_before, (start, total_steps))
    with progress.bar(total=total, initial=done, unit="image", description="training") as bar:
        for step, batch in enumerate(batches, start=start):
            yield batch
            bar.update(epoch.images(step))
