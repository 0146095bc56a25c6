"""Where images come from, how they are prepared, and in which order they are read."""
