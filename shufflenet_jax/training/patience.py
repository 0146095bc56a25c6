"""Early stopping: a run ends once its evaluations stop improving."""

from collections.abc import Iterable


class Patience:
    """Counts the evaluations since the best one.

    Args:
      limit: number of evaluations without a higher top-1 after which a run ends; 0 never ends it.
      before: top-1 of the run's earlier evaluations.
    """

    def __init__(self, limit: int, before: Iterable[float] = ()) -> None:
        self._limit, self._best, self._since = limit, -1.0, 0
        for top1 in before:
            self.add(top1)

    def add(self, top1: float) -> None:
        """Count an evaluation.

        Args:
          top1: its accuracy.
        """
        self._best, self._since = (top1, 0) if top1 > self._best else (self._best, self._since + 1)

    @property
    def over(self) -> bool:
        """Whether the run ends."""
        return 0 < self._limit <= self._since
