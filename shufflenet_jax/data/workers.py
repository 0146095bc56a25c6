"""How many threads or processes may read and decode images at a time."""

import os


def usable_cores():
    """Count the cores that this process may use: a scheduler may have bound it to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
