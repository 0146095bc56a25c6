"""`train.py`: train a preset, with any of its settings overridden; the same command again resumes."""

import signal
from pathlib import Path

import jax
import numpy as np
import simple_parsing

from .. import parallel
from ..batch_groups import Epoch
from ..config import TrainConfig
from ..data.sources import KNOWN_SIZES, Reader, open_source
from ..errors import InputError
from ..recipes import PRESETS
from ..training.curves import plot_schedule
from ..training.loop import describe_run, train
from ..training.schedule import count_steps, count_warmup, make_schedule, peak_rate
from .console import speak_as
from .parsing import CommandLine, add_process_options, numbers, program_of, require_width_or_channels

DESCRIPTION = "Train a ShuffleNetV2. The same command again resumes; every setting below overrides the preset's."


def main(argv):
    config, options = parse(argv)
    if options.print_schedule:
        with jax.enable_x64(config.dtype == "float64"):
            return print_schedule(config, options.print_schedule)
    with parallel.joined(options.coordinator_address, options.num_processes, options.process_id, on_joined=speak_as):
        result = train(config, options.workdir or f"runs/{options.config}", changed_data=options.changed_data)
    # 0 for SIGTERM, so that a scheduler starts the run again; a shell's own status for Ctrl-C.
    return 128 + signal.SIGINT if result.signal == signal.SIGINT and not result.finished else 0


def parse(argv):
    """The TrainConfig that the command line asks for, and its other options."""
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
        help="continue a run also where examples of its data were added, removed or changed",
    )
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


def print_schedule(config, picture):
    """Prints the learning rate over a run, a line for each point worth knowing, and draws it where asked to."""
    try:
        place = {"data_dir": config.data_dir, "val_share": config.val_share}
        size = len(open_source(config.data, config.train_split, **place, reader=Reader("train_split")))
    except InputError:
        if config.data not in KNOWN_SIZES:
            raise
        size = KNOWN_SIZES[config.data]
    epoch = Epoch(size, parallel.plan_for_devices(config))
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
        plot_schedule(every / epoch.steps, schedule(every), Path(picture))
        print(f"picture: {picture}")
    return 0
