"""The one exception that users see: bad input, told in one line."""


class InputError(ValueError):
    """Something the user gave is unusable; the message says what is wrong with which thing, and what to do."""
