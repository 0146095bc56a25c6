"""The folder of a training run: its record of settings, libraries and code."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from .. import checkpoint, parallel
from ..config import ModelInfo, TrainConfig, current_settings
from ..errors import InputError
from ..files import read_file, written_aside
from .logs import METRICS
from .resuming import Data, require_same_data, require_same_settings
from .rule import Chosen

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent.parent
CONFIG, LOCK, FINISHED = "config.json", "lock", "finished"
# The numbers depend on these; this package may be a checkout, which has a commit instead.
LIBRARIES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy"),
    *("opencv-python-headless", "pillow", "simplejpeg", "shufflenet_jax"),
)


@contextlib.contextmanager
def claimed(
    workdir: Path,
    config: TrainConfig,
    info: ModelInfo,
    data: Data,
    *,
    chosen: Chosen | None = None,
    changed_data: bool = False,
) -> Iterator[None]:
    """Reserve a workdir for this run, within the block; only the first process does so.

    A run without a saved checkpoint may start again with other settings and data, and writes config.json and model.json
    here. Otherwise these files stay as they are, and `record_start` notes that the run continues.

    Args:
      workdir: the folder; it is created if there is none.
      config: the TrainConfig.
      info: the ModelInfo of the network.
      data: the fingerprints of the data.
      chosen: the settings that a rule chose, to be recorded.
      changed_data: accept other examples than the run was trained on.

    Raises:
      InputError: the folder belongs to something else or to a running process, or has a run with other settings or
        data.
    """
    lock = partial(_locked, workdir, config, info, data, chosen=chosen, changed_data=changed_data)
    with lock() if parallel.is_first() else contextlib.nullcontext():
        parallel.wait_for_all("the workdir is claimed")
        if not (workdir / CONFIG).exists():
            raise InputError(f"process 0 wrote {workdir}, but it is not here; name a `workdir` that all hosts share")
        yield


@contextlib.contextmanager
def _locked(
    workdir: Path, config: TrainConfig, info: ModelInfo, data: Data, *, chosen: Chosen | None, changed_data: bool
) -> Iterator[None]:
    begun = checkpoint.has_steps(workdir) and (workdir / CONFIG).exists()
    if begun:
        _require_continuable(workdir, config, info, data, changed_data=changed_data)
    elif workdir.exists() and not (workdir / CONFIG).exists() and not _holds_leftovers(workdir):
        raise InputError(f"{workdir} exists and is not the folder of a training run; choose another `workdir`")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / LOCK).touch()
    except OSError as error:
        raise InputError(f"{workdir} cannot be written: {error.strerror}; choose another `workdir`") from error
    with open(workdir / LOCK) as lock:  # The lock ends when this closes, or when the process ends in any way.
        _take(lock, workdir)
        if not begun:
            rule = {"rule": chosen._asdict()} if chosen else {}
            _write(workdir, rule | _describe_start(config, data), info)
        yield


def _require_continuable(
    workdir: Path, config: TrainConfig, info: ModelInfo, data: Data, *, changed_data: bool
) -> None:
    """Raise InputError if the run in a workdir cannot continue with these settings and data."""
    last = _last_start(_read_record(workdir / CONFIG))
    before = Data.from_json(last["data"]) if last["data"] else None
    places_matter = before is None and not changed_data
    require_same_settings(workdir, dataclasses.asdict(config), last["settings"], places_matter=places_matter)
    require_same_data(workdir, config.data, info, data, before, changed_data=changed_data)


def stored_settings(workdir: Path) -> dict[str, Any]:
    """Return the settings with which the run in a workdir last started; {} if there is none yet.

    Args:
      workdir: the folder.

    Raises:
      InputError: its record is damaged.
    """
    if not (checkpoint.has_steps(workdir) and (workdir / CONFIG).exists()):
        return {}
    return current_settings(_last_start(_read_record(workdir / CONFIG))["settings"])


def record_start(workdir: Path, config: TrainConfig, info: ModelInfo, data: Data, *, continues: bool) -> None:
    """Record in config.json that the run in a claimed workdir continues, and what changed since its last start.

    Args:
      workdir: the folder.
      config: the TrainConfig.
      info: the ModelInfo of the network.
      data: the fingerprints of the data.
      continues: whether it has steps left; otherwise only missing files are written again.
    """
    record, now = _read_record(workdir / CONFIG), _describe_start(config, data)
    if continues:
        _add_start(record, now)
        (workdir / FINISHED).unlink(missing_ok=True)
    _write(workdir, record, info)


def _write(workdir: Path, record: dict[str, Any], info: ModelInfo) -> None:
    for path in filter(_is_leftover, workdir.iterdir()):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    for name, text in ((CONFIG, json.dumps(record, indent=2) + "\n"), (checkpoint.INFO, info.to_json())):
        with written_aside(workdir / name) as draft:
            draft.write_text(text, encoding="utf-8")


def _holds_leftovers(workdir: Path) -> bool:
    """Return whether a folder is empty, or holds only leftovers of a run that was killed at its start."""
    return workdir.is_dir() and all(map(_is_leftover, workdir.iterdir()))


def _is_leftover(path: Path) -> bool:
    """Return whether a run that was killed at its start may have left this file."""
    return path.name == LOCK or path.name.startswith((f".{CONFIG}.", f".{checkpoint.INFO}.", f".{METRICS}."))


def _take(lock: TextIO, workdir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another process trains in {workdir}; wait for it, or choose another `workdir`") from error
    except OSError as error:  # Some network file systems have no locks.
        logger.warning("%s cannot be locked (%s); start no second run there", workdir, error.strerror)


def commit() -> str | None:
    """Return the commit of the checkout that this code runs from, or None.

    Returns:
      The commit, with a `+` if files have changed since.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _describe_start(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Return what the numbers depend on from now on: {"settings", "versions", "commit", "data"}."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    settings = dataclasses.asdict(config)
    return {"settings": settings, "versions": versions, "commit": commit(), "data": data.to_json()}


def _last_start(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the numbers depended on when a run last started; None for what an older version did not record."""
    last = {"versions": None, "commit": None, "data": None} | record
    for start in last.pop("resumed", []):
        last = {**last, **start, "settings": last["settings"] | start.get("settings", {})}
    return last


def _add_start(record: dict[str, Any], now: dict[str, Any]) -> None:
    """Append to the record of a run what changed since its last start."""
    before = _last_start(record)
    settings = current_settings(before["settings"])
    changed = {key: value for key, value in now["settings"].items() if value != settings[key]}
    other: dict[str, Any] = {"settings": changed} if changed else {}
    other |= {key: now[key] for key in ("versions", "commit", "data") if now[key] != before[key]}
    if other:
        record["resumed"] = [*record.get("resumed", []), other]


def _read_record(stored: Path) -> dict[str, Any]:
    """Read a config.json. Raise InputError if it is damaged."""
    reason: object = "it holds no settings"
    try:
        record = json.loads(read_file(stored))
        starts = [record, *record.get("resumed", [])]
        sound = all(isinstance(start.get("settings", {}), dict) for start in starts) and "settings" in record
        for start in starts:
            if start.get("data") is not None:
                Data.from_json(start["data"])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        sound, reason = False, error
    if not sound:
        raise InputError(f"{stored} is damaged: {reason}; choose another `workdir`")
    return record
