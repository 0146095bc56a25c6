"""`publish`: writes any checkpoint as a folder to publish, and pushes it to the Hugging Face Hub."""

import argparse
import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import hub
from ..checkpoint import hash_of_variables
from ..errors import InputError
from ..exports.card import Statements, card
from ..exports.repository import read_repository, save_repository
from ..files import path_of, written_aside
from ..loading import load_model
from .parsing import CHECKPOINT, CommandLine, program_of

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Write a checkpoint as a folder to publish: the weights in model.safetensors, without optimizer state and history, "
    "their description in config.json, and a model card in README.md. Its name ends with the first 8 digits of the "
    "weights' sha256. It is a checkpoint, and with --push also a repository on the Hugging Face Hub."
)


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    parser = CommandLine(prog=program_of("publish"), description=DESCRIPTION)
    parser.add_argument("checkpoint", help=CHECKPOINT)
    parser.add_argument("--out", type=Path, required=True, help="folder in which to create it")
    parser.add_argument("--name", help="name of the model, like shufflenet_v2_x0_5_pets (default: the NAME of --push)")
    parser.add_argument("--ema", action="store_true", help="take the moving averages instead of the weights")
    parser.add_argument("--licence", required=True, help="licence of the weights, like CC-BY-4.0")
    parser.add_argument("--top1", type=float, metavar="P", help="accuracy in percent, for the card")
    parser.add_argument("--top5", type=float, metavar="P", help="the same for the first five classes")
    parser.add_argument("--data", metavar="WORDS", help="the data of this evaluation, for the card")
    help_text = "the Hub's names of the data it was trained on, for the card (default: imagenet-1k for its classes)"
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help=help_text)
    help_text = (
        "also upload it there, with your token (`hf auth login`, or HF_TOKEN); a repository that is not there yet "
        "becomes a public one"
    )
    parser.add_argument("--push", metavar="hf-hub:OWNER/NAME", help=help_text)
    options = parser.parse_args(argv)
    repository = hub.repository_of(options.push) if options.push else None
    name = _name_of(options, repository)
    out = path_of(options.out)
    _, variables, info = load_model(options.checkpoint, ema=options.ema)
    digest = hash_of_variables(variables)
    info = dataclasses.replace(info, source=without_places(info.source), sha256=digest)
    target = path_of(out / f"{name}-{digest[:8]}")
    if target.exists():
        raise InputError(f"{target} exists already; choose another --out or --name")
    datasets = tuple(options.datasets) if options.datasets else None
    address = str(repository or target.name)
    stated = Statements(name, address, options.licence, options.top1, options.top5, options.data, datasets)

    def finish(folder: Path) -> None:
        """Read the folder back, and push it; if either fails, nothing stays in its place."""
        read_repository(folder)
        if repository:
            hub.push(folder, repository)
            logger.info("pushed to %s", repository)

    with written_aside(target, folder=True, check=finish) as draft:
        draft.mkdir()
        save_repository(draft, variables, info, options.licence)
        (draft / "README.md").write_text(card(info, stated), "utf-8", "backslashreplace")
    print(target)
    return 0


def _name_of(options: argparse.Namespace, repository: hub.Repository | None) -> str:
    """Return what to call the model. Raises InputError where nothing names it, or it cannot be a folder's name."""
    name = options.name
    if name is None and repository:
        name = repository.name.partition("/")[2]
    if not re.fullmatch(r"\w[\w.+-]*", name or ""):
        raise InputError(f"--name is {name!r}, but must consist of letters, digits, '.', '_', '+' and '-'")
    return name


def without_places(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ModelInfo's source with the names of files and folders, but without their places.

    Args:
      source: of a ModelInfo.
    """
    if "config" not in source:
        return dict(source)
    named = {k: Path(v).name for k, v in source["config"].items() if isinstance(v, str) and v.startswith(("/", "~"))}
    return {**source, "config": {**source["config"], **named}}
