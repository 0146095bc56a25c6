"""Training: the loop, its step, and everything that a run keeps."""
