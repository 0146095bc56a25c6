"""The only exception users see: invalid input, reported in one line."""

from typing import Any


class InputError(ValueError):
    """Something the user gave is unusable; the message says what is wrong with which thing, and what to do.

    Arguments stand in backticks, so that commands can show them as the options they are.

    Attributes:
      command: (name, {argument: value}) of a command that mends it, which commands add to the message, or None.
    """

    def __init__(self, message: str, *, command: tuple[str, dict[str, Any]] | None = None) -> None:
        super().__init__(message)
        self.command = command
