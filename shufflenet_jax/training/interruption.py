"""SIGTERM and Ctrl-C as a request to stop at the next safe moment."""

import os
import signal
import threading

import jax


class Interruption:
    """In the block the first such signal is only noted, so that a run can save; a second one works as usual.

    Where several processes have to agree when to stop, JAX takes SIGTERM and tells the others; Ctrl-C becomes one.
    """

    def __init__(self):
        self.number = None

    def __enter__(self):
        handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        if jax.process_count() > 1:
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there.
            handlers = {}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self.number = number
        self.__exit__()

    @property
    def wanted(self):
        """Whether this process was asked to stop."""
        return self.number is not None
