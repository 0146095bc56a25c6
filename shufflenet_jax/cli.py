"""What all commands share: how they parse, how they report bad input, how they show progress."""

import argparse
import contextlib
import ctypes
import logging
import os
import platform
import sys
import traceback
import warnings

from tqdm import tqdm

from .errors import InputError
from .files import cache_dir

_debug = False
_process, _processes = 0, 1  # Which of a run's processes this is, and how many there are.

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
    global _debug
    debug = _debug = "--debug" in argv
    use_compilation_cache()
    keep_freed_memory()
    # Orbax and Grain tell at length what they do, and log with a traceback each what they raise anyway.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR if debug else logging.CRITICAL)
    # Pillow tells of odd EXIF blocks and palettes in images that decode all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        return command([word for word in argv if word != "--debug"]) or 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # Whoever read what is printed has gone; what is left of it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except Exception as error:
        if isinstance(error, InputError) and not debug:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            status = 2
        elif _processes == 1:
            raise
        else:
            traceback.print_exc()
            status = 1
    if _processes > 1:  # The usual way out waits for the other processes, which wait for this one.
        sys.stderr.flush()
        os._exit(status)
    return status


@contextlib.contextmanager
def libraries_silent():
    """Lets no library in C print on stderr: libjpeg and libpng complain of images that decode all the same.

    What Python prints there still comes through; with --debug everything does.
    """
    if _debug:
        yield
        return
    sys.stderr.flush()
    form = {"buffering": 1, "encoding": sys.stderr.encoding, "errors": "backslashreplace"}
    with (
        open(os.dup(2), "w", **form) as told,
        open(os.devnull, "wb") as nowhere,
        contextlib.redirect_stderr(told),
    ):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(told.fileno(), 2)


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


def speak_as(process, processes):
    """From now on this is one of several processes: the first alone says how things go, all of them what is wrong."""
    global _process, _processes
    _process, _processes = process, processes


def usable_cores():
    """How many cores this process may use: a scheduler may have bound it to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def progress(**options):
    """A progress bar on stderr with rate and time left; silent where nobody watches the terminal."""
    return tqdm(file=sys.stderr, dynamic_ncols=True, disable=True if _process else None, **options)


def positive_integer(text):
    """A number from 1 up, for `type=`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def tell(text):
    """A line on stderr that does not tear a progress bar."""
    if not _process:
        tqdm.write(text, file=sys.stderr)


def warn(text):
    """The same for what is wrong, from any process of a run."""
    where = f"process {_process}: " if _processes > 1 else ""
    tqdm.write(f"warning: {where}{text}", file=sys.stderr)


def add_process_options(parser):
    """How the processes of a run on several hosts find each other where they cannot do so by themselves."""
    group = parser.add_argument_group(
        "several hosts",
        "Start the same command once on each host. On TPU pods, under Slurm and in indexed Kubernetes jobs the "
        "processes find each other; elsewhere give all three of these.",
    )
    group.add_argument(
        "--coordinator-address", metavar="HOST:PORT", help="where process 0 can be reached by all others"
    )
    group.add_argument("--num-processes", metavar="N", type=positive_integer, help="how many processes there are")
    group.add_argument("--process-id", metavar="I", type=int, help="which of them this one is: 0 ... N - 1")
