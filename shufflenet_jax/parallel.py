"""Steps over all devices of all hosts: the only file that says pmap and jax.distributed.

The state has no device axis: `None` in pmap's axes broadcasts it in and hands one copy back. Nothing checks that the
copies agree (a forgotten mean raises nothing), which is why the tests compare them.

Each process feeds its own devices and runs the same program as all others: what one does with all of them together,
every one has to do, in the same order.
"""

import contextlib
import hashlib
import logging
import os
import subprocess
from collections import deque
from importlib.util import find_spec

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .batch_groups import AXIS, plan_batch
from .errors import InputError

logger = logging.getLogger(__name__)

# Images of 224 x 224 that a device trains on at a time: activations take some 30 MB each.
CPU_ROWS, ACCELERATOR_ROWS = 64, 256
START_SECONDS = 300  # For which processes wait for each other at the start.
SILENT_SECONDS = 30  # After which a process that has stopped answering counts as lost.
ADVICE = (
    "if another process of this run has ended, its output says why; start the same command again on all hosts to go on "
    "from the last checkpoint"
)


@contextlib.contextmanager
def joined(coordinator_address=None, num_processes=None, process_id=None, *, on_joined=lambda process, processes: None):
    """In the block, the processes of a run on several hosts compute together; a run of one process is left as it is.

    On TPU pods, in a step of several Slurm tasks and in indexed jobs of Kubernetes they find out by themselves what is
    not given.

    Args:
      coordinator_address: HOST:PORT at which process 0 can be reached.
      num_processes: how many there are.
      process_id: which of them this one is, from 0 on.
      on_joined: called with this process's number and the number of processes once they have found each other.
    Raises:
      InputError: only some of the three are given, or the others are not found.
    """
    given = (coordinator_address, num_processes, process_id)
    if None not in given:
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
            raise InputError(f"process {jax.process_index()} cannot go on: {reason}; {ADVICE}") from error


def require_platform() -> None:
    """Raise InputError where JAX has no device of the platforms that it is set to use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # The last for a platform whose plug-in is not installed.
        named = jax.config.jax_platforms
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0] or "JAX has no plug-in for it here"
        advice = f"set JAX_PLATFORMS to cpu, or install JAX for {named}" if named else "set JAX_PLATFORMS to cpu"
        raise InputError(f"JAX cannot compute on {named or 'this machine'}: {reason}; {advice}") from error


def _among_others():
    """Whether the surroundings tell that there may be other processes."""
    if "SLURM_STEP_NODELIST" in os.environ:
        return os.environ.get("SLURM_NTASKS", "1") != "1"
    return "JOB_COMPLETION_INDEX" in os.environ or _on_a_tpu()


def _on_a_tpu():
    return find_spec("libtpu") is not None and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))


def _meet(address, processes, process):
    given = {"coordinator_address": address, "num_processes": processes, "process_id": process}
    where = {name: value for name, value in given.items() if value is not None}
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
def _spoken_for(process):
    """Tells in the end what happened if this process ends within the block: JAX aborts it when another one is lost."""
    told = f"error: process {process} was killed, or ended because another one did; {ADVICE}"
    # A scheduler may send SIGTERM to all processes, this one too.
    words = ["sh", "-c", 'trap "" TERM; read -r word || echo "$0" >&2', told]
    with subprocess.Popen(words, stdin=subprocess.PIPE, bufsize=0, start_new_session=True) as witness:
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                witness.stdin.write(b"ended\n")


def is_first():
    """Whether this process is the one that writes what a run leaves."""
    return jax.process_index() == 0


def own_slice():
    """Which slice of each batch this process reads: `host` and `hosts` of `train_batches` and `eval_batches`."""
    return {"host": jax.process_index(), "hosts": jax.process_count()}


def shared_equally(rows):
    """The number of rows nearest below, but no less than one for each, that all processes can share."""
    return max(1, rows // jax.process_count()) * jax.process_count()


def wait_for_all(what):
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def require_same(what, value):
    """Raises InputError in every process unless all have the same value, told by its repr."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
    others = multihost_utils.process_allgather(digest)
    differing = [str(number) for number, other in enumerate(others) if not np.array_equal(other, others[0])]
    if differing:
        raise InputError(f"processes differ in their {what}: 0 from {', '.join(differing)}; each must have the same")


def all_stop(step, wanted):
    """Whether all processes stop after this step, because one of them was asked to: by `wanted`, or by SIGTERM.

    JAX's own handler of SIGTERM makes the processes agree on the step.
    """
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else wanted


def gather(rows):
    """The rows (N, ...) of all processes, one process after another; each gives as many."""
    return multihost_utils.process_allgather(rows, tiled=True) if jax.process_count() > 1 else rows


def all_devices():
    """Those of all processes, in the order of the rows of a batch: what a process feeds lies together."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def to_host(tree):
    """Copies of arrays that devices hold in full, as Orbax takes them: one for all processes together."""
    copies = jax.device_get(tree)
    if jax.process_count() == 1:
        return copies
    everywhere = NamedSharding(Mesh(np.array(all_devices()), (AXIS,)), PartitionSpec())
    return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, everywhere, lambda _: array), copies)


def replicate(tree, devices=None):
    """A tree of arrays with one copy on each device, ready for the steps below."""
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def map_train_step(step, devices=None):
    """`step(state, batch, constants) -> (state, metrics)` of one device, as one call on a batch from `feed`.

    The step itself averages over AXIS. It donates the state: only the one returned is valid afterwards. The constants
    stay valid.
    """
    devices = devices or all_devices()
    return jax.pmap(step, AXIS, in_axes=(None, 0, None), out_axes=None, devices=devices, donate_argnums=0)


def plan_for_devices(config, devices=None):
    """The BatchPlan of a TrainConfig's batches on the devices. Raises InputError if they cannot share them."""
    count = len(devices or jax.devices())
    most = rows_that_fit(config.train_preprocess.size, devices[0].platform if devices else None)
    return plan_batch(config.batch_size, config.bn_group_size, count, parts=config.accumulate, most=most)


def rows_that_fit(size, platform=None):
    """How many images of a size, height and width in pixels, a device should train on at a time; by default one that
    JAX uses here.
    """
    rows = CPU_ROWS if (platform or jax.default_backend()) == "cpu" else ACCELERATOR_ROWS
    return max(1, int(rows * (224 / size[0]) * (224 / size[1])))


def feed(batches, plan, devices=None, *, ahead=2):
    """Batches of a process, {name: (B, ...)}, as {name: (devices, parts, rows, ...)} on its devices, ahead of use."""
    devices = devices or jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def dealt(column):
        return column.reshape(plan.parts, len(devices), plan.device_batch, *column.shape[1:]).swapaxes(0, 1)

    waiting = deque()
    for batch in batches:
        waiting.append(jax.device_put({key: dealt(column) for key, column in batch.items()}, sharding))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def map_eval_step(step, devices=None):
    """`step(variables, batch) -> (sums, rows)` of one device, as one call on a whole batch of any size.

    Each process gives its slice of the batch. Sums are added over all devices; of a process's own rows come back
    (devices, ceil(B / devices), ...), those of the padding last.
    """
    count = len(devices or jax.local_devices())

    def summed(variables, batch):
        sums, rows = step(variables, batch)
        return jax.lax.psum(sums, AXIS), rows

    mapped = jax.pmap(summed, AXIS, in_axes=(None, 0), out_axes=(None, 0), devices=devices or all_devices())

    def on_all_devices(variables, batch):
        missing = -len(batch["labels"]) % count
        padded = {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}
        return mapped(variables, _split(padded, count))

    return on_all_devices


def _split(batch, count):
    """(B, ...) arrays as (devices, B / devices, ...)."""
    return {key: value.reshape(count, -1, *value.shape[1:]) for key, value in batch.items()}
