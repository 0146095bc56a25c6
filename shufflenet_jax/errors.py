"""The only exception users see: invalid input, reported in one line."""

from typing import Any

# A value from the user, of any type: the function that takes it checks it and raises InputError.
Unchecked = Any


class InputError(ValueError):
    """An input is unusable; the message says what is wrong with which thing, and what to do.

    Arguments stand in backticks, which commands replace by the names of their options.

    Attributes:
      command: (name, {argument: value}) of a command that fixes it, which commands add to the message, or None.
    """

    def __init__(self, message: str, *, command: tuple[str, dict[str, Any]] | None = None) -> None:
        super().__init__(message)
        self.command = command
