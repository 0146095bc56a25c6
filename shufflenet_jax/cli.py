"""What all commands share: how they parse, how they report bad input, how they show progress."""

import argparse
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from .errors import InputError


class CommandLine(argparse.ArgumentParser):
    """An argument parser that reports misuse like any other bad input."""

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def run(command, argv=None):
    """Runs `command(argv)` as a process: its result is the exit status; bad input is one line and status 2.

    With --debug anywhere on the command line errors keep their traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    use_compilation_cache()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and Grain tell at length what they do.
    try:
        return command([word for word in argv if word != "--debug"]) or 0
    except InputError as error:
        if debug:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def cache_dir():
    """Where converted weights and compiled programs are kept: $SHUFFLENET_JAX_CACHE, or the user's cache folder."""
    if "SHUFFLENET_JAX_CACHE" in os.environ:
        return Path(os.environ["SHUFFLENET_JAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shufflenet_jax"


def use_compilation_cache():
    """Lets JAX keep compiled programs between processes; an explicit JAX_COMPILATION_CACHE_DIR wins."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compiled"))


def progress(iterable=None, **options):
    """A progress bar on stderr with rate and time left; silent where nobody watches the terminal."""
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, disable=None, **options)


def positive_integer(text):
    """A number from 1 up, for `type=`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def tell(text):
    """A line on stderr that does not tear a progress bar."""
    tqdm.write(text, file=sys.stderr)
