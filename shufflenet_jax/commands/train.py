"""`train.py`: trains a preset, with any of its settings overridden; the same command again resumes."""

import argparse
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import simple_parsing

from .. import parallel
from ..batch_groups import Epoch
from ..checkpoint import read_info
from ..config import TrainConfig
from ..environment import compiling_for_elsewhere
from ..errors import InputError
from ..files import path_of, printable, writing
from ..recipes import PRESETS
from ..slices import find_slice
from ..training.ahead import TooLargeError, compile_ahead, open_training_data
from ..training.curves import plot_schedule
from ..training.loop import TrainResult, describe_run, train
from ..training.rule import settle
from ..training.schedule import count_steps, count_warmup, make_schedule, peak_rate
from ..training.summary import describe_summary
from .console import libraries_silent, speak_as
from .parsing import CommandLine, add_process_options, numbers, program_of, require_width_or_channels

DESCRIPTION = "Train a ShuffleNetV2. The same command again resumes; every setting below overrides the preset's."


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    config, options = parse(argv)
    if options.print_schedule:
        with jax.enable_x64(config.dtype == "float64"):
            return print_schedule(config, options.print_schedule)
    if options.compile_for:
        return compile_for(config, options.compile_for, options.dump)
    with parallel.joined(options.coordinator_address, options.num_processes, options.process_id, on_joined=speak_as):
        workdir = options.workdir or f"runs/{options.config}"
        result = train(config, workdir, changed_data=options.changed_data, profile=options.profile)
    if result.summary and options.config == "finetune" and parallel.is_first():
        print(
            *describe_summary(result.summary, read_info(result.workdir).classes),
            *next_commands(config, result),
            sep="\n",
        )
    # 0 for SIGTERM, so that a scheduler restarts the run; a shell's usual status for Ctrl-C.
    return 128 + signal.SIGINT if result.signal == signal.SIGINT and not result.finished else 0


def next_commands(config: TrainConfig, result: TrainResult) -> list[str]:
    """Return the commands that evaluate, predict and export with a trained network.

    Args:
      config: the settings of the run.
      result: of the run.
    """
    place = shlex.quote(str(result.workdir))
    data = {"data": config.data, "data-dir": config.data_dir, "split": config.eval_split}
    given = "".join(f" --{name} {shlex.quote(value)}" for name, value in data.items() if value)
    images = shlex.quote(config.data) if Path(config.data).is_dir() else "IMAGE.jpg"
    return [
        "evaluate, predict and export:",
        f"  python -m shufflenet_jax eval --checkpoint {place}{given} --per-class --report {place}/report.html",
        f"  python -m shufflenet_jax predict {images} --checkpoint {place} --out predictions.csv",
        f"  python -m shufflenet_jax export {place} --format onnx --out model.onnx",
    ]


def parse(argv: Sequence[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """Parse the command line.

    Args:
      argv: the command's arguments.

    Returns:
      (the settings, the other options).

    Raises:
      InputError: they are wrong.
    """
    first = CommandLine(prog=program_of("train"), add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--width")
    for option in ("--channels", "--repeats"):
        first.add_argument(option, type=numbers)
    given = first.parse_known_args(argv)[0]
    require_width_or_channels(given)
    name = given.config
    parser = Parser(
        prog=program_of("train"),
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        add_option_string_dash_variants=simple_parsing.DashVariant.DASH,
        argument_generation_mode=simple_parsing.ArgumentGenerationMode.FLAT,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, choices=PRESETS, help="the preset: " + ", ".join(PRESETS))
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run (default: runs/ and the preset's name)")
    parser.add_argument(
        "--changed-data",
        action="store_true",
        help="continue a run even if examples of its data were added, removed or changed",
    )
    parser.add_argument(
        "--print-schedule",
        metavar="FILE.png",
        nargs="?",
        const=True,
        help="only print the learning rate over the run, and draw it into a file",
    )
    parser.add_argument(
        "--profile",
        metavar="DIR",
        help="trace steps 20 to 30 after the start into this folder, for TensorBoard or Perfetto; of several processes "
        "the first one",
    )
    parser.add_argument(
        "--compile-for",
        metavar="SLICE",
        help="only compile the step for hardware that is not here, like v5e:16x16, v5p:4x4x4, v6e:2x2 or h100:4x8 "
        "(hosts x GPUs), and print whether it fits, its memory, its collectives and the bytes that it touches",
    )
    parser.add_argument("--dump", metavar="DIR", help="with --compile-for: store the optimized program in this folder")
    add_process_options(parser)
    parser.add_arguments(TrainConfig, dest="settings", default=PRESETS.get(name, PRESETS["digits"]))
    options = parser.parse_args(argv)
    if options.dump and not options.compile_for:
        raise InputError("--dump stores the program of --compile-for; give both")
    if options.profile and (options.compile_for or options.print_schedule):
        raise InputError("--profile traces a run, but this command takes no step; omit one of the options")
    return options.settings, options


class Parser(CommandLine, simple_parsing.ArgumentParser):
    """simple_parsing's parser with our way to report misuse."""


class HelpFormatter(simple_parsing.SimpleHelpFormatter):
    """simple_parsing's formatter without defaults of None."""

    def _get_help_string(self, action: argparse.Action) -> str:
        help_text = super()._get_help_string(action) or ""
        return help_text.replace(" (default: %(default)s)", "") if action.default is None else help_text


def print_schedule(config: TrainConfig, picture: str | Literal[True]) -> int:
    """Print the learning rate at the important steps of a run, and draw it.

    Args:
      config: the settings.
      picture: path of a PNG file; True draws none.

    Returns:
      The exit status.
    """
    source = open_training_data(config)
    config, chosen = settle(config, source, {})
    epoch = Epoch(len(source), parallel.plan_for_devices(config))
    total, warmup = count_steps(config, epoch), count_warmup(config, epoch)
    schedule = jax.jit(jax.vmap(make_schedule(config, epoch)))
    edges = {warmup - 1, warmup} if warmup else set()
    steps = np.array(sorted({*edges, *range(0, total, -(-total // 20)), total - 1}))
    rates, highest = schedule(steps), peak_rate(config) or 1.0
    if chosen:
        print(chosen.text)
    print(f"{describe_run(config, epoch)}\n{'step':>10}{'epoch':>9}{'learning rate':>15}")
    for step, rate in zip(steps, rates, strict=True):
        bar = "#" * round(float(40 * rate / highest))
        print(f"{step:10,}{step / epoch.steps:9.2f}{rate:15.6g}  {bar}".rstrip())
    if picture is not True:
        every = np.unique(np.linspace(0, total - 1, 2000).astype(int))
        plot_schedule(every / epoch.steps, schedule(every), Path(picture))
        print(f"picture: {picture}")
    return 0


def compile_for(config: TrainConfig, name: str, folder: str | None) -> int:
    """Print the memory, the collectives and the touched bytes of a step on a slice.

    Args:
      config: the settings.
      name: of the slice.
      folder: where to store the step's program; None stores nothing.

    Returns:
      The exit status: 1 if the step does not fit.

    Raises:
      InputError: the step cannot be compiled.
    """
    program = path_of(folder) / f"{name.replace(':', '-')}.hlo" if folder else None
    if program:
        with writing(program.parent):
            program.parent.mkdir(parents=True, exist_ok=True)
    with compiling_for_elsewhere(), libraries_silent():
        target = find_slice(name)
        try:
            step = compile_ahead(config, target)
        except TooLargeError as error:
            print(f"does not fit on {name}: {error}")
            return 1
    print(describe_run(step.config, step.epoch))
    print(f"compiled for {name} in {step.seconds:.0f} s")
    parts = ", ".join(f"{part} {size / 1e6:,.1f} MB" for part, size in step.memory._asdict().items())
    needed, available = sum(step.memory), target.memory
    fits = "fits" if needed <= available else "does not fit"
    print(f"{fits}: {needed / 1e9:.2f} GB of {available / 1e9:.2f} GB on each device ({parts})")
    kinds = "".join(f"; {kind} {n:,}, {size / 1e6:.2f} MB" for kind, (n, size) in step.counts.collectives.items())
    total = step.counts.total
    print(f"a step exchanges in {total.number:,} collectives {total.size / 1e6:.2f} MB on each device{kinds}")
    print(f"touches {step.touched_per_image / 1e6:.1f} MB per image in the devices' main memory")
    if program:
        with writing(program):
            program.write_text(step.text, encoding="utf-8")
        print(f"program: {printable(str(program))}")
    return 0 if needed <= available else 1
