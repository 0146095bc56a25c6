"""The folder of a training run: which settings, libraries and code made the numbers in it."""

import dataclasses
import json
import subprocess
from importlib.metadata import version
from pathlib import Path

from . import checkpoint
from .errors import InputError
from .files import written_aside

# A resumed run gives the same numbers whatever these say, up to rounding.
FREE_TO_CHANGE = {"accumulate", "eval_batch_size", "keep", "workers", "max_damaged"}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")  # On which the numbers depend.


def prepare(workdir, config, info):
    """Writes config.json and model.json, or checks that the run which lies there has the same settings.

    A run that has not saved a checkpoint yet may be started anew with other settings.
    """
    settings, stored = dataclasses.asdict(config), workdir / "config.json"
    if stored.exists():
        if checkpoint.has_steps(workdir):
            _require_same(workdir, settings, stored)
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"{workdir} exists and is no training of ours; choose another --workdir")
    record = {"settings": settings, "versions": {name: version(name) for name in LIBRARIES}, "commit": commit()}
    for path, text in ((stored, json.dumps(record, indent=2) + "\n"), (workdir / checkpoint.INFO, info.to_json())):
        with written_aside(path) as draft:
            draft.write_text(text, encoding="utf-8")


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
        before = dict(json.loads(stored.read_text(encoding="utf-8"))["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{stored} is damaged: {error}; choose another --workdir") from error
    changed = [key for key in settings if key not in FREE_TO_CHANGE and settings[key] != before.get(key)]
    if changed:
        told = ", ".join(f"{key} is {before.get(key)} there and {settings[key]} here" for key in changed)
        raise InputError(f"{workdir} holds a run with other settings: {told}; choose another --workdir")
