"""The folder of a training run: which settings, libraries and code made the numbers in it."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import checkpoint, parallel
from ..config import current_settings
from ..errors import InputError
from ..files import read_file, written_aside
from .logs import METRICS

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent.parent
CONFIG, LOCK, FINISHED = "config.json", "lock", "finished"
# A resumed run gives the same numbers whatever these say, up to rounding.
FREE_TO_CHANGE = {"accumulate", "eval_batch_size", "keep", "log_every", "workers", "max_damaged"}
# On which the numbers depend; a checkout is no installed package, but has a commit.
LIBRARIES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy"),
    *("opencv-python-headless", "pillow", "simplejpeg", "shufflenet_jax"),
)


@contextlib.contextmanager
def claimed(workdir, config, info):
    """Keeps a workdir for this run, with config.json and model.json in it; of its processes the first one does.

    A run that has not saved a checkpoint yet may be started anew with other settings. config.json tells how the run
    began, and in "resumed" what was other each time that it went on: settings, libraries or commit.

    Raises:
      InputError: the folder is no training's, has a run with other settings, or belongs to another run now.
    """
    with _claimed(workdir, config, info) if parallel.is_first() else contextlib.nullcontext():
        parallel.wait_for_all("the workdir is claimed")
        if not (workdir / CONFIG).exists():
            raise InputError(f"process 0 wrote {workdir}, but it is not here; name a `workdir` that all hosts share")
        yield


@contextlib.contextmanager
def _claimed(workdir, config, info):
    stored, record, now = workdir / CONFIG, None, _describe_start(config)
    if stored.exists():
        if checkpoint.has_steps(workdir):
            record = _read_record(stored)
            _require_same(workdir, now["settings"], record["settings"])
    elif workdir.exists() and not (workdir.is_dir() and all(map(_is_leftover, workdir.iterdir()))):
        raise InputError(f"{workdir} exists and is no training of ours; choose another `workdir`")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / LOCK).touch()
    except OSError as error:
        raise InputError(f"{workdir} cannot be written: {error.strerror}; choose another `workdir`") from error
    with open(workdir / LOCK) as lock:  # Closing it, or the end of the process in any way, gives it back.
        _take(lock, workdir)
        if record is None:
            record = now
        elif not (workdir / FINISHED).exists():
            _add_start(record, now)
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
        raise InputError(f"another process trains in {workdir}; wait for it, or choose another `workdir`") from error
    except OSError as error:  # Some network file systems know no locks.
        logger.warning("%s cannot be locked (%s); start no second run there", workdir, error.strerror)


def commit():
    """The commit of the checkout that this code runs from, with a `+` where it was changed since, or None."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _describe_start(config):
    """What decides the numbers from now on: {"settings", "versions", "commit"}."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"settings": dataclasses.asdict(config), "versions": versions, "commit": commit()}


def _add_start(record, now):
    """Appends to the record of a run what is other now than when it last went on."""
    before = {"settings": dict(record["settings"]), "versions": record.get("versions"), "commit": record.get("commit")}
    for start in record.get("resumed", []):
        before["settings"] |= start.get("settings", {})
        before |= {key: start[key] for key in ("versions", "commit") if key in start}
    settings = current_settings(before["settings"])
    changed = {key: value for key, value in now["settings"].items() if value != settings[key]}
    other = {"settings": changed} if changed else {}
    other |= {key: now[key] for key in ("versions", "commit") if now[key] != before[key]}
    if other:
        record["resumed"] = [*record.get("resumed", []), other]


def _read_record(stored):
    """What config.json holds. Raises InputError if that is no record of a run."""
    try:
        record = json.loads(read_file(stored))
        starts = [record, *record.get("resumed", [])]
        sound = all(isinstance(start.get("settings", {}), dict) for start in starts) and "settings" in record
        reason = "it holds no settings"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        sound, reason = False, error
    if not sound:
        raise InputError(f"{stored} is damaged: {reason}; choose another `workdir`")
    return record


def _require_same(workdir, settings, before):
    """Raises InputError if the run in a workdir has other settings that change its numbers."""
    unknown = before.keys() - settings.keys()
    if unknown:
        raise InputError(
            f"{workdir} holds a run with settings that this version does not know: {', '.join(sorted(unknown))}; "
            "continue it with the version that began it, or choose another `workdir`"
        )
    before = current_settings(before)
    changed = [key for key in settings if key not in FREE_TO_CHANGE and settings[key] != before[key]]
    if changed:
        differences = ", ".join(f"{key} is {before[key]} there and {settings[key]} here" for key in changed)
        raise InputError(f"{workdir} holds a run with other settings: {differences}; choose another `workdir`")
