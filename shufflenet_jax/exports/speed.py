"""The time of exported files, measured side by side."""

import statistics
import time
from collections.abc import Callable, Mapping

SECONDS = 1.0  # Time of measuring for each function.
FEWEST = 5  # Least number of calls of each.


def milliseconds(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Time functions with alternating calls.

    Args:
      functions: {name: function}.

    Returns:
      {name: median milliseconds of a call}.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + SECONDS * len(functions)
    while len(next(iter(times.values()))) < FEWEST or time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(measured) for name, measured in times.items()}
