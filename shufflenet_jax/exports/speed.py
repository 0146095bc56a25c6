"""How long exported files take, measured side by side."""

import statistics
import time
from collections.abc import Callable, Mapping

SECONDS = 1.0  # Of measuring, for each function.
FEWEST = 5  # Calls of each.


def milliseconds(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return {name: median milliseconds of a call} of functions that are called alternately."""
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
