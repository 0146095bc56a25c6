"""The summary of a run: its accuracy with intervals, its worst classes, and the classes that it confuses."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.labels import class_name
from ..errors import InputError
from ..evaluation.classes import ClassRow, ClassScores, Share, class_rows, confused_pairs, share_of
from ..files import read_file, written_aside

SUMMARY = "summary.json"
SHOWN = 5  # Classes, and pairs of them.
MOST_KEPT = 100


class Summary(NamedTuple):
    """The accuracy of a network on the evaluation split at the end of its training.

    Attributes:
      step: after which it was evaluated.
      images: number of images of the split.
      last: the Share of correct predictions.
      best: the same at the evaluation with the highest top-1, which was chosen on the same images.
      best_step: the step of that evaluation.
      means: precision, recall and F1 over the classes, and balanced accuracy, in percent.
      worst: ClassRows, the worst first, at most MOST_KEPT of them.
      confused: (label, predicted, images), the most frequent first, at most MOST_KEPT of them.
    """

    step: int
    images: int
    last: Share
    best: Share
    best_step: int
    means: dict[str, float]
    worst: list[ClassRow]
    confused: list[tuple[int, int, int]]


def summarize(step: int, pairs: np.ndarray, num_classes: int, best: tuple[int, float]) -> Summary:
    """Return the Summary of a run.

    Args:
      step: the last one.
      pairs: int (N, 2), label and prediction of each image after it.
      num_classes: of the network.
      best: the step with the highest top-1, and that top-1 in percent.
    """
    labels, predicted = pairs.T
    return Summary(
        step,
        len(pairs),
        share_of(int((labels == predicted).sum()), len(pairs)),
        share_of(round(best[1] * len(pairs) / 100), len(pairs)),
        best[0],
        ClassScores(labels, predicted, num_classes).means,
        class_rows(labels, predicted, num_classes)[:MOST_KEPT],
        confused_pairs(labels, predicted)[:MOST_KEPT],
    )


def write_summary(workdir: Path, summary: Summary) -> None:
    """Store a Summary in a workdir.

    Args:
      workdir: folder of the run.
      summary: the Summary.
    """
    values: dict[str, Any] = summary._asdict()
    values |= {"last": summary.last._asdict(), "best": summary.best._asdict()}
    values["worst"] = [row._asdict() for row in summary.worst]
    with written_aside(workdir / SUMMARY) as draft:
        draft.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_summary(workdir: Path) -> Summary | None:
    """Return the Summary of a workdir; None if it has none, or an unreadable one.

    Args:
      workdir: folder of the run.
    """
    try:
        values = json.loads(read_file(workdir / SUMMARY))
        values |= {name: Share(**values[name]) for name in ("last", "best")}
        values["worst"] = [ClassRow(**row) for row in values["worst"]]
        values["confused"] = [tuple(pair) for pair in values["confused"]]
        return Summary(**values)
    except (OSError, InputError, ValueError, TypeError, KeyError, RecursionError):
        return None


def describe_summary(summary: Summary, classes: tuple[str, ...] | None) -> list[str]:
    """Describe a Summary in lines.

    Args:
      summary: the Summary.
      classes: names of the classes, if they have any.
    """

    def describe(share: Share) -> str:
        interval = f"95 % interval {share.low:.1f} to {share.high:.1f} %"
        return f"{share.percent:.2f} % ({share.right} of {summary.images} images), {interval}"

    means = {name: f"{value:.2f} %" for name, value in summary.means.items()}
    lines = [
        f"last: step {summary.step}, top-1 {describe(summary.last)}",
        f"best: step {summary.best_step}, top-1 {describe(summary.best)}; chosen by these images, so it flatters",
        f"balanced accuracy {means['balanced_accuracy']}; over the classes: precision {means['precision']}, recall "
        f"{means['recall']}, F1 {means['f1']}",
        "worst classes:",
    ]
    for row in summary.worst[:SHOWN]:
        taken = "" if row.taken_for is None else f", most often taken for {class_name(classes, row.taken_for)}"
        lines.append(
            f"  {class_name(classes, row.label)}: {row.right} of {row.images} right, recall {row.recall:.1f} %, "
            f"precision {row.precision:.1f} %{taken}"
        )
    pairs = [
        f"{class_name(classes, label)} taken for {class_name(classes, other)} {count} times"
        for label, other, count in summary.confused[:SHOWN]
    ]
    return [*lines, f"most confused: {'; '.join(pairs) if pairs else 'none'}"]
