"""How commands parse their command lines."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..config import RENAMED, VAL_SHARE, whole_numbers
from ..errors import InputError

# What a checkpoint may be, for help texts: see `loading.load_model`.
CHECKPOINT = (
    "a published name, hf-hub:OWNER/NAME, a model directory, a training workdir, WORKDIR/checkpoints/N, or a .pth or "
    ".safetensors file"
)

Passed = Any  # Handed on to argparse, or back from it.

SCRIPTS = ("train.py", "eval.py", "from_torch.py", "to_torch.py")

_flags: dict[str, str] = {}  # {argument: option} of the running command, like {"data_dir": "--data-dir"}.


def program() -> str:
    """Return how the user started the package: `shufflenet-jax` or `python -m shufflenet_jax`."""
    as_module = Path(sys.argv[0]).parts[-2:] == ("shufflenet_jax", "__main__.py")
    return "python -m shufflenet_jax" if as_module else "shufflenet-jax"


def program_of(command: str) -> str:
    """Return how the user started a command: a script's name, or the program and the command.

    Args:
      command: its name.
    """
    script = Path(sys.argv[0]).name
    return script if script in SCRIPTS else f"{program()} {command}"


class CommandLine(argparse.ArgumentParser):
    """An argument parser that reports misuse like any other invalid input."""

    def __init__(self, *args: Passed, **kwargs: Passed) -> None:
        super().__init__(*args, **kwargs)
        if self.add_help:  # `console.run` looks for it before anything is parsed.
            self.add_argument("--debug", action="store_true", help="show the traceback of an error")
            self.add_argument("--version", action="version", version=f"shufflenet_jax {__version__}")

    def error(self, message: str) -> NoReturn:
        """Raise an InputError."""
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Passed = None, namespace: Passed = None) -> Passed:
        """Parse a command line, and note its options for messages."""
        try:
            return super().parse_args(args and with_current_names(args), namespace)
        finally:
            _flags.clear()
            _flags.update(
                (option.removeprefix("--").replace("-", "_"), option)
                for action in self._actions
                for option in action.option_strings
            )


def with_current_names(argv: Sequence[str]) -> list[str]:
    """Replace renamed values of --lowering.

    Args:
      argv: a command line.
    """
    words = list(argv)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--lowering" and equals:
            words[place] = f"{name}={RENAMED.get(value, value)}"
        elif word == "--lowering" and place + 1 < len(words):
            words[place + 1] = RENAMED.get(words[place + 1], words[place + 1])
    return words


def with_flags(text: str) -> str:
    """Replace the arguments that a message of the library has in backticks by the command's options.

    Args:
      text: the message.
    """
    return re.sub(r"`(\w+)`", lambda match: _flags.get(match[1], match[1]), text)


def numbers(text: str) -> tuple[int, ...]:
    """Parse "4,8,4" as (4, 8, 4), for `type=`.

    Args:
      text: the option's value.

    Raises:
      ArgumentTypeError: it has another form.
    """
    try:
        return whole_numbers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 4,8,4") from error


def require_width_or_channels(options: argparse.Namespace) -> None:
    """Raise InputError if a command line describes the network twice.

    Args:
      options: with `width` and `channels`.
    """
    if options.width is not None and options.channels is not None:
        raise InputError("--channels describes the network instead of --width; omit one of them")


def positive_integer(text: str) -> int:
    """Parse a number from 1 up, for `type=`.

    Args:
      text: the option's value.

    Raises:
      ArgumentTypeError: it is less.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def add_val_share(parser: argparse.ArgumentParser, *, own: str = "") -> None:
    """Add the option for folders without splits.

    Args:
      parser: of the command.
      own: describes the command's own default, for which the option is None; "" means that there is none.
    """
    usual = f"{own}, else {VAL_SHARE}" if own else VAL_SHARE
    parser.add_argument(
        "--val-share",
        type=float,
        default=None if own else VAL_SHARE,
        metavar="SHARE",
        help=f"if a folder has no splits: share of each class to hold out as val (default: {usual})",
    )


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that connect the processes of a run on several hosts.

    Args:
      parser: of the command.
    """
    group = parser.add_argument_group(
        "several hosts",
        "Start the same command once on each host. On TPU pods, under Slurm and in indexed Kubernetes jobs the "
        "processes find each other; elsewhere give all three of these, as options or as environment variables.",
    )
    options: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
        ("--coordinator-address", "HOST:PORT", str, "address of process 0, which all others can reach"),
        ("--num-processes", "N", positive_integer, "number of processes"),
        ("--process-id", "I", int, "number of this process: 0 ... N - 1"),
    )
    for option, metavar, kind, meaning in options:
        name = "JAX_" + option.removeprefix("--").replace("-", "_").upper()
        default = _from_environment(name, kind)
        group.add_argument(
            option, metavar=metavar, type=kind, default=default, help=f"{meaning} (default: {name}, if it is set)"
        )


def _from_environment(name: str, kind: Callable[[str], Any]) -> str | int | None:
    """Convert an environment variable, or return None if it is not set. Raise InputError if it is no number."""
    text = os.environ.get(name)
    try:
        return kind(text) if text else None
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(
            f"the environment variable {name} is {text!r}, but must be a number; correct or unset it"
        ) from error
