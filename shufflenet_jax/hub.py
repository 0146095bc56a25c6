"""Models on the Hugging Face Hub, `hf-hub:OWNER/NAME`: downloaded and pushed through huggingface_hub.

Its environment variables hold here too: HF_ENDPOINT, HF_HOME for the cache, HF_TOKEN, HF_HUB_OFFLINE.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import InputError
from .files import UnwritableError, real_path, refused_write
from .installation import require_packages

logger = logging.getLogger(__name__)

PREFIX = "hf-hub:"
ADDRESS = re.compile(r"hf-hub:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?")
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


class Repository(NamedTuple):
    """A repository of models on the Hub.

    Attributes:
      name: OWNER/NAME.
      revision: a branch, a tag or a commit; None is the main branch.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}{f'@{self.revision}' if self.revision else ''}"


def is_repository(checkpoint: object) -> bool:
    """Whether a checkpoint's name is that of a repository on the Hub."""
    return str(checkpoint).startswith(PREFIX)


def repository_of(address: str) -> Repository:
    """Return the repository that `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME@REVISION` names.

    Raises:
      InputError: the address has another form, or huggingface_hub is not installed.
    """
    match = ADDRESS.fullmatch(address)
    if not match:
        raise InputError(f"{address} names no repository; write hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION")
    require_packages("huggingface_hub")
    return Repository(match["repository"], match["revision"])


def download(repository: Repository, file: str) -> Path:
    """Return the path of a repository's file in the Hub's cache, downloaded on first use.

    The name of its folder is the commit that the revision stands for.

    Args:
      repository: the repository.
      file: name of the file.

    Raises:
      InputError: the file cannot be had, or it is not the one that the Hub announced.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(repository.name, file, revision=repository.revision), str):
        logger.info("downloading %s of %s", file, repository)
    with _errors_of(repository, f"{file} of {repository} cannot be downloaded"), _silence():
        path = Path(hf_hub_download(repository.name, file, revision=repository.revision))
        _require_announced(path, repository)
    return path


def _require_announced(path: Path, repository: Repository) -> None:
    """Raise InputError if a file of the cache has another hash than the Hub announced, which the cache names it by."""
    blob = real_path(path)
    content = blob.read_bytes()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256(content).hexdigest()
    elif re.fullmatch("[0-9a-f]{40}", blob.name):  # Git's hash, of small files.
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:  # The cache is on a file system without links.
        return
    if digest != blob.name:
        raise InputError(
            f"{path.name} of {repository} is damaged: its hash is {digest}, but the Hub announces {blob.name}; remove "
            f"{blob} and try again"
        )


def push(folder: Path, repository: Repository) -> None:
    """Upload a folder in one commit. Create the repository if there is none.

    Args:
      folder: the files.
      repository: the repository.

    Raises:
      InputError: the Hub refuses them, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _errors_of(repository, f"{repository} cannot be written"), _silence():
        HfApi().create_repo(repository.name, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository.name,
            folder_path=folder,
            revision=repository.revision,
            commit_message=f"Publish {folder.name}",
        )


@contextlib.contextmanager
def _errors_of(repository: Repository, failure: str) -> Iterator[None]:
    """Raise an InputError that says why huggingface_hub could not do the work of the block.

    Args:
      repository: the repository that the block works on.
      failure: what failed, where nothing more is known.
    """
    import huggingface_hub.errors as errors

    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(f"{repository} is gated; accept its conditions on its page, and {LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is no {repository}, or it is private and this machine may not read it ({_status(error)}); correct "
            f"the name, or {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{PREFIX}{repository.name} has no revision {repository.revision}; correct it") from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{failure}: it is not in the cache, and the Hub cannot be reached ({_reason(error.__cause__)}); try again "
            "with a connection, and without HF_HUB_OFFLINE"
        ) from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"{failure}: it does not exist there; give a repository that `publish` wrote") from error
    except errors.HfHubHTTPError as error:
        advice = LOG_IN if error.response.status_code in (401, 403) else "try again later"
        raise InputError(f"{failure} ({_status(error)}); {advice}") from error
    except Exception as error:  # Those of its HTTP client, which differ between versions, and of the file system.
        reason = refused_write(error)
        if reason:
            raise UnwritableError("the Hub's cache", reason, "name another folder in HF_HOME") from error
        raise InputError(f"{failure}: {_reason(error)}; try again later") from error


def _status(error: Exception) -> str:
    """Return the HTTP status that the Hub answered, in words."""
    response = error.response  # type: ignore[attr-defined]  # huggingface_hub may be missing.
    return f"HTTP {response.status_code} {response.reason_phrase}".strip()


def _reason(error: BaseException | None) -> str:
    """Return the first line of an error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep huggingface_hub from printing progress bars, and warnings of what the error at the end says."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    log = logging.getLogger("huggingface_hub")
    hidden, level = are_progress_bars_disabled(), log.level
    if not hidden:
        disable_progress_bars()
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        if not hidden:
            enable_progress_bars()
