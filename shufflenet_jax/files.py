"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

import contextlib
import shutil
import tempfile
from pathlib import Path

from .errors import InputError


@contextlib.contextmanager
def written_aside(target):
    """A path in a new folder beside `target`: what the block leaves there takes the target's place at its end.

    If the block raises, or leaves nothing, the target stays as it was. Raises InputError where nothing can be written.
    """
    target = Path(target).expanduser().absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}; choose another place") from error
    draft, old = aside / target.name, aside / "old"
    try:
        yield draft
        if target.is_dir():  # A folder does not give way to a rename; a file does.
            target.rename(old)
        try:
            draft.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
