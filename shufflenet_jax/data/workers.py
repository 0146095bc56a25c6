"""The number of threads or processes that read and decode images."""

import os


def usable_cores() -> int:
    """Return the number of cores that this process may use; a scheduler may have bound it to some of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
