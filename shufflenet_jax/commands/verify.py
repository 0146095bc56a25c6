"""`python -m shufflenet_jax verify`: checks a data set before a long run depends on it."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import plots, progress
from ..config import TrainConfig
from ..data.inventory import report_notes
from ..data.labels import imagenet_classes
from ..data.pipeline import train_batches
from ..data.sources import Source, open_source
from ..data.survey import Survey, survey
from ..recipes import PRESETS
from ..training.rule import settle
from .console import libraries_silent
from .parsing import CommandLine, add_val_share, positive_integer, program_of

DESCRIPTION = (
    "Read every image of a data set and report its contents. The last line on stdout is a JSON object; exit 1 if an "
    "image cannot be read."
)
SHOWN = 5  # Names per line.


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    parser = CommandLine(prog=program_of("verify"), description=DESCRIPTION)
    parser.add_argument("data", help="tfds:NAME, a folder of images, a zip or tar of one, or digits")
    parser.add_argument("--split", help="the part of the data (default: the first of val, validation, test it has)")
    parser.add_argument("--data-dir", help="folder of tfds: data sets (default: TFDS's own)")
    add_val_share(parser)
    parser.add_argument("--preview", metavar="OUT.png", help="draw a batch as training sees it, with its labels")
    parser.add_argument(
        "--config", choices=PRESETS, help="whose augmentation to draw (default: random crops and flips)"
    )
    parser.add_argument("--image-size", type=positive_integer, help="side of the drawn images, in pixels")
    options = parser.parse_args(argv)

    source = open_source(options.data, options.split, data_dir=options.data_dir, val_share=options.val_share)
    report_notes(source.notes)
    with libraries_silent(), progress.bar(total=len(source), unit="image", description="verifying") as bar:
        found = survey(source, on_done=bar.update)
    report(found, source)
    if options.preview and len(found.unreadable) < found.images:
        with libraries_silent():
            preview(source, options)
        print(f"preview: {options.preview}")
    print(json.dumps(summary(found, source)))
    return 1 if found.unreadable else 0


def report(found: Survey, source: Source) -> None:
    """Print a line for each finding.

    Args:
      found: the survey.
      source: the data.
    """
    lines = {
        "cannot be read": found.unreadable,
        "grey": found.grey,
        "CMYK": found.cmyk,
        "turned by EXIF": found.rotated,
        "the same bytes": [" = ".join(names) for names in found.duplicates],
    }
    for kind, names in lines.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        print(f"{kind}: {len(names)}" + (f": {'; '.join(names[:SHOWN])}{more}" if names else ""))
    if found.per_label:
        counts = found.per_label.values()
        print(f"classes: {len(counts)} of {source.num_classes} present, {min(counts)} to {max(counts)} images each")
        widths, heights = zip(*found.sizes, strict=True)
        print(f"sizes: {min(widths)} to {max(widths)} wide, {min(heights)} to {max(heights)} high")


def summary(found: Survey, source: Source) -> dict[str, Any]:
    """Return the JSON object with the counts.

    Args:
      found: the survey.
      source: the data.
    """
    names = ("unreadable", "grey", "cmyk", "rotated", "duplicates")
    return {
        "images": found.images,
        **{name: len(getattr(found, name)) for name in names},
        "classes": len(found.per_label),
        "skipped": source.skipped,
    }


def preview(source: Source, options: argparse.Namespace) -> None:
    """Draw the first training batch of the data under a preset's augmentation.

    Args:
      source: the data.
      options: of the command.
    """
    config = dataclasses.replace(PRESETS.get(options.config, TrainConfig(data=options.data)), batch_size=32)
    config = settle(dataclasses.replace(config, init_from=None, width=config.width or 1.0), source, {})[0]
    if options.image_size:
        config = dataclasses.replace(config, image_size=options.image_size)
    batch = next(iter(train_batches(source, config, stop_step=1)))
    names = imagenet_classes()
    titles = [_title(source, int(label), names) for label in batch["labels"]]
    plots.plot_batch(batch, titles, Path(options.preview))


def _title(source: Source, label: int, names: Mapping[str, str]) -> str:
    name = source.classes[label] if source.classes else str(label)
    return names.get(name, name)
