"""Model directories and training checkpoints on disk: the only file that imports orbax.

A model directory holds `model.json` and the variables; a training workdir holds `model.json` and numbered checkpoints
with the variables and, beside them, what the optimiser needs to go on and, where kept, the variables' moving averages.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from . import parallel
from .config import ModelInfo
from .errors import InputError
from .files import path_of, read_file, require_plain, written_aside
from .model import ShuffleNetV2, variable_shapes

INFO, VARIABLES, OPTIMIZER, EMA, STEPS = "model.json", "variables", "optimizer", "ema", "checkpoints"
STEP_METADATA = "_CHECKPOINT_METADATA"  # Orbax's file in a numbered checkpoint, which has our hashes too.


def module_of(info, **settings):
    """The ShuffleNetV2 that a ModelInfo describes, with settings like `dtype` and `lowering`."""
    names = ("width", "num_classes", "in_chans", "layout", "small_stem", "conv5", "dropout")
    return ShuffleNetV2(**{name: getattr(info, name) for name in names} | settings)


def save_model(directory, info, variables, *, overwrite=False):
    """Writes a model directory: whole, or not at all.

    Raises:
      InputError: something lies there already, and `overwrite` is off; or the place cannot be written.
    """
    directory = Path(directory).absolute()
    require_free(directory, overwrite=overwrite)
    with written_aside(directory, folder=True) as draft:
        draft.mkdir()
        info = dataclasses.replace(info, sha256=hash_of_variables(variables))
        (draft / INFO).write_text(info.to_json(), encoding="utf-8")
        with ocp.StandardCheckpointer(multiprocessing_options=_by_itself()) as checkpointer:
            checkpointer.save(draft / VARIABLES, jax.tree.map(np.asarray, variables))


def hash_of_variables(variables):
    """The sha256 of a network's variables: names, types, shapes and values, in the order of their names."""
    found = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(p), np.asarray(x)) for p, x in jax.tree.leaves_with_path(variables)):
        found.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _by_itself():
    """Orbax's options for a process that reads or writes something without the others of its run."""
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
    module = module_of(info, **settings)
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the checkpoint {folder} is damaged: {STEP_METADATA} cannot be read ({error})") from error


def require_sound(path, variables, info):
    """Raises InputError if variables are not finite, or not those that the ModelInfo beside them was written for."""
    for keys, leaf in jax.tree.leaves_with_path(variables):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise InputError(f"the checkpoint {path} is damaged: {name} holds numbers that are not finite")
    # What was saved in float32 may have been read as float64, exactly.
    saved = (jax.tree.map(as_saved, variables) for as_saved in (np.asarray, np.float32))
    if info.sha256 is not None and info.sha256 not in map(hash_of_variables, saved):
        raise InputError(f"the checkpoint {path} is damaged: its numbers are not those that were saved")


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
    require_plain(path)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_by_itself())
        with _abandoned_work_silent(), ocp.Checkpointer(handler, multiprocessing_options=_by_itself()) as checkpointer:
            restored = checkpointer.restore(path, item=shapes, restore_args=as_numpy)
    except Exception as error:  # Orbax and TensorStore raise a dozen kinds for damaged files.
        reason = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0] or type(error).__name__
        raise InputError(f"the checkpoint {path} is damaged or does not fit its {INFO}: {reason}") from error
    for (keys, leaf), shape in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(shapes), strict=True):
        if leaf.shape != shape.shape:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise InputError(
                f"the checkpoint {path} does not fit its {INFO}: {name} is {leaf.shape}, not {shape.shape}"
            )
    if sha256 is not None and sha256 != hash_of_variables(restored):  # Of the types that were saved.
        raise InputError(f"the checkpoint {path} is damaged: its numbers are not those that were saved")
    return jax.tree.map(lambda leaf, shape: np.asarray(leaf, shape.dtype), restored, shapes)


@contextlib.contextmanager
def _abandoned_work_silent():
    """Keeps TensorStore from printing a traceback for each read or write that was under way when another one failed.

    They end whenever they like, so after a failure the silence stays; all else is reported as before.
    """
    before = sys.unraisablehook

    def report(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = report
    yield
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
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=(VARIABLES, OPTIMIZER, EMA))

    def __enter__(self):
        self._silence = _abandoned_work_silent()
        self._silence.__enter__()
        return self

    def __exit__(self, *error):
        with self._errors_told():
            self._manager.close()  # Waits for the checkpoint that is being written.
        self._silence.__exit__(*error)

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

    @contextlib.contextmanager
    def _errors_told(self):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise a dozen kinds.
            reason = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0] or type(error).__name__
            raise InputError(
                f"a checkpoint cannot be written in {self.directory}: {reason}; those before it are whole"
            ) from error

    def restore(self, step, items):
        """The trees saved at a step as NumPy arrays, in the form of the given ones (arrays or shapes)."""
        folder = self.directory / str(step)
        hashes = _hashes_in(folder)
        return {name: _restore(folder / name, tree, hashes.get(name)) for name, tree in items.items()}


def _top1(metrics):
    return metrics["top1"]
