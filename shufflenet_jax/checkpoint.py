"""Model directories and training checkpoints on disk: the only file that imports orbax.

A model directory holds `model.json` and the variables; a training workdir holds `model.json` and numbered checkpoints
with the variables and, beside them, what the optimiser needs to go on and, where kept, the variables' moving averages.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from . import parallel
from .architecture import TABLE_FIELDS
from .config import ModelInfo
from .errors import InputError
from .files import path_of, read_file, refused_write, require_plain, written_aside
from .model import SETTINGS, ShuffleNetV2, variable_shapes

INFO, VARIABLES, OPTIMIZER, EMA, STEPS = "model.json", "variables", "optimizer", "ema", "checkpoints"
METRICS = "metrics"  # Orbax's folder in a numbered checkpoint, and the file in it.
STEP_METADATA = "_CHECKPOINT_METADATA"  # Orbax's file in a numbered checkpoint, which has our hashes too.
# What the system reports where nothing is wrong with a file's content.
NO_DAMAGE = tuple(map(os.strerror, (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)))
# What no setting changes in a file.
FIXED = (*TABLE_FIELDS, "layout", "small_stem", "num_classes", "in_chans", "conv5")


class DamagedError(InputError):
    """A checkpoint's files are not those that were written."""


def module_of(info, **settings):
    """The ShuffleNetV2 that a ModelInfo describes, with settings like `dtype` and `lowering`.

    Raises:
      InputError: there is no such setting, or it cannot have this value.
    """
    unknown = settings.keys() - set(SETTINGS)
    if unknown:
        raise InputError(f"there is no setting {', '.join(sorted(unknown))}; a network has {', '.join(SETTINGS)}")
    return ShuffleNetV2(**{name: getattr(info, name) for name in (*FIXED, "dropout")} | settings)


def save_model(directory, info, variables, *, overwrite=False):
    """Writes a model directory: whole, or not at all.

    Raises:
      InputError: something lies there already, and `overwrite` is off; or the place cannot be written.
    """
    directory = path_of(directory).absolute()
    require_free(directory, overwrite=overwrite)
    alone = _by_itself()
    with written_aside(directory, folder=True, check=load_directory) as draft:
        draft.mkdir()
        info = dataclasses.replace(info, sha256=hash_of_variables(variables))
        (draft / INFO).write_text(info.to_json(), encoding="utf-8")
        with (
            _abandoned_work_silent(),
            _plainly_named(draft) as folder,
            ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer,
        ):
            checkpointer.save(folder / VARIABLES, jax.tree.map(np.asarray, variables))


@contextlib.contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """Yield a path to a folder that Orbax and TensorStore take as it is: the folder's own, or a link's.

    Orbax reads brackets as a pattern of names, TensorStore a backslash as a slash, and both fail on names that are not
    UTF-8. The link lies in a temporary folder, and is removed after the block.
    """
    name = str(folder)
    if not (set("[]*?\\") & set(name) or any("\udc80" <= letter <= "\udcff" for letter in name)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="shufflenet_jax-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def hash_of_variables(variables):
    """The sha256 of a network's variables: names, types, shapes and values, in the order of their names."""
    found = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(p), np.asarray(x)) for p, x in jax.tree.leaves_with_path(variables)):
        found.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _by_itself():
    """Orbax's options for a process that reads or writes something without the others of its run."""
    parallel.require_platform()  # Which Orbax and the reader of its errors would take for a damaged file.
    return ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=str(jax.process_index()),
    )


def require_free(directory, *, overwrite):
    """Raises InputError if a model directory cannot be put there."""
    directory = path_of(directory)
    only_a_model = directory.is_dir() and {path.name for path in directory.iterdir()} == {INFO, VARIABLES}
    if directory.exists() and not (overwrite and only_a_model):
        advice = "choose another `out`" if overwrite else "choose another `out`, or set `overwrite` to replace a model"
        raise InputError(f"{directory} exists already; {advice}")


def load_directory(directory, *, ema=False, **settings):
    """(module, variables, ModelInfo) of a model directory, a training workdir or one of its numbered checkpoints.

    See `loading.load_model`.
    """
    directory = path_of(directory).absolute()
    info = read_info(_workdir_of(directory) or directory)
    module = stored_module(directory, info, **settings)
    if not (directory / VARIABLES).is_dir():
        directory = _best_or_latest(directory)
    if ema and not (directory / EMA).is_dir():
        raise InputError(f"{directory} holds no moving averages; leave `ema` out")
    name = EMA if ema else VARIABLES
    variables = _restore(directory / name, variable_shapes(module), _hashes_in(directory).get(name))
    require_sound(directory, variables, info)
    return module, variables, info


def _workdir_of(directory: Path) -> Path | None:
    """Return the training workdir that a numbered checkpoint belongs to; None for any other folder."""
    place = directory.resolve()
    numbered = place.parent.name == STEPS and place.name.isdigit() and not (directory / INFO).exists()
    return place.parent.parent if numbered else None


def _hashes_in(folder: Path) -> dict[str, str]:
    """Return {item: sha256} of a numbered checkpoint, as `TrainingCheckpoints.save` stores them.

    Older versions stored none, and model directories have theirs in model.json.
    """
    try:
        hashes = json.loads(read_file(folder / STEP_METADATA))["custom_metadata"].get("sha256", {})
        return {str(name): str(sha256) for name, sha256 in hashes.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(
            f"{folder / STEP_METADATA} cannot be read: {error.strerror}; mend that, and try again"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"the checkpoint {folder} is damaged: {STEP_METADATA} cannot be read ({error})") from error


def stored_module(path: Path, info: ModelInfo, **settings: object) -> ShuffleNetV2:
    """Return the module of weights in a file or folder.

    Args:
      path: where they lie.
      info: what is said of them there.
      settings: fields of ShuffleNetV2 to change, like `dtype` and `lowering`.

    Raises:
      InputError: a setting contradicts the weights.
    """
    written = info.table._asdict()
    for name in FIXED:
        given, stored = settings.get(name), written.get(name, getattr(info, name))
        if given is not None and (tuple(given) if isinstance(given, (list, np.ndarray)) else given) != stored:
            raise InputError(
                f"{name} is {given}, but the weights in {path} have {stored}; leave {name} out, or give another "
                "checkpoint"
            )
    return module_of(info, **settings)


def require_sound(path, variables, info):
    """Raises InputError if variables are not finite, or not those that the ModelInfo beside them was written for."""
    for keys, leaf in jax.tree.leaves_with_path(variables):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise DamagedError(f"the checkpoint {path} is damaged: {name} holds numbers that are not finite")
    # What was saved in float32 may have been read as float64, exactly.
    saved = (jax.tree.map(as_saved, variables) for as_saved in (np.asarray, np.float32))
    if info.sha256 is not None and info.sha256 not in map(hash_of_variables, saved):
        raise DamagedError(f"the checkpoint {path} is damaged: its numbers are not those that were saved")


def read_info(directory):
    """The ModelInfo of a model directory or a training workdir."""
    try:
        return ModelInfo.from_json(read_file(directory / INFO).decode())
    except FileNotFoundError as error:
        raise InputError(
            f"no model at {directory}: it has no {INFO}; give a model directory, a training workdir, one of "
            "its numbered checkpoints or a .pth file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{directory / INFO} cannot be read: {error}") from error
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error


def _restore(path, shapes, sha256=None):
    """The arrays below a path in the form of a tree of shapes, as NumPy arrays; they must have the hash, if given."""
    try:
        require_plain(path)
    except InputError as error:
        raise DamagedError(str(error)) from error
    alone = _by_itself()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with (
            _abandoned_work_silent(),
            _plainly_named(path.parent) as folder,
            ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
        ):
            restored = checkpointer.restore(folder / path.name, item=shapes, restore_args=as_numpy)
    except Exception as error:  # Orbax and TensorStore raise a dozen kinds for damaged files.
        _raise_unless_damage(path, error)
        raise DamagedError(f"the checkpoint {path} is damaged or does not fit its {INFO}: {_reason(error)}") from error
    for (keys, leaf), shape in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(shapes), strict=True):
        if leaf.shape != shape.shape:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise InputError(
                f"the checkpoint {path} does not fit its {INFO}: {name} is {leaf.shape}, not {shape.shape}"
            )
    if sha256 is not None and sha256 != hash_of_variables(restored):  # Of the types that were saved.
        raise DamagedError(f"the checkpoint {path} is damaged: its numbers are not those that were saved")
    return jax.tree.map(lambda leaf, shape: np.asarray(leaf, shape.dtype), restored, shapes)


def _raise_unless_damage(path: Path, error: Exception) -> None:
    """Raise an InputError where an exception of Orbax or TensorStore does not speak of a damaged checkpoint."""
    if isinstance(error, MemoryError):
        raise InputError(f"the checkpoint {path} cannot be read: there is not enough memory for it") from error
    if "structures do not match" in str(error):
        raise InputError(f"the checkpoint {path} does not fit its {INFO}: it holds other arrays") from error
    reason = refused_write(error) or next((reason for reason in NO_DAMAGE if reason in str(error)), None)
    if reason or not path.parent.exists():
        raise InputError(
            f"the checkpoint {path} cannot be read: {reason or 'its folder is gone'}; mend that, and try again"
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line of what Orbax or TensorStore say, without the specification of an array."""
    return str(error).partition("\n")[0].partition(" [tensorstore_spec")[0] or type(error).__name__


@contextlib.contextmanager
def _abandoned_work_silent():
    """Keeps Orbax and TensorStore from printing something for each read or write under way when another one failed.

    They end whenever they like, so after a failure the silence stays; all else is reported as before.
    """
    before = sys.unraisablehook

    def report(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = report
    try:
        yield
    except BaseException:
        warnings.filterwarnings("ignore", message="coroutine '.*' was never awaited", category=RuntimeWarning)
        raise
    sys.unraisablehook = before


def _best_or_latest(workdir):
    if not has_steps(workdir):
        raise InputError(f"{workdir} holds no finished checkpoint; let its training run on, or give another checkpoint")
    # Orbax warns that what is only to be read is read-only.
    log = logging.getLogger("absl")
    usual = log.level
    log.setLevel(max(usual, logging.ERROR))
    try:
        with TrainingCheckpoints(workdir, read_only=True) as checkpoints:
            return workdir / STEPS / str(checkpoints.best_or_latest_step())
    finally:
        log.setLevel(usual)


def has_steps(workdir):
    """Whether a training workdir holds a finished checkpoint."""
    return bool(ocp.utils.checkpoint_steps(workdir / STEPS))


def _describe_damaged_metrics(checkpoints: Path, error: Exception) -> str:
    """Return which checkpoint keeps Orbax from listing them all: it reads the metrics of each."""
    for step in sorted(ocp.utils.checkpoint_steps(checkpoints)):
        try:
            json.loads(read_file(checkpoints / str(step) / METRICS / METRICS))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as found:
            place = checkpoints / str(step)
            return f"the checkpoint {place} is damaged: its {METRICS} cannot be read ({found}); move it away"
    return f"the checkpoints in {checkpoints} are damaged: {_reason(error)}; move the damaged one away"


class TrainingCheckpoints:
    """The numbered checkpoints of a workdir: the newest few and the best by top-1, each written whole or not at all.

    Args:
      workdir: the training's folder.
      keep: how many of the newest to keep.
      read_only: only look at what is there.
    """

    def __init__(self, workdir, *, keep=1, read_only=False):
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(get_metric_fn=_top1, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_top1,
            read_only=read_only,
            create=not read_only,
        )
        self.directory = Path(workdir).absolute() / STEPS
        self._saved: tuple[int, dict] | None = None  # The newest step of this process, and the shapes of its trees.
        with contextlib.ExitStack() as opened:
            opened.enter_context(_abandoned_work_silent())
            folder = opened.enter_context(_plainly_named(self.directory.parent)) / STEPS
            names = (VARIABLES, OPTIMIZER, EMA)
            try:
                self._manager = ocp.CheckpointManager(folder, options=options, item_names=names)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise DamagedError(_describe_damaged_metrics(self.directory, error)) from error
            self._opened = opened.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.ExitStack() as closing:
            closing.push(lambda *failure: self._opened.__exit__(*(failure if failure[0] else error)))
            with self._errors_told():
                self._manager.close()  # Waits for the checkpoint that is being written.
            if self._saved and error[0] is None:
                self.restore(*self._saved)  # What cannot be read back is no success.

    def steps(self):
        """The steps of all finished checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def best_or_latest_step(self):
        """The step with the highest top-1; where none was evaluated the newest."""
        best = self._manager.best_step()
        return self._manager.latest_step() if best is None else best

    def set_aside(self, step):
        """Takes a checkpoint out of the way, and returns where it lies then. All processes do so together."""
        place = self.directory.parent / f"damaged-{step}"
        if parallel.is_first():
            (self.directory / str(step)).rename(place)
        parallel.wait_for_all(f"set aside {step}")
        self._manager.reload()
        return place

    def save(self, step, items, metrics=None):
        """Starts writing a checkpoint in the background: {VARIABLES: tree, ...}, from `parallel.to_host`.

        Raises:
          InputError: it, or the one before, cannot be written.
        """
        args = ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()})
        hashes = {name: hash_of_variables(tree) for name, tree in items.items()}
        with self._errors_told():
            self._manager.save(step, args=args, metrics=metrics, custom_metadata={"sha256": hashes})
        self._saved = step, {name: jax.eval_shape(lambda tree=tree: tree) for name, tree in items.items()}

    @contextlib.contextmanager
    def _errors_told(self):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise a dozen kinds.
            raise InputError(
                f"a checkpoint cannot be written in {self.directory}: {refused_write(error) or _reason(error)}; those "
                "before it are whole"
            ) from error

    def restore(self, step, items):
        """The trees saved at a step as NumPy arrays, in the form of the given ones (arrays or shapes)."""
        folder = self.directory / str(step)
        hashes = _hashes_in(folder)
        return {name: _restore(folder / name, tree, hashes.get(name)) for name, tree in items.items()}


def _top1(metrics):
    return metrics["top1"]
