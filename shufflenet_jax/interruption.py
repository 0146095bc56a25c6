"""SIGTERM and Ctrl-C as a request to stop at the next safe moment."""

import signal


class Interruption:
    """In the block the first such signal is only noted, so that a run can save; a second one works as usual."""

    def __init__(self):
        self.number = None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self.number = number
        for other, handler in self._before.items():
            signal.signal(other, handler)

    @property
    def status(self):
        """The exit status that tells of it: 0 for SIGTERM, so that a scheduler starts the run again; else a shell's."""
        return 0 if self.number == signal.SIGTERM else 128 + self.number
