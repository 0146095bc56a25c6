"""Model directories and training checkpoints on disk: the only file that imports orbax.

A model directory holds `model.json` and the variables. A training workdir holds `model.json` and numbered checkpoints
with the variables, the state of the optimizer and, optionally, the variables' moving averages.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from . import parallel
from .architecture import TABLE_FIELDS
from .config import ModelInfo
from .errors import InputError, Unchecked
from .files import path_of, read_file, real_path, refused_write, require_plain, written_aside
from .model import SETTINGS, ShuffleNetV2, variable_shapes
from .shapes import Params, Variables

Loaded = tuple[ShuffleNetV2, Variables, ModelInfo]

INFO, VARIABLES, OPTIMIZER, EMA, STEPS = "model.json", "variables", "optimizer", "ema", "checkpoints"
METRICS = "metrics"  # Orbax's folder in a numbered checkpoint, and the file in it.
STEP_METADATA = "_CHECKPOINT_METADATA"  # Orbax's file in a numbered checkpoint, which has our hashes too.
# Errors of the system that do not mean damaged files.
NO_DAMAGE = tuple(map(os.strerror, (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)))
# Settings that a checkpoint determines.
FIXED = (*TABLE_FIELDS, "layout", "small_stem", "num_classes", "in_chans", "conv5")


class DamagedError(InputError):
    """A checkpoint's files are not those that were written."""


def module_of(info: ModelInfo, **settings: Unchecked) -> ShuffleNetV2:
    """Return the module of a model description.

    Args:
      info: the description.
      settings: other fields of ShuffleNetV2, like `dtype` and `lowering`.

    Raises:
      InputError: there is no such setting, or it cannot have this value.
    """
    unknown = settings.keys() - set(SETTINGS)
    if unknown:
        raise InputError(f"there is no setting {', '.join(sorted(unknown))}; a network has {', '.join(SETTINGS)}")
    return ShuffleNetV2(**{name: getattr(info, name) for name in (*FIXED, "dropout")} | settings)


def save_model(directory: str | Path, info: ModelInfo, variables: Variables, *, overwrite: bool = False) -> None:
    """Write a model directory, completely or not at all.

    Args:
      directory: to write.
      info: the model description.
      variables: {"params", "batch_stats"}.
      overwrite: replace a model that is there.

    Raises:
      InputError: something else is there, or a model without `overwrite`; or the place cannot be written.
    """
    directory = path_of(directory).absolute()
    require_free(directory, overwrite=overwrite)
    alone = _only_this_process()
    with written_aside(directory, folder=True, check=load_directory) as draft:
        draft.mkdir()
        info = dataclasses.replace(info, sha256=hash_of_variables(variables))
        (draft / INFO).write_text(info.to_json(), encoding="utf-8")
        with (
            _silent_about_abandoned_work(),
            _plainly_named(draft) as folder,
            ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer,
        ):
            checkpointer.save(folder / VARIABLES, jax.tree.map(np.asarray, variables))


@contextlib.contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """Yield a path to a folder that Orbax and TensorStore read literally: the folder's own, or that of a link.

    Orbax reads brackets as a pattern of names, TensorStore a backslash as a slash, and both fail on names that are not
    UTF-8. The link is in a temporary folder, and disappears after the block.
    """
    name = str(folder)
    if not (set("[]*?\\") & set(name) or any("\udc80" <= letter <= "\udcff" for letter in name)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="shufflenet_jax-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def hash_of_variables(variables: Params) -> str:
    """Return the sha256 of a tree of arrays: names, types, shapes and values, in the order of their names.

    Args:
      variables: a network's {"params", "batch_stats"}, or another tree.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(p), np.asarray(x)) for p, x in jax.tree.leaves_with_path(variables)):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _only_this_process() -> ocp.options.MultiprocessingOptions:
    """Return Orbax's options for a process that reads or writes without the others of its run."""
    parallel.require_platform()  # A missing platform would look like a damaged file.
    return ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=str(jax.process_index()),
    )


def require_free(directory: str | Path, *, overwrite: bool) -> None:
    """Raise InputError if a model directory cannot be written at a place.

    Args:
      directory: the place.
      overwrite: allow a model to be there.
    """
    directory = path_of(directory)
    only_a_model = directory.is_dir() and {path.name for path in directory.iterdir()} == {INFO, VARIABLES}
    if directory.exists() and not (overwrite and only_a_model):
        advice = "choose another `out`" if overwrite else "choose another `out`, or set `overwrite` to replace a model"
        raise InputError(f"{directory} exists already; {advice}")


def load_directory(directory: str | Path, *, ema: bool = False, **settings: Unchecked) -> Loaded:
    """Load a model directory, a training workdir or one of its numbered checkpoints.

    Args:
      directory: its path.
      ema: take the moving averages.
      settings: fields of ShuffleNetV2 to change, as in `loading.load_model`.

    Returns:
      (module, variables, ModelInfo).

    Raises:
      InputError: there is no model, it is damaged, or a setting contradicts it.
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
    """Return the training workdir of a numbered checkpoint; None for any other folder."""
    place = real_path(directory)
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
            f"{folder / STEP_METADATA} cannot be read: {error.strerror}; fix that, and try again"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"the checkpoint {folder} is damaged: {STEP_METADATA} cannot be read ({error})") from error


def stored_module(path: Path, info: ModelInfo, **settings: Unchecked) -> ShuffleNetV2:
    """Return the module of weights in a file or folder.

    Args:
      path: of the file or folder.
      info: its model description.
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


def require_sound(path: Path, variables: Variables, info: ModelInfo) -> None:
    """Raise DamagedError if variables are not finite, or do not match their model description.

    Args:
      path: of their folder, for the message.
      variables: {"params", "batch_stats"}.
      info: the model description.
    """
    for keys, leaf in jax.tree.leaves_with_path(variables):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise DamagedError(f"the checkpoint {path} is damaged: {name} holds numbers that are not finite")
    # Values that were saved in float32 may have been read as float64, exactly.
    saved = (jax.tree.map(as_saved, variables) for as_saved in (np.asarray, np.float32))
    if info.sha256 is not None and info.sha256 not in map(hash_of_variables, saved):
        raise DamagedError(f"the checkpoint {path} is damaged: its numbers are not those that were saved")


def read_info(directory: Path) -> ModelInfo:
    """Read the model description of a model directory or a training workdir.

    Args:
      directory: its path.

    Raises:
      InputError: there is none, or it is damaged.
    """
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


def _restore(path: Path, shapes: Params, sha256: str | None = None) -> Params:
    """Read the arrays below a path as a tree of NumPy arrays with these shapes; they must have the hash, if given."""
    try:
        require_plain(path)
    except InputError as error:
        raise DamagedError(str(error)) from error
    alone = _only_this_process()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with (
            _silent_about_abandoned_work(),
            _plainly_named(path.parent) as folder,
            ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
        ):
            restored = checkpointer.restore(folder / path.name, item=shapes, restore_args=as_numpy)
    except Exception as error:  # Orbax and TensorStore raise a dozen types for damaged files.
        _raise_unless_damage(path, error)
        raise DamagedError(f"the checkpoint {path} is damaged or does not fit its {INFO}: {_reason(error)}") from error
    for (keys, leaf), shape in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(shapes), strict=True):
        if leaf.shape != shape.shape:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise InputError(
                f"the checkpoint {path} does not fit its {INFO}: {name} is {leaf.shape}, not {shape.shape}"
            )
    if sha256 is not None and sha256 != hash_of_variables(restored):  # Before the conversion of types.
        raise DamagedError(f"the checkpoint {path} is damaged: its numbers are not those that were saved")
    return jax.tree.map(lambda leaf, shape: np.asarray(leaf, shape.dtype), restored, shapes)


def _raise_unless_damage(path: Path, error: Exception) -> None:
    """Raise an InputError if an exception of Orbax or TensorStore has another reason than a damaged checkpoint."""
    if isinstance(error, MemoryError):
        raise InputError(f"the checkpoint {path} cannot be read: there is not enough memory for it") from error
    if "structures do not match" in str(error):
        raise InputError(f"the checkpoint {path} does not fit its {INFO}: it holds other arrays") from error
    reason = refused_write(error) or next((reason for reason in NO_DAMAGE if reason in str(error)), None)
    if reason or not path.parent.exists():
        raise InputError(
            f"the checkpoint {path} cannot be read: {reason or 'its folder is gone'}; fix that, and try again"
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line of a message of Orbax or TensorStore, without the specification of an array."""
    return str(error).partition("\n")[0].partition(" [tensorstore_spec")[0] or type(error).__name__


@contextlib.contextmanager
def _silent_about_abandoned_work() -> Iterator[None]:
    """Silence the messages of Orbax and TensorStore about reads and writes that another one's failure interrupts.

    These end at any time, so after a failure the silence stays; all other errors are reported as before.
    """
    before = sys.unraisablehook

    def report(unraisable: Any) -> None:  # noqa: ANN401 - Python does not export the type.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = report
    try:
        yield
    except BaseException:
        warnings.filterwarnings("ignore", message="coroutine '.*' was never awaited", category=RuntimeWarning)
        raise
    sys.unraisablehook = before


def _best_or_latest(workdir: Path) -> Path:
    if not has_steps(workdir):
        raise InputError(
            f"{workdir} holds no finished checkpoint; let its training continue, or give another checkpoint"
        )
    # Orbax warns about folders that are read-only.
    log = logging.getLogger("absl")
    usual = log.level
    log.setLevel(max(usual, logging.ERROR))
    try:
        with TrainingCheckpoints(workdir, read_only=True) as checkpoints:
            return workdir / STEPS / str(checkpoints.best_or_latest_step())
    finally:
        log.setLevel(usual)


def has_steps(workdir: Path) -> bool:
    """Return whether a training workdir holds a finished checkpoint.

    Args:
      workdir: its path.
    """
    return bool(ocp.utils.checkpoint_steps(workdir / STEPS))


def _describe_damaged_metrics(checkpoints: Path, error: Exception) -> str:
    """Describe the checkpoint that keeps Orbax from listing them all: Orbax reads the metrics of each."""
    for step in sorted(ocp.utils.checkpoint_steps(checkpoints)):
        try:
            json.loads(read_file(checkpoints / str(step) / METRICS / METRICS))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as fault:
            place = checkpoints / str(step)
            return f"the checkpoint {place} is damaged: its {METRICS} cannot be read ({fault}); move it away"
    return f"the checkpoints in {checkpoints} are damaged: {_reason(error)}; move the damaged one away"


class TrainingCheckpoints:
    """The numbered checkpoints of a workdir: the newest few and the best by top-1.

    Each is written completely or not at all.

    Args:
      workdir: the training's folder.
      keep: number of newest checkpoints to keep.
      read_only: only list and read checkpoints.

    Attributes:
      directory: of the checkpoints.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 1, read_only: bool = False) -> None:
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
            opened.enter_context(_silent_about_abandoned_work())
            folder = opened.enter_context(_plainly_named(self.directory.parent)) / STEPS
            names = (VARIABLES, OPTIMIZER, EMA)
            try:
                self._manager = ocp.CheckpointManager(folder, options=options, item_names=names)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise DamagedError(_describe_damaged_metrics(self.directory, error)) from error
            self._opened = opened.pop_all()

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as closing:
            closing.push(lambda *failure: self._opened.__exit__(*(failure if failure[0] else (kind, error, trace))))
            with self._explained_errors():
                self._manager.close()  # Waits for the checkpoint that is being written.
            if self._saved and kind is None:
                self.restore(*self._saved)  # A checkpoint that cannot be read back is a failure.

    def steps(self) -> list[int]:
        """Return the steps of all finished checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def best_or_latest_step(self) -> int:
        """Return the step with the highest top-1, or the newest one if none was evaluated."""
        best = self._manager.best_step()
        return self._manager.latest_step() if best is None else best

    def set_aside(self, step: int) -> Path:
        """Move a checkpoint away, in all processes together.

        Args:
          step: of the checkpoint.

        Returns:
          Its new place.
        """
        place = self.directory.parent / f"damaged-{step}"
        if parallel.is_first():
            (self.directory / str(step)).rename(place)
        parallel.wait_for_all(f"set aside {step}")
        self._manager.reload()
        return place

    def save(self, step: int, items: Mapping[str, Params], metrics: Mapping[str, float] | None = None) -> None:
        """Start to write a checkpoint in the background.

        Args:
          step: of the checkpoint.
          items: {VARIABLES: tree, ...}, from `parallel.to_host`.
          metrics: figures of an evaluation, with "top1"; None without one.

        Raises:
          InputError: this checkpoint, or the one before, cannot be written.
        """
        args = ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()})
        hashes = {name: hash_of_variables(tree) for name, tree in items.items()}
        with self._explained_errors():
            self._manager.save(step, args=args, metrics=metrics, custom_metadata={"sha256": hashes})
        self._saved = step, {name: jax.eval_shape(lambda tree=tree: tree) for name, tree in items.items()}

    @contextlib.contextmanager
    def _explained_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise a dozen types.
            raise InputError(
                f"a checkpoint cannot be written in {self.directory}: {refused_write(error) or _reason(error)}; those "
                "before it are intact"
            ) from error

    def restore(self, step: int, items: Mapping[str, Params]) -> dict[str, Params]:
        """Read the trees of a checkpoint as NumPy arrays.

        Args:
          step: of the checkpoint.
          items: {name: a tree of arrays or shapes, of the same form}.

        Raises:
          DamagedError: its files are not those that were written.
          InputError: it cannot be read, or has another form.
        """
        folder = self.directory / str(step)
        hashes = _hashes_in(folder)
        return {name: _restore(folder / name, tree, hashes.get(name)) for name, tree in items.items()}


def _top1(metrics: Mapping[str, float]) -> float:
    return metrics["top1"]
