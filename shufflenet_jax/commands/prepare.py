"""`python -m shufflenet_jax prepare`: converts images or TFRecords to a TFDS data set that trains at full speed."""

import json
import logging
from collections.abc import Sequence

from .. import progress
from ..data.inventory import report_notes
from ..errors import InputError
from ..preparation import dataset
from ..preparation.contents import read_contents
from ..preparation.records import StoreOptions
from ..preparation.shards import ShardReport
from .parsing import CommandLine, add_val_share, positive_integer, program_of

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Convert a folder of images, a zip or tar of one, ILSVRC2012's tars, the Hugging Face Hub's Parquet shards of "
    "imagenet-1k, or a TFDS directory of TFRecords to a TFDS data set in ArrayRecord form, for --data tfds:NAME. "
    "The same command again continues where it was stopped."
)


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    parser = CommandLine(prog=program_of("prepare"), description=DESCRIPTION)
    parser.add_argument(
        "--source",
        required=True,
        nargs="+",
        help="a folder, zip or tar of images; ImageNet's Parquet shards, or a folder with them; or TFRecords",
    )
    parser.add_argument("--name", required=True, help="name of the data set: lower-case letters, digits and _")
    parser.add_argument("--out", required=True, help="folder of data sets to write it to: the --data-dir of training")
    add_val_share(parser)
    parser.add_argument("--short-edge", type=positive_integer, help="store larger images with this short side (pixels)")
    parser.add_argument(
        "--quality", type=positive_integer, default=90, help="their JPEG quality (default: %(default)s)"
    )
    parser.add_argument("--skip-damaged", action="store_true", help="skip damaged images instead of stopping")
    parser.add_argument("--shard-size", type=positive_integer, default=1024, help="images per file (%(default)s)")
    parser.add_argument("--processes", type=positive_integer, help="shards to write at a time (default: one per core)")
    options = parser.parse_args(argv)

    if len(options.source) == 1 and dataset.is_tfds(options.source[0]):
        if options.short_edge or options.skip_damaged:
            raise InputError("TFRecords are copied without changes; omit --short-edge and --skip-damaged")
        plan = dataset.plan_tfrecords(options.source[0], options.name, options.out)
        total = None
    else:
        chosen = StoreOptions(options.short_edge, options.quality, options.skip_damaged, options.shard_size)
        contents = read_contents(*options.source, val_share=options.val_share)
        plan = dataset.plan_images(contents, options.name, options.out, chosen)
        report_notes(contents.notes)
        total = sum(map(len, contents.splits.values()))
    with progress.bar(total=total, unit="image", description="preparing") as bar:

        def on_done(report: ShardReport) -> None:
            bar.update(report.examples + len(report.damaged))
            for reason in report.damaged:
                logger.warning("%s; skipped", reason)

        result = dataset.write(plan, processes=options.processes, on_done=on_done)
    damaged = len(result.damaged)
    print(json.dumps({"name": plan.name, "folder": str(plan.folder), **result.examples, "left_out": damaged}))
    return 0
