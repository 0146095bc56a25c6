"""A trace of a few steps of a run: what the devices and the host do at each moment."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from ..files import path_of, printable, writing
from .state import State

logger = logging.getLogger(__name__)

FIRST, LAST = 20, 30  # Steps after the start: the program is compiled then, and batches wait.

Step = Callable[..., tuple[State, dict]]


def make_folder(name: str | Path) -> Path:
    """Return the folder for a trace; it is made if there is none. Raises InputError if it cannot be written."""
    folder = path_of(name)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def traced(step: Step, folder: Path | None, start: int) -> Iterator[Step]:
    """Give the block a step that traces its calls FIRST to LAST into a folder, for TensorBoard or Perfetto.

    Args:
      step: `(state, batch) -> (state, metrics)`.
      folder: where the trace goes, from `make_folder`; None traces nothing.
      start: steps that the run has behind it.
    Raises:
      InputError: the folder cannot be written any more.
    """
    if folder is None:
        yield step
        return
    taken, tracing = 0, False

    def traced_step(state, batch):
        nonlocal taken, tracing
        taken += 1
        if taken == FIRST:
            jax.block_until_ready(state)  # Steps are only queued; those before do not belong to the trace.
            jax.profiler.start_trace(folder, profiler_options=_options())
            tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=start + taken):
            state, metrics = step(state, batch)
        if taken == LAST:
            jax.block_until_ready(state)
            tracing = _stop(folder, start + FIRST, start + taken)
        return state, metrics

    try:
        yield traced_step
    finally:
        if tracing:
            _stop(folder, start + FIRST, start + taken)
        elif taken < FIRST:
            logger.warning("the run took %d steps, but a trace begins at step %d: there is none", taken, FIRST)


def _options() -> jax.profiler.ProfileOptions:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # It records every call of every thread that decodes, and slows them.
    return options


def _stop(folder: Path, first: int, last: int) -> bool:
    """End the trace; return that nothing is traced any more."""
    with writing(folder):
        jax.profiler.stop_trace()
    logger.info("trace of steps %d to %d: %s", first, last, printable(str(folder)))
    return False
