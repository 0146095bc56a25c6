"""`python -m shufflenet_jax COMMAND`, installed `shufflenet-jax COMMAND`: the scripts' own code."""

import argparse
import importlib
import sys

from .commands.console import run
from .commands.parsing import CommandLine

COMMANDS = {  # name: (module with main(argv), what it does)
    "train": ("train", "train a preset"),
    "eval": ("evaluate", "evaluate a checkpoint"),
    "predict": ("predict", "tell what is in images"),
    "models": ("models", "list the published weights"),
    "info": ("info", "tell what a network costs, stage by stage"),
    "export": ("export", "write a network for another runtime: StableHLO, ONNX, safetensors, PyTorch"),
    "publish": ("publish", "make a model directory to give away of a checkpoint"),
    "prepare": ("prepare", "turn images or TFRecords into a data set that trains at full speed"),
    "verify": ("verify", "tell what a data set holds, and what in it cannot be read"),
    "plot": ("plot", "draw the curves of a training"),
    "convert": ("from_torch", "convert a PyTorch checkpoint into a model directory"),
    "convert-back": ("to_torch", "write a model directory as a PyTorch checkpoint"),
}


def main(argv):
    commands = "\n".join(f"  {name:14}{meaning}" for name, (_, meaning) in COMMANDS.items())
    parser = CommandLine(
        prog="shufflenet-jax",
        usage="%(prog)s COMMAND [options]",
        description=f"commands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of these; COMMAND --help tells more")
    options = parser.parse_args(argv[:1])
    # Only what the command needs is imported: the libraries take seconds.
    module = importlib.import_module(f".commands.{COMMANDS[options.command][0]}", __package__)
    return module.main(argv[1:])


def entry():
    return run(main)


if __name__ == "__main__":
    sys.exit(entry())
