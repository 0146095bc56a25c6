"""The folder of a training run: which settings, libraries and code made the numbers in it."""

import contextlib
import dataclasses
import fcntl
import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from . import checkpoint, parallel
from .cli import warn
from .errors import InputError
from .files import read_file, written_aside
from .logs import METRICS

CONFIG, LOCK, FINISHED = "config.json", "lock", "finished"
# A resumed run gives the same numbers whatever these say, up to rounding.
FREE_TO_CHANGE = {"accumulate", "eval_batch_size", "keep", "workers", "max_damaged"}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")  # On which the numbers depend.


@contextlib.contextmanager
def claimed(workdir, config, info):
    """Keeps a workdir for this run, with config.json and model.json in it; of its processes the first one does.

    A run that has not saved a checkpoint yet may be started anew with other settings.

    Raises:
      InputError: the folder is no training's, has a run with other settings, or belongs to another run now.
    """
    with _claimed(workdir, config, info) if parallel.is_first() else contextlib.nullcontext():
        parallel.wait_for_all("the workdir is claimed")
        if not (workdir / CONFIG).exists():
            raise InputError(f"process 0 wrote {workdir}, but it is not here; name a --workdir that all hosts share")
        yield


@contextlib.contextmanager
def _claimed(workdir, config, info):
    settings, stored = dataclasses.asdict(config), workdir / CONFIG
    if stored.exists():
        if checkpoint.has_steps(workdir):
            _require_same(workdir, settings, stored)
    elif workdir.exists() and not (workdir.is_dir() and all(map(_is_leftover, workdir.iterdir()))):
        raise InputError(f"{workdir} exists and is no training of ours; choose another --workdir")
    record = {"settings": settings, "versions": {name: version(name) for name in LIBRARIES}, "commit": commit()}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / LOCK).touch()
    except OSError as error:
        raise InputError(f"{workdir} cannot be written: {error.strerror}; choose another --workdir") from error
    with open(workdir / LOCK) as lock:  # Closing it, or the end of the process in any way, gives it back.
        _take(lock, workdir)
        (workdir / FINISHED).unlink(missing_ok=True)
        for path in filter(_is_leftover, workdir.iterdir()):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        for path, text in ((stored, json.dumps(record, indent=2) + "\n"), (workdir / checkpoint.INFO, info.to_json())):
            with written_aside(path) as draft:
                draft.write_text(text, encoding="utf-8")
        yield


def _is_leftover(path):
    """Whether a run that was killed may have left this behind before it had written anything."""
    return path.name == LOCK or path.name.startswith((f".{CONFIG}.", f".{checkpoint.INFO}.", f".{METRICS}."))


def _take(lock, workdir):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another process trains in {workdir}; wait for it, or choose another --workdir") from error
    except OSError as error:  # Some network file systems know no locks.
        warn(f"{workdir} cannot be locked ({error.strerror}); start no second run there")


def commit():
    """The commit of the checkout that this code runs from, with a `+` where it was changed since, or None."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _require_same(workdir, settings, stored):
    """Raises InputError if the run in a workdir has other settings that change its numbers."""
    try:
        before = dict(json.loads(read_file(stored))["settings"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{stored} is damaged: {error}; choose another --workdir") from error
    changed = [key for key in settings if key not in FREE_TO_CHANGE and settings[key] != before.get(key)]
    if changed:
        told = ", ".join(f"{key} is {before.get(key)} there and {settings[key]} here" for key in changed)
        raise InputError(f"{workdir} holds a run with other settings: {told}; choose another --workdir")
