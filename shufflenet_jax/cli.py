"""What all commands share: how they parse, how they report bad input, how they show progress."""

import argparse
import ctypes
import logging
import os
import platform
import sys

from tqdm import tqdm

from .errors import InputError
from .files import cache_dir

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # The names and numbers of malloc.h.


class CommandLine(argparse.ArgumentParser):
    """An argument parser that reports misuse like any other bad input."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.add_help:  # `run` looks for it before anything is parsed.
            self.add_argument("--debug", action="store_true", help="show where an error came from")

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def run(command, argv=None):
    """Runs `command(argv)` as a process: its result is the exit status; bad input is one line and status 2.

    With --debug anywhere on the command line errors keep their traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    use_compilation_cache()
    keep_freed_memory()
    # Orbax and Grain tell at length what they do, and log with a traceback each what they raise anyway.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR if debug else logging.CRITICAL)
    try:
        return command([word for word in argv if word != "--debug"]) or 0
    except InputError as error:
        if debug:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def use_compilation_cache():
    """Lets JAX keep compiled programs between processes; an explicit JAX_COMPILATION_CACHE_DIR wins."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compiled"))


def keep_freed_memory():
    """Lets the C library reuse memory that a step has freed instead of giving it back to the system.

    XLA allocates what a step needs anew each time, and fresh pages cost a fault each: a third of a training step.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_ARENA_MAX, 1)  # The arenas of other threads hold no large pieces.
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def progress(**options):
    """A progress bar on stderr with rate and time left; silent where nobody watches the terminal."""
    return tqdm(file=sys.stderr, dynamic_ncols=True, disable=None, **options)


def positive_integer(text):
    """A number from 1 up, for `type=`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def tell(text):
    """A line on stderr that does not tear a progress bar."""
    tqdm.write(text, file=sys.stderr)
