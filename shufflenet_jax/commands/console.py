"""The terminal of the commands: messages, progress bars and errors."""

import contextlib
import io
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from .. import progress
from ..environment import enable_compilation_cache, keep_freed_memory
from ..errors import InputError
from ..files import UnwritableError, printable, refused_write
from ..installation import missing_package
from .parsing import with_flags

_debug = False
_process, _processes = 0, 1  # The number of this process in the run, and the number of processes.
_library = logging.getLogger("shufflenet_jax")


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command as a process: its result is the exit status; invalid input is one line and status 2.

    With --debug anywhere on the command line errors keep their traceback.

    Args:
      command: the command's `main`.
      argv: its arguments; None means those of the process.

    Returns:
      The exit status.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    global _debug
    debug = _debug = "--debug" in argv
    # Orbax and Grain log much, and log each error with a traceback before they raise it.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR if debug else logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):  # Names of files may hold bytes that are not text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Pillow warns of odd EXIF blocks and palettes in images that it decodes without loss.
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
        except BrokenPipeError:  # The reader of stdout has gone; discard the rest.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 141
        except Exception as failure:
            error = true_cause(failure)
            try:
                sys.stdout.flush()
            except OSError:  # stdout is on the full disk; Python would report this again at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, InputError) and not debug:
                print("error:", describe_error(error), file=sys.stderr)
                status = 2
            elif _processes == 1:
                raise
            else:
                traceback.print_exc()
                status = 1
    if _processes > 1:  # A normal exit waits for the other processes, which wait for this one.
        sys.stderr.flush()
        os._exit(status)
    return status


def true_cause(error: Exception) -> Exception:
    """Return the InputError that explains an exception of a library: a full disk, a missing package or platform.

    Args:
      error: any exception.

    Returns:
      The InputError, or the exception itself.
    """
    if isinstance(error, InputError):
        return error
    reason = refused_write(error)
    if reason:
        place = getattr(error, "filename", None) or "the output"
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


def report_error(error: InputError) -> None:
    """Show an InputError that ends only a part of the work, without breaking a progress bar.

    Args:
      error: the error.
    """
    if not _process:
        tqdm.write(f"error: {describe_error(error)}", file=sys.stderr)


def describe_error(error: InputError) -> str:
    """Return an InputError as one line, with its arguments as options, and the command that fixes it.

    Args:
      error: the error.
    """
    text = " ".join(str(error).split())
    if error.command:
        name, arguments = error.command
        options = (f"--{argument.replace('_', '-')} {shlex.quote(str(value))}" for argument, value in arguments.items())
        text = f"{text}: python -m shufflenet_jax {name} {' '.join(options)}"
    return printable(with_flags(text))


@contextlib.contextmanager
def _messages_shown() -> Iterator[None]:
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
    """Writes to stderr without breaking a progress bar; of several processes only the first one reports progress."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        text = printable(with_flags(record.getMessage()))
        if record.levelno >= logging.WARNING:
            where = f"process {_process}: " if _processes > 1 else ""
            tqdm.write(f"warning: {where}{text}", file=sys.stderr)
        elif not _process:
            tqdm.write(text, file=sys.stderr)


def _make_bar(*, total: int | None, unit: str, description: str, initial: int, scaled: bool) -> progress.Bar:
    """Make tqdm's bar on stderr with rate and time left; it is silent if stderr is no terminal."""
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


def speak_as(process: int, processes: int) -> None:
    """Report as one of several processes from now on: all report warnings and errors, only the first one the rest.

    Args:
      process: number of this process, from 0.
      processes: number of processes.
    """
    global _process, _processes
    _process, _processes = process, processes


@contextlib.contextmanager
def libraries_silent() -> Iterator[None]:
    """Keep libraries in C from printing on stderr: libjpeg and libpng complain about images that they can decode.

    Messages of Python still appear; with --debug all messages do.
    """
    if _debug:
        yield
        return
    sys.stderr.flush()
    with (
        open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace") as shown,
        open(os.devnull, "wb") as nowhere,
        contextlib.redirect_stderr(shown),
    ):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(shown.fileno(), 2)
