"""A trace of a few steps of a run: the work of the devices and the host over time."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from ..files import path_of, printable, writing
from ..shapes import Batch, Metrics
from .state import State

logger = logging.getLogger(__name__)

FIRST, LAST = 20, 30  # Steps after the start, when the program is compiled and batches wait.

Step = Callable[[State, Batch], tuple[State, Metrics]]


def make_folder(name: str | Path) -> Path:
    """Create the folder for a trace, if it does not exist.

    Args:
      name: its path.

    Raises:
      InputError: it cannot be written.
    """
    folder = path_of(name)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def traced(step: Step, folder: Path | None, start: int) -> Iterator[Step]:
    """Yield a step that traces its calls FIRST to LAST into a folder, for TensorBoard or Perfetto.

    Args:
      step: `(state, batch) -> (state, metrics)`.
      folder: for the trace, from `make_folder`; None traces nothing.
      start: number of the step before the first call.

    Raises:
      InputError: the folder cannot be written any more.
    """
    if folder is None:
        yield step
        return
    taken, tracing = 0, False

    def traced_step(state: Any, batch: Any) -> tuple[Any, Metrics]:  # noqa: ANN401 - those of the step.
        nonlocal taken, tracing
        taken += 1
        if taken == FIRST:
            jax.block_until_ready(state)  # Steps are only queued; wait for those before the trace.
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
            logger.warning("no trace: the run took %d steps, but the trace begins at step %d", taken, FIRST)


def _options() -> jax.profiler.ProfileOptions:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # It records every call of every thread that decodes, and slows them.
    return options


def _stop(folder: Path, first: int, last: int) -> bool:
    """End the trace; return whether it still runs, which is False."""
    with writing(folder):
        jax.profiler.stop_trace()
    logger.info("trace of steps %d to %d: %s", first, last, printable(str(folder)))
    return False
