"""`python -m shufflenet_jax export`: writes a network for another runtime, and compares it there on real images."""

import argparse
import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from .. import progress
from ..data.inventory import report_notes
from ..data.pipeline import eval_batches
from ..data.sources import Source, open_source
from ..errors import InputError
from ..exports import speed
from ..exports.agreement import TOLERANCE, measure_agreement, photographs
from ..exports.browser import BrowserError
from ..exports.formats import FORMATS, Written, normalized, run_ours
from ..exports.network import Signature
from ..exports.quantization import Quantization, calibrate
from ..exports.web import require_own
from ..files import path_of, written_aside
from ..inference import Model
from ..installation import require_packages
from ..loading import load_model
from .console import libraries_silent
from .parsing import CHECKPOINT, CommandLine, positive_integer, program_of
from .publish import without_places

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Write a network for another runtime. The file is loaded there and compared with ours on real images; if they "
    "differ by more than rounding, exit is 1 and nothing is written."
)
BATCH = 16  # Images per step of the comparison, if the file takes any number.
MOST_CALIBRATION = 500  # Images; more change the ranges little.
TIMED = (1, 32)
WITHOUT_DATA = "dynamic"  # --int8 without images.


class Differs(Exception):
    """The file computes something else."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    options = parse(argv)
    form = FORMATS[options.format]
    require_packages(*form.packages)
    out, folder = path_of(options.out or default_name(options)), form.folder and not options.single_file
    if folder and out.is_dir():
        require_own(out)
    model = at_resolution(Model(*load_model(options.checkpoint, ema=options.ema)), options.resolution)
    model.info = dataclasses.replace(model.info, source=without_places(model.info.source))
    opened = partial(open_source, data_dir=options.data_dir)
    if model.info.num_classes:
        opened = partial(opened, classes=model.info.classes, num_classes=model.info.num_classes)
    # Open all data first: errors should not cost the rest.
    data = opened(options.data, options.split) if options.data else None
    with_images = options.int8 not in (None, WITHOUT_DATA)
    calibration = opened(options.int8, options.int8_split) if with_images else None
    report_notes(note for source in (data, calibration) if source for note in source.notes)
    try:
        with written_aside(out, folder=folder) as draft:
            difference = exported(options, model, data, calibration, draft)
            size = sum(path.stat().st_size for path in ([*draft.iterdir()] if folder else [draft]))
    except BrowserError as error:
        print(f"{error}: nothing written", file=sys.stderr)
        return 1
    except Differs as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {out}: {size / 1e6:.2f} MB, {difference}")
    return 0


def at_resolution(model: Model, resolution: tuple[int, int] | None) -> Model:
    """Change a model to images of another size, prepared as a training at that size prepares them.

    Args:
      model: the network.
      resolution: (height, width) in pixels; None changes nothing.

    Returns:
      The same model.
    """
    if resolution:
        preprocess = model.info.preprocess.with_side(resolution)
        model.info = dataclasses.replace(model.info, preprocess=preprocess, metrics=None)
        logger.info(
            "images are prepared for %d x %d pixels, the short side first %d", *preprocess.size, preprocess.resize
        )
    return model


def exported(
    options: argparse.Namespace, model: Model, data: Source | None, calibration: Source | None, draft: Path
) -> str:
    """Write a file, and compare it with our network.

    Args:
      options: of the command.
      model: the network.
      data: images for the comparison; None means two photographs.
      calibration: images for the ranges of 8 bits; None if there are no ranges.
      draft: path of the file.

    Returns:
      The difference, in words.

    Raises:
      Differs: the difference is too large.
      InputError: a package is missing.
    """
    form, signature = FORMATS[options.format], signature_of(options)
    try:
        with libraries_silent():  # LiteRT prints which delegate it uses.
            written = form.write(draft, model, signature, **{name: getattr(options, name) for name in form.settings})
        with contextlib.closing(written):
            difference = checked(options, model, data, written, exact=True)
        if options.int8:
            with_8_bits = form.write(draft, model, signature, quantized(options, model, calibration))
            difference = checked(options, model, data, with_8_bits, exact=False)
            report_speed(signature, model, {"float32": written, "int8": with_8_bits})
    except ImportError as error:
        again = "pip install --force-reinstall 'shufflenet_jax[all]'"
        raise InputError(f"--format {options.format} cannot be written: {error}; run {again}") from error
    return difference


def signature_of(options: argparse.Namespace) -> Signature:
    """Return the signature of the file.

    Args:
      options: of the command.
    """
    batch = FORMATS[options.format].batch if options.batch is None else options.batch
    batch = None if batch == "any" else batch
    return Signature(batch, options.resolution, options.with_preprocessing, options.features)


def quantized(options: argparse.Namespace, model: Model, source: Source | None) -> Quantization:
    """Return how to compute in 8 bits, with ranges chosen on images.

    Args:
      options: of the command.
      model: the network.
      source: the images; None means no ranges.
    """
    if source is None:
        return Quantization(None, 127)
    bits = weight_bits(options)
    print(f"weights in {bits} bits, activations in 8")
    watch = FORMATS[options.format].watch
    assert watch is not None  # Formats with 8 bits have it.
    watched = watch(model, signature_of(options))
    count = min(len(source), MOST_CALIBRATION)
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    images = dataclasses.replace(source, size=count, read=lambda index: source[int(chosen[index])])
    with progress.bar(total=2 * count, unit="image", description="calibrating") as bar:

        def batches() -> Iterator[np.ndarray]:
            for batch in counted(eval_batches(images, model.info.preprocess, batch_size=BATCH), bar):
                real = batch["mask"] > 0
                yield normalized(model, batch["images"][real])

        return Quantization(calibrate(watched.watch, batches, watched.groups), 2 ** (bits - 1) - 1)


def weight_bits(options: argparse.Namespace) -> int:
    """Return the bits of the weights: as the user chose, or as this CPU needs them.

    Args:
      options: of the command.
    """
    if "weight_bits" not in FORMATS[options.format].arguments:
        return 8
    from ..exports import runtime

    bits = options.weight_bits or runtime.weight_bits()
    if bits == 7 and not options.weight_bits:
        logger.warning(
            "this CPU has no VNNI, without which sums of 8-bit products saturate: weights get 7 bits (--weight-bits)"
        )
    return bits


def checked(options: argparse.Namespace, model: Model, data: Source | None, written: Written, *, exact: bool) -> str:
    """Compare a file with our network, and print the result.

    Args:
      options: of the command.
      model: the network.
      data: images for the comparison; None means two photographs.
      written: the file.
      exact: whether only rounding may differ.

    Returns:
      The difference, in words.

    Raises:
      Differs: the file is `exact`, and the difference is too large.
    """
    signature = signature_of(options)
    batch = signature.batch or BATCH
    batches: Iterable[Mapping[str, np.ndarray]]
    if data:
        total = min(options.limit or len(data), len(data))
        batches = eval_batches(data, model.info.preprocess, batch_size=batch, limit=total)
    else:
        batches = list(photographs(model, batch))
        total = int(sum(batch["mask"].sum() for batch in batches))
    with_accuracy = bool(data and model.info.num_classes and not signature.features)
    with progress.bar(total=total, unit="image", description="comparing") as bar:
        shown = (
            {name: values for name, values in batch.items() if with_accuracy or name != "labels"}
            for batch in counted(batches, bar)
        )
        agreement = measure_agreement(partial(run_ours, model, signature), written.__call__, shown)
    share = f"{agreement.share:.1e} of the largest output ({agreement.largest:.4g})"
    difference = f"largest difference {agreement.difference:.1e}, {share}"
    if exact and not agreement.passed:
        raise Differs(
            f"{written.called} computes something else: {difference}, more than {TOLERANCE:.0e} of it: nothing written"
        )
    what = "images" if data else "parts of two photographs (accuracy needs --data)"
    print(f"{written.called}, {agreement.images} {what}: {difference}")
    if with_accuracy:
        for called, (top1, top5) in {"JAX": agreement.ours, written.called: agreement.theirs}.items():
            print(f"{called:32} {top1} top-1, {top5} top-5 correct")
        print(f"{'the same first class':32} {agreement.agreeing}")
    return difference


def counted(batches: Iterable[Mapping[str, np.ndarray]], bar: progress.Bar) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the batches, and count their images with a bar.

    Args:
      batches: with "mask".
      bar: the bar.
    """
    for batch in batches:
        yield batch
        bar.update(int(batch["mask"].sum()))


def report_speed(signature: Signature, model: Model, files: Mapping[str, Written]) -> None:
    """Print the time of a call of each file.

    Args:
      signature: of the files.
      model: the network.
      files: {name: file}.
    """
    preprocess = model.info.preprocess
    for batch in [signature.batch] if signature.batch else TIMED:
        shape = batch, *(signature.size or preprocess.size), preprocess.channels
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        times = speed.milliseconds({name: partial(file.run, file.takes(pixels)) for name, file in files.items()})
        print(f"batch {batch}: " + ", ".join(f"{name} {time:.2f} ms" for name, time in times.items()))


def default_name(options: argparse.Namespace) -> str:
    """Return the checkpoint's name with the format's ending.

    Args:
      options: of the command.
    """
    path = Path(options.checkpoint)
    stem = path.stem if path.suffix in (".pth", ".pt", ".safetensors") else path.name
    return (
        stem + ("-int8" if options.int8 else "") + (".html" if options.single_file else FORMATS[options.format].ending)
    )


def batch_size(text: str) -> int | str:
    """Parse "any" or a number from 1 up, for `type=`.

    Args:
      text: the option's value.
    """
    return text if text == "any" else positive_integer(text)


def resolution(text: str) -> tuple[int, int]:
    """Parse "224x320" as (224, 320), for `type=`.

    Args:
      text: the option's value.

    Raises:
      ArgumentTypeError: it has another form.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, like 224x320")
    return int(match[1]), int(match[2])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Args:
      argv: the command's arguments.

    Raises:
      InputError: they are wrong.
    """
    parser = CommandLine(prog=program_of("export"), description=DESCRIPTION)
    parser.add_argument("checkpoint", help=CHECKPOINT)
    help_text = (
        "stablehlo for JAX, onnx, tflite for phones, web for browsers, safetensors, or the names of a PyTorch project"
    )
    parser.add_argument("--format", choices=FORMATS, required=True, help=help_text)
    parser.add_argument(
        "--out", help="the file, or folder of web, to write (default: the checkpoint's name with an ending, here)"
    )
    parser.add_argument("--ema", action="store_true", help="take the moving averages instead of the weights")
    help_text = "images per call: any, or a number, which is faster on CPUs in JAX (default: any; for tflite 1)"
    parser.add_argument("--batch", type=batch_size, metavar="any|N", help=help_text)
    help_text = "take uint8 crops (batch, height, width, channels) in RGB or grey, and normalize them inside"
    parser.add_argument("--with-preprocessing", action="store_true", help=help_text)
    help_text = "height and width of the images in pixels (default: the square that the network was evaluated on)"
    parser.add_argument("--resolution", type=resolution, metavar="HxW", help=help_text)
    help_text = "return stage2, stage3 and stage4 instead of logits, for a detector or another head"
    parser.add_argument("--features", action="store_true", help=help_text)
    group = parser.add_argument_group("comparison")
    help_text = "images on which both sides are compared, in any form of eval.py's --data (default: two photographs)"
    group.add_argument("--data", help=help_text)
    group.add_argument("--data-dir", help="folder of tfds: data sets (default: TFDS's own)")
    group.add_argument("--split", help="the part of the data (default: the first of val, validation, test it has)")
    group.add_argument("--limit", type=positive_integer, help="compare only on the first images, this many")
    group = parser.add_argument_group(
        "8 bits", "For onnx and tflite: weights and activations in 8 bits, after training."
    )
    help_text = (
        f"images to choose the ranges of activations on, in any form of --data; at most {MOST_CALIBRATION} are read; "
        "without DATA, for tflite: only weights are stored in 8 bits, and activations are rounded at run time"
    )
    group.add_argument("--int8", metavar="DATA", nargs="?", const=WITHOUT_DATA, help=help_text)
    group.add_argument("--int8-split", metavar="SPLIT", help="their part of the data (default: as for --split)")
    help_text = "bits of the weights in onnx: 7 for CPUs without VNNI, on which 8 saturate (default: as this CPU needs)"
    group.add_argument("--weight-bits", type=int, choices=[7, 8], help=help_text)
    group = parser.add_argument_group("web", "A page with onnxruntime-web, which is downloaded once into the cache.")
    group.add_argument(
        "--single-file", action="store_true", help="one file with everything inside, which also opens from disk"
    )
    help_text = "the package of onnxruntime-web from npm pack, instead of the download"
    group.add_argument("--runtime", metavar="FILE", type=path_of, help=help_text)
    options = parser.parse_args(argv)
    require_consistent(options)
    return options


def require_consistent(options: argparse.Namespace) -> None:
    """Raise InputError if options do not fit together.

    Args:
      options: of the command.
    """
    form = FORMATS[options.format]
    for argument in sorted({argument for other in FORMATS.values() for argument in other.arguments}):
        if getattr(options, argument) and argument not in form.arguments:
            those = ", ".join(name for name, other in FORMATS.items() if argument in other.arguments)
            option = f"--{argument.replace('_', '-')}"
            raise InputError(f"{option} is for --format {those}, not {options.format}; omit it")
    if options.int8 == WITHOUT_DATA and not form.dynamic:
        raise InputError(f"--int8 of --format {options.format} needs images: give it DATA")
    if options.weight_bits and not options.int8:
        raise InputError("--weight-bits is for --int8; add it, or omit both")
    if options.int8_split and options.int8 in (None, WITHOUT_DATA):
        raise InputError("--int8-split chooses from the images of --int8; give it DATA, or omit --int8-split")
    if not options.data and (options.split or options.limit):
        raise InputError("--split and --limit choose from --data; add it, or omit them")
