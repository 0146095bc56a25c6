"""Trained networks as files for other runtimes: each module writes one format, and loads it again to be compared."""
