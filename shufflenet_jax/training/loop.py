"""A training from its first step to its last, with evaluations, checkpoints and a log."""

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from .. import checkpoint, parallel, progress
from ..architecture import TABLE_FIELDS, name_of
from ..batch_groups import Epoch
from ..config import ModelInfo, TrainConfig
from ..data.fingerprint import take_fingerprint
from ..data.inventory import Note, report_notes
from ..data.pipeline import eval_batches, train_batches
from ..data.sources import Reader, Source, open_source
from ..errors import InputError, Unchecked
from ..evaluation.classes import MEANS, ClassScores
from ..evaluation.counting import eval_step, evaluate, predict_classes
from ..evaluation.predictions import Predictions
from ..files import path_of, printable, writing
from ..model import ShuffleNetV2, init_variables
from ..shapes import Array, Batch, Metrics, Variables
from . import workdir as workdirs
from .beginning import initial_variables
from .curves import plot_curves
from .interruption import Interruption
from .logs import METRICS, Meter, MetricsLog, read_metrics
from .losses import ClassWeights
from .optimizer import decay_table
from .packing import Packing, packing_for
from .patience import Patience
from .pitfalls import warn_of_collapse, warn_of_pitfalls
from .probe import probe
from .profiling import Step, make_folder, traced
from .resuming import Data
from .rule import settle
from .schedule import count_steps, make_schedule, peak_rate
from .state import State, create_state
from .step import Teacher, train_step
from .summary import Summary, read_summary, summarize, write_summary
from .supervision import load_supervision

logger = logging.getLogger(__name__)

EVALUATION = Reader(
    split="eval_split",
    owner="the training data",
    advice="evaluate on classes that training has: correct `eval_split`, `train_split` or the data",
)


Figures = dict[str, float]
Pairs = Int[np.ndarray, "images 2"]  # Label and prediction of each image.
Evaluate = Callable[[Variables], "Outcome"]
Report = Callable[..., None]  # (step, split, figures, [predictions of each class]).


class Evaluation(NamedTuple):
    """The figures of one evaluation during a run.

    Attributes:
      step: after which it happened.
      epoch: the same in epochs.
      loss: mean over the images.
      top1: in percent.
      top5: in percent.
      balanced_accuracy: mean over the classes, in percent; None if an older version logged the evaluation.
      f1: mean over the classes, in percent; None if an older version logged the evaluation.
    """

    step: int
    epoch: float
    loss: float
    top1: float
    top5: float
    balanced_accuracy: float | None = None
    f1: float | None = None


class Outcome(NamedTuple):
    """The result of an evaluation.

    Attributes:
      figures: those of `evaluate`, and the means of `ClassScores`.
      pairs: int (N, 2), label and prediction of each image.
    """

    figures: Figures
    pairs: Pairs


class TrainResult(NamedTuple):
    """The result of a run.

    Attributes:
      workdir: its folder, which is a checkpoint for every other command: the best one, else the latest.
      step: the last saved step.
      finished: False if a signal stopped the run; the same call continues it.
      signal: the number of that signal, or None. In a run of several processes another one may have received it.
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
    """The end of a loop.

    Attributes:
      step: the last one.
      stopped: whether a signal ended it, so that the run may continue.
      pairs: as in an Outcome, of the last evaluation; None if there was none.
    """

    step: int
    stopped: bool
    pairs: Pairs | None


def train(
    config: Unchecked, workdir: Unchecked, *, changed_data: bool = False, profile: str | Path | None = None
) -> TrainResult:
    """Train a network in a workdir, or continue the training in it.

    All processes of a run on several hosts call this together, inside `parallel.joined`.

    Args:
      config: the settings, like `recipes.PRESETS["digits"]`.
      workdir: folder of the run; it is created if there is none.
      changed_data: continue even if examples were added, removed or changed since the last start.
      profile: folder for a trace of steps 20 to 30 after the start, of the first process; None means no trace.

    Raises:
      InputError: the data, the settings or the workdir are unusable, or the loss is no longer finite.
    """
    parallel.require_platform()
    if not isinstance(config, TrainConfig):
        raise InputError(f"config is {config!r}, but must be a TrainConfig, like one of PRESETS")
    with jax.enable_x64(config.dtype == "float64"):
        folder = make_folder(profile) if profile is not None and parallel.is_first() else None
        result = _train(config, path_of(workdir), changed_data=changed_data, profile=folder)
    gc.collect()  # JAX releases the batches that worker processes have shared only then; at exit it is too late.
    return result


def _train(config: TrainConfig, workdir: Path, *, changed_data: bool, profile: Path | None) -> TrainResult:
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
    if begun:  # Those of the checkpoint replace them.
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
    """Report the settings of a run that is about to start.

    Args:
      config: the settings.
      epoch: number of steps of a pass.
      state: before the first step.
    """
    logger.info("%s", describe_run(config, epoch))
    if not config.linear_probe:
        logger.info("%s", decay_table(state.params, config.decay, config.frozen))
    if note := describe_start(jax.default_backend(), jax.config.jax_compilation_cache_dir):
        logger.info(note)


def leave_results(workdir: Path, config: TrainConfig, info: ModelInfo, ending: Ending) -> None:
    """Write the files of a finished run beside its checkpoints: a summary, its curves, and a mark that it is over.

    Args:
      workdir: folder of the run.
      config: the settings.
      info: the ModelInfo of the network.
      ending: how the loop ended.
    """
    if ending.pairs is not None:
        write_summary(workdir, summarize(ending.step, ending.pairs, info.num_classes, best_of(workdir)))
    title = printable(f"{name_of(config.table)} on {config.data}")
    logger.info("curves: %s", plot_curves(workdir, title=title))
    with writing(workdir):
        (workdir / workdirs.FINISHED).touch()  # For scripts that restart a run until it is over.


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows about evaluations in the log of a workdir that have a top-1.

    Args:
      workdir: folder of the run.
    """
    rows = read_metrics(workdir / METRICS) if (workdir / METRICS).exists() else []
    return [row for row in rows if row["split"] == "eval" and row.get("top1") is not None]


def best_of(workdir: Path) -> tuple[int, float]:
    """Return the step with the highest top-1 in the log of a workdir, and that top-1 in percent.

    Args:
      workdir: folder of the run.
    """
    best = max(evaluations(workdir), key=lambda row: row["top1"])
    return best["step"], best["top1"]


def result_of(workdir: Path, step: int, *, finished: bool, signal: int | None) -> TrainResult:
    """Return the TrainResult of a run, with the evaluations of its log.

    Args:
      workdir: folder of the run.
      step: the last one.
      finished: whether the run is over.
      signal: number of the signal that stopped it, or None.
    """
    rows: list[list[Any]] = [[row.get(name) for name in Evaluation._fields] for row in evaluations(workdir)]
    logged = [Evaluation(*row) for row in rows if None not in row[: -len(Evaluation._field_defaults)]]
    last, best = (logged[-1], max(logged, key=lambda evaluation: evaluation.top1)) if logged else (None, None)
    return TrainResult(workdir, step, finished, signal, last, best, read_summary(workdir) if finished else None)


class Run(NamedTuple):
    """The parts of a training's loop.

    Attributes:
      config: the settings.
      epoch: number of steps of a pass.
      step: function from a packed State and a batch to the next State and the batch's metrics.
      packing: of the State.
      evaluate: function from variables to an Outcome.
      report: function that logs a row of figures.
      checkpoints: of the run.
      interruption: notes signals.
      patience: ends the run early.
    """

    config: TrainConfig
    epoch: Epoch
    step: Step
    packing: Packing
    evaluate: Evaluate
    report: Report
    checkpoints: checkpoint.TrainingCheckpoints
    interruption: Interruption
    patience: Patience


def take_steps(run: Run, state: State, start: int, batches: Iterable[Batch]) -> Ending:
    """Take the steps of a run.

    Args:
      run: its parts.
      state: after step `start`.
      start: number of the steps before.
      batches: of the steps, on the devices.

    Raises:
      InputError: the loss is no longer finite.
    """
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


def take_probe(
    run: Run, module: ShuffleNetV2, state: State, start: int, source: Source, class_weights: ClassWeights | None
) -> Ending:
    """Fit only the classifier, as the single step of a run.

    Args:
      run: its parts.
      module: the network.
      state: before the step.
      start: 1 if the run has already taken it, else 0.
      source: the training images.
      class_weights: (num_classes,), factors on the losses of each class, or None.

    Raises:
      InputError: all images are of one class.
    """
    if start:
        return Ending(start, False, None)
    variables = probe(module, run.config, jax.device_get(state.variables), source, class_weights)
    figures, pairs = run.evaluate(parallel.replicate(variables))
    run.report(1, "eval", figures, pairs)
    state = state.replace(step=jnp.ones((), jnp.int32), **variables, ema=variables if state.ema else None)
    run.checkpoints.save(1, parallel.to_host(items_of(state)), figures)
    return Ending(1, False, pairs)


def open_sources(config: TrainConfig) -> tuple[Source, Source]:
    """Open the data to train and to evaluate on, and report which files were chosen and skipped.

    Args:
      config: the settings.

    Raises:
      InputError: the data cannot be opened, or the splits have different classes.
    """
    place: dict[str, Any] = {"data_dir": config.data_dir, "val_share": config.val_share}
    train = open_source(config.data, config.train_split, **place, reader=Reader("train_split"))
    wanted: dict[str, Any] = {"classes": train.classes, "num_classes": train.num_classes}
    evaluated = open_source(config.data, config.eval_split, **place, **wanted, reader=EVALUATION)
    if parallel.is_first():
        report_notes((*train.notes, *evaluated.notes, *_notes_on_names(config, train, evaluated)))
    return train, evaluated


def _notes_on_names(config: TrainConfig, train: Source, evaluated: Source) -> tuple[Note, ...]:
    """Return a warning if one split has names of classes, and the other a list of labels without names."""
    names = train.classes or evaluated.classes
    if not names or (train.classes and evaluated.classes):
        return ()
    listed = "evaluation" if train.classes else "training"
    pairs = ", ".join([f"label {label} is {name}" for label, name in enumerate(names[:3])] + ["..."] * (len(names) > 3))
    message = f"the labels for {listed} in {config.data} have no names: read in the order of the class folders, {pairs}"
    return (Note(logging.WARNING, message),)


def describe_model(config: TrainConfig, source: Source) -> ModelInfo:
    """Return the model.json of the network that a run trains.

    Args:
      config: the settings.
      source: the training examples, with the classes.
    """
    names = (*TABLE_FIELDS, "layout", "small_stem", "dropout")
    return ModelInfo(
        **{name: getattr(config, name) for name in names},
        in_chans=config.preprocess.channels,
        num_classes=source.num_classes,
        classes=source.classes,
        preprocess=config.preprocess,
        source={"config": dataclasses.asdict(config)},
    )


def network_of(config: TrainConfig, info: ModelInfo) -> ShuffleNetV2:
    """Return the network that a run trains.

    Args:
      config: the settings.
      info: from `describe_model`.
    """
    settings = {name: getattr(config, name) for name in ("lowering", "remat", "initial", "frozen")}
    return checkpoint.module_of(info, dtype=jnp.dtype(config.dtype), **settings)


def map_step(
    module: ShuffleNetV2,
    config: TrainConfig,
    epoch: Epoch,
    *,
    packing: Packing,
    teacher: Teacher | None = None,
    devices: parallel.Devices | None = None,
) -> parallel.MappedStep:
    """Return the step of a run as one call on a batch over all devices.

    Args:
      module: the network.
      config: the settings.
      epoch: the Epoch, whose plan divides the batch.
      packing: of the State.
      teacher: a network to learn from, or None.
      devices: on which it runs; None means all.
    """
    return parallel.map_train_step(
        partial(train_step, module, config, epoch, teacher=teacher, packing=packing), devices
    )


def items_of(state: State) -> dict[str, Any]:
    """Return the items of a checkpoint.

    Args:
      state: the State to save.
    """
    items = {checkpoint.VARIABLES: state.variables, checkpoint.OPTIMIZER: state.optimizer}
    return items | {checkpoint.EMA: state.ema} if state.ema else items


def resume(checkpoints: checkpoint.TrainingCheckpoints, state: State, total_steps: int) -> tuple[State, int]:
    """Return the state of the newest intact checkpoint, on all devices, and its step.

    Damaged checkpoints newer than it are reported and moved aside.

    Args:
      checkpoints: of the run.
      state: before the first step, which a run without checkpoints keeps.
      total_steps: steps of the run.

    Raises:
      InputError: all checkpoints are damaged, or the newest is from a later step than the last one of the run.
    """
    damaged: dict[int, checkpoint.DamagedError] = {}
    items, step = None, 0
    for number in checkpoints.steps():
        try:
            items, step = checkpoints.restore(number, items_of(state)), number
            break
        except checkpoint.DamagedError as error:
            damaged[number] = error
    if damaged and not items:
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
    if items:
        averages = items.get(checkpoint.EMA)
        state = state.replace(**items[checkpoint.VARIABLES], **items[checkpoint.OPTIMIZER], ema=averages)
        logger.info("continuing after step %s", step)
    return parallel.replicate(state), step


def require_trainable(config: TrainConfig, epoch: Epoch) -> None:
    """Raise InputError if the last batch of a pass is too small for batch statistics.

    Args:
      config: the settings.
      epoch: the Epoch, whose plan divides the batch.
    """
    height, width = (-(-side // (8 if config.small_stem else 32)) for side in config.train_preprocess.size)
    if epoch.share * height * width < 2:
        raise InputError(
            f"the last batch of an epoch leaves {epoch.share} image to each group of {epoch.plan.group}, too few for "
            f"batch statistics at {config.image_size} pixels; change `batch_size`"
        )


def describe_run(config: TrainConfig, epoch: Epoch) -> str:
    """Describe a run in two lines.

    Args:
      config: the settings.
      epoch: the Epoch, whose plan divides the batch.
    """
    if config.linear_probe:
        return f"only the classifier, by logistic regression on the features of {epoch.size:,} images"
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
    """Explain why the first step takes minutes, if it does.

    Args:
      backend: JAX's backend.
      cache: folder of JAX's compilation cache, or None.
    """
    if backend != "gpu":
        return None
    reason = "the first step takes minutes: XLA compiles it, and times several kernels for each operation"
    if cache is None:
        return f"{reason}; without a compilation cache, every run does so again"
    return f"{reason}; later runs find the results in {cache}"


def finite(meter: Meter, checkpoints: checkpoint.TrainingCheckpoints) -> Figures | None:
    """Return the means of a Meter.

    Args:
      meter: of the steps since the last line of the log.
      checkpoints: of the run, for the message.

    Raises:
      InputError: the loss or the gradient is no longer finite.
    """
    try:
        return meter.take()
    except FloatingPointError as error:
        steps = checkpoints.steps()
        saved = (
            f"the last good one is {checkpoints.directory / str(steps[0])}" if steps else "no checkpoint was saved yet"
        )
        raise InputError(
            f"the loss or its gradient is not finite at step {error}; {saved}; lower `learning_rate` or check the data"
        ) from error


def make_evaluate(module: ShuffleNetV2, config: TrainConfig, source: Source) -> Evaluate:
    """Return a function from variables to the Outcome on the evaluation split.

    Args:
      module: the network.
      config: the settings.
      source: the evaluation examples.
    """
    step = parallel.map_eval_step(partial(predict_classes, partial(eval_step, module, config.preprocess)))
    fitting = parallel.rows_that_fit(config.preprocess.size) * jax.device_count()
    batch_size = parallel.shared_equally(min(config.eval_batch_size, len(source), fitting))

    def evaluate_state(variables: Variables) -> Outcome:
        predicted: list[Array] = []

        def paired(variables: Variables, batch: Batch) -> tuple[Metrics, Array]:
            sums, pairs = step(variables, batch)
            predicted.append(pairs)
            return sums, pairs

        batches = eval_batches(source, config.preprocess, batch_size=batch_size, **parallel.own_slice())
        figures, _ = evaluate(paired, variables, batches)
        pairs = parallel.gather(np.concatenate([np.asarray(rows).reshape(-1, 2) for rows in predicted]))
        pairs = pairs[pairs[:, 0] >= 0]
        return Outcome(figures | ClassScores(pairs[:, 0], pairs[:, 1], module.num_classes).means, pairs)

    return evaluate_state


def make_report(config: TrainConfig, log: MetricsLog | None, epoch: Epoch, classes: tuple[str, ...] | None) -> Report:
    """Return a function that logs a row of figures and reports evaluations; without a log it does nothing.

    Args:
      config: the settings.
      log: of the run; None in all processes but the first.
      epoch: number of steps of a pass.
      classes: names of the classes, if they have any.
    """
    learning_rate = make_schedule(config, epoch)

    def report(step: int, split: str, figures: Figures | None, pairs: Pairs | None = None) -> None:
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


def fed_batches(
    source: Source, config: TrainConfig, epoch: Epoch, start: int, stop: int, *, stored: Predictions | None = None
) -> Iterator[Batch]:
    """Yield the batches of steps on the devices, with a progress bar and a warning for each damaged image.

    Args:
      source: the training examples.
      config: the settings.
      epoch: the Epoch, whose plan divides the batches.
      start: the first step, from 0.
      stop: the step after the last.
      stored: a teacher's logits of the examples, or None.
    """
    which = {"start_step": start, "stop_step": stop, **parallel.own_slice()}
    batches = train_batches(source, config, epoch.plan, **which, workers=config.workers, stored=stored)
    fed = parallel.feed(without_damage(batches, config, len(source)), epoch.plan)
    return shown(fed, epoch, start, stop)


def without_damage(
    batches: Iterable[dict[str, np.ndarray]], config: TrainConfig, examples: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches without the column "damaged"; warn of each damaged image once.

    Args:
      batches: from `train_batches`.
      config: the settings.
      examples: number of training examples.

    Raises:
      InputError: too many images are damaged.
    """
    damaged: set[str] = set()
    for batch in batches:
        for reason in set(batch.pop("damaged")) - damaged - {""}:
            damaged.add(reason)
            logger.warning("%s; another image replaces it", reason)
        if len(damaged) > max(1, config.max_damaged * examples):
            raise InputError(
                f"{len(damaged)} of {examples} training images are damaged, more than the share `max_damaged` allows "
                f"({config.max_damaged}); repair the data or raise it"
            )
        yield batch


def shown(batches: Iterable[Batch], epoch: Epoch, start: int, total_steps: int) -> Iterator[Batch]:
    """Yield the batches, with a progress bar in images.

    Args:
      batches: of the steps.
      epoch: number of images of each step.
      start: the first step, from 0.
      total_steps: steps of the run.
    """
    done, total = map(epoch.images_before, (start, total_steps))
    with progress.bar(total=total, initial=done, unit="image", description="training") as bar:
        for step, batch in enumerate(batches, start=start):
            yield batch
            bar.update(epoch.images(step))
