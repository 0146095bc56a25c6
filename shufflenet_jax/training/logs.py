"""metrics.jsonl: one JSON object a line, and the sums between two lines."""

import contextlib
import json
import platform
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import UnwritableError, read_file, writing, written_aside

METRICS, EVENTS = "metrics.jsonl", "events"


class MetricsLog:
    """Appends rows to a workdir's metrics.jsonl, and the same figures to its TensorBoard events.

    A resumed run first drops what was written about steps after the last one it has, which it will take again.
    """

    def __init__(self, workdir, *, last_step):
        self._path = workdir / METRICS
        rows = [row for row in read_metrics(self._path) if row["step"] <= last_step] if self._path.exists() else []
        if not last_step:
            shutil.rmtree(workdir / EVENTS, ignore_errors=True)
        self._events = Events(workdir / EVENTS, last_step=last_step)
        with written_aside(self._path) as draft:
            draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._events.close()

    def write(self, *, step, epoch, split, **figures):
        """Appends a row and returns it."""
        row = {"step": step, "epoch": epoch, "split": split, **figures}
        with writing(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._events.write(step, {f"{split}/{name}": value for name, value in figures.items() if value is not None})
        return row


class Events:
    """A TensorBoard event file. tensorboardX's SummaryWriter would wait forever for a thread that a full disk ends.

    Args:
      folder: where to put it; it is made.
      last_step: TensorBoard is to hide what earlier files of the folder say of later steps.
    Raises:
      InputError: it cannot be written, here or later.
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
        """Write {name: value} of a step."""
        with writing(self._folder):
            for name, value in figures.items():
                self._append(step=step, summary=self._scalar(name, value))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with writing(self._folder):
            self._file.close()


@contextlib.contextmanager
def _without_torch():
    """tensorboardX imports PyTorch where there is one, a second or two, for its type of tensors alone."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None
    try:
        yield
    finally:
        del sys.modules["torch"]


def read_metrics(path):
    """The rows of a metrics.jsonl; what is none, like a last line that was cut off, is left out."""
    try:
        text = read_file(path).decode(errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and _is_row(row)]


def _is_row(row):
    """Whether it tells a step, an epoch and a split, and numbers of its figures."""
    figures = {name: value for name, value in row.items() if name not in ("split", "step", "epoch")}
    return (
        type(row.get("step")) is int
        and is_number(row.get("epoch"))
        and isinstance(row.get("split"), str)
        and all(value is None or is_number(value) for value in figures.values())
    )


def is_number(value):
    """Whether a value is a number that float32 holds."""
    return type(value) in (int, float) and abs(value) < 3e38


class Meter:
    """Averages what the steps report, and their speed, since the last look; reads from the device only then."""

    def __init__(self):
        self._steps, self._start = [], time.perf_counter()

    def add(self, step, metrics, images):
        self._steps.append((step, metrics, images))

    def take(self):
        """{name: mean over the images} and images_per_second since the last call, or None if there was no step.

        Raises:
          FloatingPointError: a figure is not finite; its argument is the first such step.
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

    def restart(self):
        self.__init__()
