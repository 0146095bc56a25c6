"""metrics.jsonl: one JSON object per line, and the sums between two lines."""

import contextlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import UnwritableError, read_file, writing, written_aside
from ..shapes import Metrics

METRICS, EVENTS = "metrics.jsonl", "events"
Row = dict[str, Any]  # A line: its "split" is a str, "step" an int, all others are numbers or None.


class MetricsLog:
    """Appends rows to a workdir's metrics.jsonl, and the same figures to its TensorBoard events.

    A resumed run first drops the rows about later steps, which it will take again.

    Args:
      workdir: folder of the run.
      last_step: the step after which the run continues; 0 for a new run.
    """

    def __init__(self, workdir: Path, *, last_step: int) -> None:
        self._path = workdir / METRICS
        rows = [row for row in read_metrics(self._path) if row["step"] <= last_step] if self._path.exists() else []
        if not last_step:
            shutil.rmtree(workdir / EVENTS, ignore_errors=True)
        self._events = Events(workdir / EVENTS, last_step=last_step)
        with written_aside(self._path) as draft:
            draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def write(self, *, step: int, epoch: float, split: str, **figures: float | None) -> Row:
        """Append a row.

        Args:
          step: after which it was measured.
          epoch: the same in epochs.
          split: "train", "eval" or "eval_ema".
          figures: the others.

        Returns:
          The row.
        """
        row = {"step": step, "epoch": epoch, "split": split, **figures}
        with writing(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._events.write(step, {f"{split}/{name}": value for name, value in figures.items() if value is not None})
        return row


class Events:
    """A TensorBoard event file. tensorboardX's SummaryWriter would wait forever for a thread that a full disk ends.

    Args:
      folder: where to put it; it is created.
      last_step: the step after which the run continues; TensorBoard hides later steps of the folder's other files.

    Raises:
      InputError: the file cannot be written, now or later.
    """

    def __init__(self, folder: Path, *, last_step: int) -> None:
        with _without_torch():
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import RecordWriter
            from tensorboardX.summary import scalar

        self._folder, self._event, self._scalar = folder, Event, scalar
        try:
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 10**9}.{platform.node()}"
            self._file = RecordWriter(str(folder.absolute() / name))
        except OSError as error:
            raise UnwritableError(folder, error.strerror, "remove it, or make room there") from error
        self._append(file_version="brain.Event:2")
        if last_step:
            self._append(step=last_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _append(self, **fields: object) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of a step.

        Args:
          step: its number.
          figures: {name: value}.
        """
        with writing(self._folder):
            for name, value in figures.items():
                self._append(step=step, summary=self._scalar(name, value))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with writing(self._folder):
            self._file.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hide PyTorch from tensorboardX, which would import it, for a second or two, only for its type of tensors."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment] # Python's way to make an import fail.
    try:
        yield
    finally:
        del sys.modules["torch"]


def read_metrics(path: Path) -> list[Row]:
    """Read the rows of a metrics.jsonl, without damaged lines, like a last line that was cut off.

    Args:
      path: of the file.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        text = read_file(path).decode(errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and _is_row(row)]


def _is_row(row: Row) -> bool:
    """Return whether a row has a step, an epoch, a split and otherwise only numbers."""
    figures = {name: value for name, value in row.items() if name not in ("split", "step", "epoch")}
    return (
        type(row.get("step")) is int
        and is_number(row.get("epoch"))
        and isinstance(row.get("split"), str)
        and all(value is None or is_number(value) for value in figures.values())
    )


def is_number(value: object) -> bool:
    """Return whether a value is a number that float32 can hold.

    Args:
      value: of any type.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38


class Meter:
    """Averages the steps' metrics, and their speed, between two calls of `take`; only these read from the device."""

    def __init__(self) -> None:
        self.restart()

    def add(self, step: int, metrics: Metrics, images: int) -> None:
        """Add a step.

        Args:
          step: its number.
          metrics: {name: mean over the images of the step}, on the device.
          images: their number.
        """
        self._steps.append((step, metrics, images))

    def take(self) -> dict[str, float] | None:
        """Return {name: mean over the images} and images_per_second since the last call, or None without steps.

        Raises:
          FloatingPointError: a figure is not finite; its argument is the first step with one.
        """
        if not self._steps:
            return None
        numbers, metrics, images = zip(*self._steps, strict=True)
        columns = {key: np.array([np.asarray(step[key]) for step in metrics]) for key in metrics[0]}
        sound = np.all([np.isfinite(column) for column in columns.values()], axis=0)
        if not sound.all():
            raise FloatingPointError(numbers[int(np.argmin(sound))])
        rate = sum(images) / (time.perf_counter() - self._start)
        self.restart()
        means = {key: float(np.average(column, weights=images)) for key, column in columns.items()}
        return {**means, "images_per_second": rate}

    def restart(self) -> None:
        """Forget all steps, and start the clock."""
        self._steps: list[tuple[int, Metrics, int]] = []
        self._start = time.perf_counter()
