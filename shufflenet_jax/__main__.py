"""`python -m shufflenet_jax COMMAND`, installed as `shufflenet-jax COMMAND`, runs the code of the scripts.

It imports nothing slow before Ctrl-C can end the process quietly.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from .errors import InputError
from .installation import require_system

COMMANDS = {  # {name: (module with main(argv), description)}
    "train": ("train", "train a preset"),
    "eval": ("evaluate", "evaluate a checkpoint"),
    "predict": ("predict", "classify images"),
    "models": ("models", "list the published weights"),
    "info": ("info", "count what a network costs, per stage"),
    "export": ("export", "write a network for another runtime: StableHLO, ONNX, safetensors, PyTorch"),
    "publish": ("publish", "write a checkpoint as a folder to publish, and push it to the Hugging Face Hub"),
    "prepare": ("prepare", "convert images or TFRecords to a data set that trains at full speed"),
    "verify": ("verify", "check a data set: its contents, and the images that cannot be read"),
    "plot": ("plot", "draw the curves of a training run"),
    "convert": ("from_torch", "convert a PyTorch checkpoint into a model directory"),
    "convert-back": ("to_torch", "write a model directory as a PyTorch checkpoint"),
}


def main(argv: Sequence[str]) -> int | None:
    """Run a command.

    Args:
      argv: its name and its arguments.

    Returns:
      Its exit status.
    """
    with interrupts_quiet():
        import argparse
        import importlib

        from .commands.parsing import CommandLine, program

        commands = "\n".join(f"  {name:14}{meaning}" for name, (_, meaning) in COMMANDS.items())
        parser = CommandLine(
            prog=program(),
            usage="%(prog)s COMMAND [options]",
            description=f"commands:\n{commands}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of these; see COMMAND --help")
        options = parser.parse_args(argv[:1])
        # Import only the libraries of this command: each takes seconds.
        module = importlib.import_module(f".commands.{COMMANDS[options.command][0]}", __package__)
    return module.main(argv[1:])


def entry(*words: str) -> int:
    """Run a command as a process.

    Args:
      words: arguments before those of the command line.

    Returns:
      Its exit status.
    """
    try:
        require_system()
    except InputError as error:
        print("error:", error, file=sys.stderr)
        return 2
    with interrupts_quiet():
        from .commands.console import run
    return run(main, [*words, *sys.argv[1:]])


@contextlib.contextmanager
def interrupts_quiet() -> Iterator[None]:
    """End the process with status 130 at Ctrl-C, within the block; an exception could appear inside any import."""
    usual, here = signal.default_int_handler, threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not usual:  # Python sets handlers only in the main thread.
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


if __name__ == "__main__":
    sys.exit(entry())
