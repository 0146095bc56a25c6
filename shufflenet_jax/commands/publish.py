"""`publish`: converts any checkpoint to a model directory: only weights, with their hash in the name, and a card."""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..accounting import count, total
from ..architecture import name_of
from ..checkpoint import hash_of_variables, load_directory, module_of, save_model
from ..config import ModelInfo
from ..errors import InputError
from ..files import path_of, written_aside
from ..loading import load_model
from .parsing import CommandLine, program_of

DESCRIPTION = (
    "Convert a checkpoint to a model directory to publish: the weights without optimizer state and history, "
    "model.json, and a model card in README.md. Its name ends with the first 8 digits of the weights' sha256."
)


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    parser = CommandLine(prog=program_of("publish"), description=DESCRIPTION)
    parser.add_argument(
        "checkpoint", help="a model directory, a training workdir (its best), WORKDIR/checkpoints/N, or a .pth file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder in which to create it")
    parser.add_argument("--name", required=True, help="name of the model, like shufflenet_v2_x0_5_pets")
    parser.add_argument("--ema", action="store_true", help="take the moving averages instead of the weights")
    parser.add_argument("--licence", required=True, help="licence of the weights, like CC-BY-4.0")
    parser.add_argument("--top1", type=float, metavar="P", help="accuracy in percent, for the card")
    parser.add_argument("--top5", type=float, metavar="P", help="the same for the first five classes")
    parser.add_argument("--data", metavar="WORDS", help="the data of this evaluation, for the card")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"\w[\w.+-]*", options.name):
        raise InputError(f"--name is {options.name!r}, but must consist of letters, digits, '.', '_', '+' and '-'")
    out = path_of(options.out)
    _, variables, info = load_model(options.checkpoint, ema=options.ema)
    info = dataclasses.replace(info, source=without_places(info.source))
    digest = hash_of_variables(variables)
    target = path_of(out / f"{options.name}-{digest[:8]}")
    if target.exists():
        raise InputError(f"{target} exists already; choose another --out or --name")
    with written_aside(target, folder=True, check=load_directory) as draft:
        save_model(draft, info, variables)
        (draft / "README.md").write_text(card(target.name, digest, info, options), "utf-8", "backslashreplace")
    print(target)
    return 0


def without_places(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ModelInfo's source with the names of files and folders, but without their places.

    Args:
      source: of a ModelInfo.
    """
    if "config" not in source:
        return dict(source)
    named = {k: Path(v).name for k, v in source["config"].items() if isinstance(v, str) and v.startswith(("/", "~"))}
    return {**source, "config": {**source["config"], **named}}


def card(name: str, digest: str, info: ModelInfo, options: argparse.Namespace) -> str:
    """Return the model card, in Markdown.

    Args:
      name: of the model.
      digest: sha256 of the variables.
      info: the model description.
      options: of the command.
    """
    height, width = info.preprocess.size
    summed = total(count(module_of(info), height, width))
    stem = ", small stem" if info.small_stem else ""
    facts = {
        "network": f"ShuffleNetV2 {name_of(info.table, conv5=info.conv5)}, {info.layout} layout{stem}",
        "classes": info.num_classes or "none: only features",
        "parameters": f"{summed['parameters']:,}",
        f"multiply-adds at {height} x {width}": f"{summed['multiply_adds'] / 1e6:.1f} M",
        "input": f"short side {info.preprocess.resize}, central {height} x {width}, {info.preprocess.channel_order}",
        "top-1": f"{options.top1} %" if options.top1 is not None else None,
        "top-5": f"{options.top5} %" if options.top5 is not None else None,
        "measured on": options.data,
        "source": info.source.get("file") or info.source.get("config", {}).get("data"),
        "began with": info.source.get("config", {}).get("init_from"),
        "licence": options.licence,
        "sha256 of the variables": digest,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None)
    return f"""# {name}

| | |
| --- | --- |
{table}

```python
import shufflenet_jax as snet

model = snet.get_model("{name}")
print(snet.inference_model(model, "image.jpg"))
```
"""
