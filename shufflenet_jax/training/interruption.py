"""SIGTERM and Ctrl-C as a request to stop at the next safe moment."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import jax

Handler = Callable[[int, FrameType | None], None]


class Interruption:
    """A block that only notes the first of these signals, so that a run can save; a second one works as usual.

    If several processes have to agree when to stop, JAX handles SIGTERM and informs the others; Ctrl-C becomes SIGTERM.

    Attributes:
      number: of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "Interruption":
        handlers: dict[signal.Signals, Handler] = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        if jax.process_count() > 1:
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there.
            handlers = {}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()

    @property
    def wanted(self) -> bool:
        """Whether this process received a signal to stop."""
        return self.number is not None
