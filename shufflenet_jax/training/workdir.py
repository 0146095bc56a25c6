"""The folder of a training run: which settings, libraries and code made the numbers in it."""

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
from typing import Any

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
# On which the numbers depend; a checkout is no installed package, but has a commit.
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
    """Keep a workdir for this run; of its processes the first one does.

    A run that has not saved a checkpoint yet may start again with other settings and data, and writes config.json and
    model.json here. One that has is left as it is: `record_start` notes that it continues.

    Args:
      workdir: its folder; it is made if there is none.
      config: the TrainConfig.
      info: the ModelInfo of the network.
      data: the Data, its fingerprints.
      chosen: the settings that a rule chose, to be noted.
      changed_data: accept other examples than the run was trained on.
    Raises:
      InputError: the folder is no training's, has a run with other settings or data, or belongs to another run now.
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
        raise InputError(f"{workdir} exists and is no training of ours; choose another `workdir`")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / LOCK).touch()
    except OSError as error:
        raise InputError(f"{workdir} cannot be written: {error.strerror}; choose another `workdir`") from error
    with open(workdir / LOCK) as lock:  # Closing it, or the end of the process in any way, gives it back.
        _take(lock, workdir)
        if not begun:
            rule = {"rule": chosen._asdict()} if chosen else {}
            _write(workdir, rule | _describe_start(config, data), info)
        yield


def _require_continuable(
    workdir: Path, config: TrainConfig, info: ModelInfo, data: Data, *, changed_data: bool
) -> None:
    """Raise InputError if the run in a workdir cannot continue with these settings on these data."""
    last = _last_start(_read_record(workdir / CONFIG))
    before = Data.from_json(last["data"]) if last["data"] else None
    places_matter = before is None and not changed_data
    require_same_settings(workdir, dataclasses.asdict(config), last["settings"], places_matter=places_matter)
    require_same_data(workdir, config.data, info, data, before, changed_data=changed_data)


def stored_settings(workdir: Path) -> dict[str, Any]:
    """Return the settings with which the run in a workdir last started; {} where there is none yet."""
    if not (checkpoint.has_steps(workdir) and (workdir / CONFIG).exists()):
        return {}
    return current_settings(_last_start(_read_record(workdir / CONFIG))["settings"])


def record_start(workdir: Path, config: TrainConfig, info: ModelInfo, data: Data, *, continues: bool) -> None:
    """Note in config.json that the run in a claimed workdir continues, and what is other now than at its last start.

    Args:
      workdir, config, info, data: as in `claimed`.
      continues: whether it has steps left to take; else only what may be missing is written again.
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
    """Whether a place is a folder that holds nothing, or what a run leaves that was killed at its start."""
    return workdir.is_dir() and all(map(_is_leftover, workdir.iterdir()))


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


def _describe_start(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Return what decides the numbers from now on: {"settings", "versions", "commit", "data"}."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    settings = dataclasses.asdict(config)
    return {"settings": settings, "versions": versions, "commit": commit(), "data": data.to_json()}


def _last_start(record: dict[str, Any]) -> dict[str, Any]:
    """Return what decided the numbers when a run last started; None for what an older version did not record."""
    last = {"versions": None, "commit": None, "data": None} | record
    for start in last.pop("resumed", []):
        last = {**last, **start, "settings": last["settings"] | start.get("settings", {})}
    return last


def _add_start(record, now):
    """Appends to the record of a run what is other now than when it last started."""
    before = _last_start(record)
    settings = current_settings(before["settings"])
    changed = {key: value for key, value in now["settings"].items() if value != settings[key]}
    other = {"settings": changed} if changed else {}
    other |= {key: now[key] for key in ("versions", "commit", "data") if now[key] != before[key]}
    if other:
        record["resumed"] = [*record.get("resumed", []), other]


def _read_record(stored):
    """What config.json holds. Raises InputError if that is no record of a run."""
    try:
        record = json.loads(read_file(stored))
        starts = [record, *record.get("resumed", [])]
        sound = all(isinstance(start.get("settings", {}), dict) for start in starts) and "settings" in record
        reason = "it holds no settings"
        for start in starts:
            if start.get("data") is not None:
                Data.from_json(start["data"])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        sound, reason = False, error
    if not sound:
        raise InputError(f"{stored} is damaged: {reason}; choose another `workdir`")
    return record
