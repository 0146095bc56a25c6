"""When a run ends early: once evaluations stop to improve."""

from collections.abc import Iterable


class Patience:
    """Counts the evaluations since the best one.

    Args:
      limit: after how many without a higher top-1 a run ends; 0: it never does.
      before: top-1 of the evaluations that the run has behind it.
    """

    def __init__(self, limit: int, before: Iterable[float] = ()) -> None:
        self._limit, self._best, self._since = limit, -1.0, 0
        for top1 in before:
            self.add(top1)

    def add(self, top1: float) -> None:
        """Take note of an evaluation."""
        self._best, self._since = (top1, 0) if top1 > self._best else (self._best, self._since + 1)

    @property
    def over(self) -> bool:
        """Whether the run ends."""
        return 0 < self._limit <= self._since
