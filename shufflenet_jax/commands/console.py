"""What commands show in the terminal: messages, progress bars and errors."""

import contextlib
import io
import logging
import os
import shlex
import sys
import traceback
import warnings

from tqdm import tqdm

from .. import progress
from ..environment import enable_compilation_cache, keep_freed_memory
from ..errors import InputError
from ..files import UnwritableError, printable, refused_write
from ..installation import missing_package
from .parsing import with_flags

_debug = False
_process, _processes = 0, 1  # Which of a run's processes this is, and how many there are.
_library = logging.getLogger("shufflenet_jax")


def run(command, argv=None):
    """Run `command(argv)` as a process: its result is the exit status; invalid input is one line and status 2.

    With --debug anywhere on the command line errors keep their traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    global _debug
    debug = _debug = "--debug" in argv
    # Orbax and Grain report at length what they do, and log with a traceback each error that they raise anyway.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR if debug else logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):  # Names of files may hold bytes that are no text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Pillow warns of odd EXIF blocks and palettes in images that decode all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    with _messages_shown():
        try:
            enable_compilation_cache()
            keep_freed_memory()
            status = command([word for word in argv if word != "--debug"]) or 0
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            status = 130
        except BrokenPipeError:  # The reader of what is printed has gone; what is left of it goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 141
        except Exception as failure:
            error = true_cause(failure)
            try:
                sys.stdout.flush()
            except OSError:  # It lies on the disk that is full; Python would say so once more at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, InputError) and not debug:
                print("error:", describe_error(error), file=sys.stderr)
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


def true_cause(error: Exception) -> Exception:
    """Return the InputError that explains what a library raised: a full disk, a missing package or platform.

    Any other exception is returned as it is.
    """
    if isinstance(error, InputError):
        return error
    reason = refused_write(error)
    if reason:
        place = getattr(error, "filename", None) or "what the command writes"
        return UnwritableError(place, reason, "make room there, or choose another place")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("shufflenet_jax"):
        return missing_package(error.name.partition(".")[0])
    if isinstance(error, (RuntimeError, AssertionError)) and "jax" in sys.modules:
        from ..parallel import require_platform

        try:
            require_platform()
        except InputError as cause:
            return cause
    return error


def report_error(error):
    """Show an InputError that ends only a part of the work, without tearing a progress bar."""
    if not _process:
        tqdm.write(f"error: {describe_error(error)}", file=sys.stderr)


def describe_error(error):
    """Return an InputError as one line, its arguments as options, and with the command that mends it."""
    text = " ".join(str(error).split())
    if error.command:
        name, arguments = error.command
        options = (f"--{argument.replace('_', '-')} {shlex.quote(str(value))}" for argument, value in arguments.items())
        text = f"{text}: python -m shufflenet_jax {name} {' '.join(options)}"
    return printable(with_flags(text))


@contextlib.contextmanager
def _messages_shown():
    """Show the library's log and its progress in the terminal."""
    handler, before = _Terminal(logging.INFO), progress.install(_make_bar)
    level, propagated = _library.level, _library.propagate
    _library.addHandler(handler)
    _library.setLevel(logging.INFO)
    _library.propagate = False
    try:
        yield
    finally:
        _library.removeHandler(handler)
        _library.setLevel(level)
        _library.propagate = propagated
        progress.install(before)


class _Terminal(logging.Handler):
    """Writes to stderr without tearing a progress bar; of several processes only the first reports what is usual."""

    def emit(self, record):
        text = printable(with_flags(record.getMessage()))
        if record.levelno >= logging.WARNING:
            where = f"process {_process}: " if _processes > 1 else ""
            tqdm.write(f"warning: {where}{text}", file=sys.stderr)
        elif not _process:
            tqdm.write(text, file=sys.stderr)


def _make_bar(*, total, unit, description, initial, scaled):
    """Make tqdm's bar on stderr with rate and time left; silent where nobody watches the terminal."""
    return tqdm(
        total=total,
        unit=unit,
        desc=description,
        initial=initial,
        unit_scale=scaled,
        file=sys.stderr,
        dynamic_ncols=True,
        disable=True if _process else None,
    )


def speak_as(process, processes):
    """Report as one of several processes from now on: all of them report what is wrong, the first one all the rest."""
    global _process, _processes
    _process, _processes = process, processes


@contextlib.contextmanager
def libraries_silent():
    """Keep libraries in C from printing on stderr: libjpeg and libpng complain of images that decode all the same.

    What Python prints there still comes through; with --debug everything does.
    """
    if _debug:
        yield
        return
    sys.stderr.flush()
    form = {"buffering": 1, "encoding": sys.stderr.encoding, "errors": "backslashreplace"}
    with (
        open(os.dup(2), "w", **form) as shown,
        open(os.devnull, "wb") as nowhere,
        contextlib.redirect_stderr(shown),
    ):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(shown.fileno(), 2)
