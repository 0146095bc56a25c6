"""metrics.jsonl: one JSON object a line, and the sums between two lines."""

import json
import time

import numpy as np


class MetricsLog:
    """Appends rows to metrics.jsonl; a resumed run first drops the rows of steps which it will take again."""

    def __init__(self, path, *, last_step):
        rows = [row for row in read_metrics(path) if row["step"] <= last_step] if path.exists() else []
        draft = path.with_suffix(".new")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        draft.replace(path)
        self._path = path

    def write(self, **row):
        """Appends a row and returns it."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def read_metrics(path):
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


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
