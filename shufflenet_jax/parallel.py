"""Steps over all devices of all hosts: the only file that uses pmap and jax.distributed.

The state has no device axis: `None` in pmap's axes broadcasts it in and hands one copy back. Nothing checks that the
copies agree (a forgotten mean raises nothing), so the tests compare them.

Each process feeds its own devices and runs the same program as all others. All processes must run collective operations
in the same order.
"""

import contextlib
import hashlib
import logging
import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .batch_groups import AXIS, BatchPlan, plan_batch
from .config import TrainConfig
from .errors import InputError
from .shapes import Array, Batch, Metrics, Tree, Variables

State = TypeVar("State")
Constants = TypeVar("Constants")
Sums = TypeVar("Sums")
Devices: TypeAlias = Sequence[jax.Device]


@runtime_checkable
class MappedStep(Protocol):
    """A training step over all devices; its state and metrics are those of the mapped step."""

    def __call__(self, state: State, batch: Batch, constants: Any, /) -> tuple[State, Metrics]:  # noqa: ANN401 - a tree.
        """Take a step."""

    def lower(self, state: State, batch: Any, constants: Any, /) -> jax.stages.Lowered:  # noqa: ANN401 - trees.
        """Lower the step for arguments of these shapes."""


logger = logging.getLogger(__name__)

# Images of 224 x 224 that a device trains on at a time: activations take some 30 MB each.
CPU_ROWS, ACCELERATOR_ROWS = 64, 256
START_SECONDS = 300  # How long processes wait for each other at the start.
SILENT_SECONDS = 30  # How long a process may be silent before it counts as lost.
ADVICE = (
    "if another process of this run has ended, its output says why; start the same command again on all hosts to "
    "continue from the last checkpoint"
)


@contextlib.contextmanager
def joined(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    on_joined: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[None]:
    """Connect the processes of a run on several hosts, within the block; do nothing in a run of one process.

    On TPU pods, in a step of several Slurm tasks and in indexed jobs of Kubernetes, processes detect what is not given.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      on_joined: called with this process's number and the number of processes once they are connected.

    Raises:
      InputError: only some of the three are given, or the processes do not find each other.
    """
    given = (coordinator_address, num_processes, process_id)
    if coordinator_address is not None and num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes or ":" not in coordinator_address:
            raise InputError(
                f"process {process_id} of {num_processes} at {coordinator_address} is impossible: `process_id` counts "
                "from 0 to one below `num_processes`, and `coordinator_address` is HOST:PORT"
            )
    elif not _among_others():
        if given != (None,) * 3:
            raise InputError(
                "`coordinator_address`, `num_processes` and `process_id` belong together; give all three, here or as "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            )
        yield
        return
    with _spoken_for("?" if process_id is None else process_id):
        _meet(*given)
        on_joined(jax.process_index(), jax.process_count())
        logger.info("%d process(es) with %d device(s) each", jax.process_count(), jax.local_device_count())
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"process {jax.process_index()} cannot continue: {reason}; {ADVICE}") from error


def require_platform() -> None:
    """Raise InputError if JAX has no device of the platforms in its settings."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # The last for a platform whose plug-in is not installed.
        named = jax.config.jax_platforms
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0] or "JAX has no plug-in for it here"
        advice = f"set JAX_PLATFORMS to cpu, or install JAX for {named}" if named else "set JAX_PLATFORMS to cpu"
        raise InputError(f"JAX cannot compute on {named or 'this machine'}: {reason}; {advice}") from error


def _among_others() -> bool:
    """Return whether the environment suggests that there are other processes."""
    if "SLURM_STEP_NODELIST" in os.environ:
        return os.environ.get("SLURM_NTASKS", "1") != "1"
    return "JOB_COMPLETION_INDEX" in os.environ or _on_a_tpu()


def _on_a_tpu() -> bool:
    return find_spec("libtpu") is not None and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))


def _meet(address: str | None, processes: int | None, process: int | None) -> None:
    given = {"coordinator_address": address, "num_processes": processes, "process_id": process}
    where: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    if len(where) == len(given):
        where["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(
            **where, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=SILENT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and not where and _on_a_tpu():
            return  # A TPU that belongs to no pod.
        raise InputError(
            f"the processes of this run do not find each other: {error}; give `coordinator_address`, `num_processes` "
            "and `process_id`, the first reachable from all hosts"
        ) from error


@contextlib.contextmanager
def _spoken_for(process: int | str) -> Iterator[None]:
    """Print what happened if this process ends within the block: JAX aborts it when another one is lost."""
    message = f"error: process {process} was killed, or ended because another one did; {ADVICE}"
    # A scheduler may send SIGTERM to all processes, this one too.
    words = ["sh", "-c", 'trap "" TERM; read -r word || echo "$0" >&2', message]
    with subprocess.Popen(words, stdin=subprocess.PIPE, bufsize=0, start_new_session=True) as witness:
        assert witness.stdin is not None  # It is a pipe.
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                witness.stdin.write(b"ended\n")


def is_first() -> bool:
    """Return whether this is the process that writes a run's files."""
    return jax.process_index() == 0


def own_slice() -> dict[str, int]:
    """Return the arguments `host` and `hosts` with which this process reads its slice of each batch."""
    return {"host": jax.process_index(), "hosts": jax.process_count()}


def shared_equally(rows: int) -> int:
    """Round a number of rows down to one that all processes can share, but to at least one for each.

    Args:
      rows: wanted number.
    """
    return max(1, rows // jax.process_count()) * jax.process_count()


def wait_for_all(what: str) -> None:
    """Wait until every process has called this.

    Args:
      what: name of the place in the program, the same in all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def require_same(what: str, value: object) -> None:
    """Raise InputError in every process unless all have the same value.

    Args:
      what: name of the value, for the message.
      value: compared by its repr.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
    others = multihost_utils.process_allgather(digest)
    differing = [str(number) for number, other in enumerate(others) if not np.array_equal(other, others[0])]
    if differing:
        raise InputError(f"processes differ in their {what}: 0 from {', '.join(differing)}; each must have the same")


def all_stop(step: int, wanted: bool) -> bool:
    """Return whether all processes stop after this step, because one of them received a signal.

    JAX's own handler of SIGTERM makes several processes agree on the step.

    Args:
      step: number of the step.
      wanted: whether this process received a signal; only a run of one process uses it.
    """
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else wanted


def gather(rows: np.ndarray) -> np.ndarray:
    """Concatenate the rows of all processes.

    Args:
      rows: (N, ...), with the same N in each process.
    """
    return multihost_utils.process_allgather(rows, tiled=True) if jax.process_count() > 1 else rows


def all_devices() -> list[jax.Device]:
    """Return the devices of all processes in the order of a batch's rows; those of a process are contiguous."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def to_host(tree: Tree) -> Tree:
    """Copy arrays that each device holds in full to the host, in the form that Orbax takes from several processes.

    Args:
      tree: of arrays.
    """
    copies = jax.device_get(tree)
    if jax.process_count() == 1:
        return copies
    everywhere = NamedSharding(Mesh(np.array(all_devices()), (AXIS,)), PartitionSpec())
    return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, everywhere, lambda _: array), copies)


def replicate(tree: Tree, devices: Devices | None = None) -> Tree:
    """Copy a tree of arrays to each device, ready for the steps below.

    Args:
      tree: of arrays.
      devices: where to; None means those of this process.
    """
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def map_train_step(
    step: Callable[[State, Batch, Constants], tuple[State, Metrics]], devices: Devices | None = None
) -> MappedStep:
    """Turn the training step of one device into one call on a batch from `feed`.

    The step itself averages over AXIS. It donates the state: only the one returned is valid afterwards. The constants
    stay valid.

    Args:
      step: `(state, batch, constants) -> (state, metrics)`.
      devices: on which it runs; None means all.
    """
    devices = devices or all_devices()
    return jax.pmap(step, AXIS, in_axes=(None, 0, None), out_axes=None, devices=devices, donate_argnums=0)


def plan_for_devices(config: TrainConfig, devices: Devices | None = None) -> BatchPlan:
    """Return the BatchPlan of a run's batches on devices.

    Args:
      config: the run's settings.
      devices: None means all.

    Raises:
      InputError: the devices cannot share the batches.
    """
    count = len(devices or jax.devices())
    most = rows_that_fit(config.train_preprocess.size, devices[0].platform if devices else None)
    return plan_batch(config.batch_size, config.bn_group_size, count, parts=config.accumulate, most=most)


def rows_that_fit(size: tuple[int, int], platform: str | None = None) -> int:
    """Return how many images a device should train on at a time.

    Args:
      size: height and width of the images, in pixels.
      platform: of the device; None means JAX's default here.
    """
    rows = CPU_ROWS if (platform or jax.default_backend()) == "cpu" else ACCELERATOR_ROWS
    return max(1, int(rows * (224 / size[0]) * (224 / size[1])))


def feed(
    batches: Iterable[Mapping[str, np.ndarray]], plan: BatchPlan, devices: Devices | None = None, *, ahead: int = 2
) -> Iterator[Batch]:
    """Yield a process's batches on its devices, ahead of use.

    Args:
      batches: {name: (B, ...)} each.
      plan: how devices and parts divide them.
      devices: those of this process.
      ahead: number of batches that wait on the devices.

    Yields:
      {name: (devices, parts, rows, ...)} each.
    """
    chosen = devices or jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(chosen), (AXIS,)), PartitionSpec(AXIS))

    def dealt(column: np.ndarray) -> np.ndarray:
        return column.reshape(plan.parts, len(chosen), plan.device_batch, *column.shape[1:]).swapaxes(0, 1)

    waiting: deque[Batch] = deque()
    for batch in batches:
        waiting.append(jax.device_put({key: dealt(column) for key, column in batch.items()}, sharding))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def map_eval_step(
    step: Callable[[Variables, Batch], tuple[Sums, Array]], devices: Devices | None = None
) -> Callable[[Variables, Mapping[str, np.ndarray]], tuple[Sums, Array]]:
    """Turn the evaluation step of one device into one call on a whole batch of any size.

    Args:
      step: `(variables, batch) -> (sums, rows)`.
      devices: on which it runs; None means all.

    Returns:
      A function of variables and this process's slice of a batch. It returns the sums over all devices, and the rows
      of this process, (devices, ceil(B / devices), ...), with those of padding last.
    """
    count = len(devices or jax.local_devices())

    def summed(variables: Variables, batch: Batch) -> tuple[Sums, Array]:
        sums, rows = step(variables, batch)
        return jax.lax.psum(sums, AXIS), rows

    mapped = jax.pmap(summed, AXIS, in_axes=(None, 0), out_axes=(None, 0), devices=devices or all_devices())

    def on_all_devices(variables: Variables, batch: Mapping[str, np.ndarray]) -> tuple[Sums, Array]:
        missing = -len(batch["labels"]) % count
        padded = {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}
        return mapped(variables, _split(padded, count))

    return on_all_devices


def _split(batch: Mapping[str, np.ndarray], count: int) -> Batch:
    """Reshape arrays (B, ...) to (devices, B / devices, ...)."""
    return {key: value.reshape(count, -1, *value.shape[1:]) for key, value in batch.items()}
