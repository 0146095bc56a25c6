"""`python -m shufflenet_jax export`: a trained network as a file for another runtime, compared there on real images."""

import dataclasses
import importlib.metadata
import logging
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from .. import progress
from ..data import normalization
from ..data.inventory import report_notes
from ..data.pipeline import eval_batches
from ..data.sources import open_source
from ..errors import InputError
from ..exports.agreement import TOLERANCE, last, measure_agreement, nchw, nhwc, photographs
from ..exports.tensors import metadata_of
from ..files import path_of, written_aside
from ..inference import Model
from ..installation import require_packages
from ..loading import load_model
from ..porting.dialects import DIALECTS
from .parsing import CommandLine, positive_integer, program_of
from .publish import without_places

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Write a network for another runtime. The file is loaded there again and compared with ours on real images; where "
    "they differ by more than rounding, exit is 1 and nothing is written."
)
GRAPHS = {"stablehlo": ".stablehlo", "onnx": ".onnx"}  # Formats that hold the computation: their endings.
ENDINGS = {**GRAPHS, "safetensors": ".safetensors", **{dialect: f"-{dialect}.pth" for dialect in DIALECTS}}
NEEDED = {"stablehlo": (), "onnx": ("onnx", "onnxruntime"), "safetensors": ("safetensors",)}  # Others: PyTorch.
BATCH = 16  # Images a step of the comparison, where the file takes any number.
MOST_CALIBRATION = 500  # Images; more change the ranges little.
TIMED = (1, 32)


class Differs(Exception):
    """The file computes something else."""


def main(argv):
    options = parse(argv)
    require_packages(*NEEDED.get(options.format, ("torch",)))
    out = path_of(options.out or default_name(options))
    model = Model(*load_model(options.checkpoint, ema=options.ema))
    model.info = dataclasses.replace(model.info, source=without_places(model.info.source))
    opened = partial(open_source, data_dir=options.data_dir)
    if model.info.num_classes:
        opened = partial(opened, classes=model.info.classes, num_classes=model.info.num_classes)
    # Opened first: what cannot be read should not cost the rest.
    data = opened(options.data, options.split) if options.data else None
    calibration = opened(options.int8, options.int8_split) if options.int8 else None
    report_notes(note for source in (data, calibration) if source for note in source.notes)
    try:
        with written_aside(out) as draft:
            told = exported(options, model, data, calibration, draft)
            size = draft.stat().st_size
    except Differs as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {out}: {size / 1e6:.2f} MB, {told}")
    return 0


def exported(options, model, data, calibration, draft):
    """Writes and compares the file; returns how far it is from ours in words. Raises Differs if that is too far."""
    try:
        written = WRITERS.get(options.format, write_torch)(options, model, draft)
    except ImportError as error:
        again = "pip install --force-reinstall 'shufflenet_jax[all]'"
        raise InputError(f"--format {options.format} cannot be written: {error}; run {again}") from error
    told = checked(options, model, data, written, exact=True)
    if calibration:
        with_8_bits = write_8_bits(options, model, calibration, draft)
        told = checked(options, model, data, with_8_bits, exact=False)
        tell_speed(options, model, {"float32": written.session, "int8": with_8_bits.session})
    return told


class Written(NamedTuple):
    """A file that is loaded again."""

    called: str  # The runtime.
    run: object  # A function of uint8 images (B, H, W, C) to outputs.
    session: object = None  # ONNX Runtime's.


def write_stablehlo(options, model, draft):
    from ..exports import stablehlo

    stablehlo.save(draft, model, batch=options.batch, with_preprocessing=options.with_preprocessing)
    run = stablehlo.load(draft)
    return Written(f"JAX {jax.__version__}, re-loaded", lambda images: run(taken(options, model, images)))


def write_onnx(options, model, draft, quantization=None):
    import onnx

    from ..exports import graph, runtime

    settings = {"batch": options.batch, "with_preprocessing": options.with_preprocessing}
    made, _ = graph.make_model(
        model.module,
        model.variables,
        model.info.preprocess,
        **settings,
        quantization=quantization,
        metadata=metadata_of(model.info),
    )
    onnx.save(made, draft)
    session = runtime.load(draft)
    called = f"ONNX Runtime {importlib.metadata.version('onnxruntime')}" + (", int8" if quantization else "")

    def run(images):
        images = taken(options, model, images)
        return nhwc(runtime.run(session, images if options.with_preprocessing else nchw(images)))

    return Written(called, run, session)


def write_8_bits(options, model, source, draft):
    """Replaces the float32 file by one that computes in 8 bits, in ranges found on images."""
    from ..exports import graph, runtime

    bits = options.weight_bits or runtime.weight_bits()
    if bits == 7 and not options.weight_bits:
        logger.warning(
            "this CPU shows no VNNI, without which sums of 8-bit products saturate: weights get 7 bits (--weight-bits)"
        )
    print(f"weights in {bits} bits, activations in 8")
    count = min(len(source), MOST_CALIBRATION)
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    images = dataclasses.replace(source, size=count, read=lambda index: source[int(chosen[index])])
    plain, activations = graph.make_model(model.module, model.variables, model.info.preprocess)
    with progress.bar(total=2 * count, unit="image", description="calibrating") as bar:

        def batches():
            for batch in eval_batches(images, model.info.preprocess, batch_size=BATCH):
                real = batch["mask"] > 0
                yield nchw(normalized(model, batch["images"][real]))
                bar.update(int(real.sum()))

        quantization = runtime.calibrate(plain, activations, batches, bits)
    return write_onnx(options, model, draft, quantization)


def write_safetensors(options, model, draft):
    from ..exports import tensors

    tensors.save_safetensors(draft, model)
    again = Model(*tensors.read_safetensors(draft))
    return Written("Flax, from safetensors", lambda images: last(*again.outputs(images)))


def write_torch(options, model, draft):
    from ..exports import tensors

    tensors.save_torch(draft, model, options.format)
    run = tensors.load_torch(draft, model, options.format)
    return Written("PyTorch", lambda images: last(*run(normalized(model, images))))


WRITERS = {"stablehlo": write_stablehlo, "onnx": write_onnx, "safetensors": write_safetensors}  # Others are PyTorch's.


def taken(options, model, images):
    """uint8 images as the file takes them, channels last."""
    return images if options.with_preprocessing else normalized(model, images)


def normalized(model, images):
    return np.asarray(normalization.normalize(images, model.info.preprocess))


def checked(options, model, data, written, *, exact):
    """Compares a file with our network; prints what was found and returns the last of it in words.

    Raises:
      Differs: by more than rounding, where it is `exact`.
    """
    batch = options.batch or BATCH
    if data:
        total = min(options.limit or len(data), len(data))
        batches = eval_batches(data, model.info.preprocess, batch_size=batch, limit=total)
    else:
        batches = list(photographs(model, batch))
        total = int(sum(batch["mask"].sum() for batch in batches))
    with progress.bar(total=total, unit="image", description="comparing") as bar:
        found = measure_agreement(lambda images: last(*model.outputs(images)), written.run, counted(batches, bar))
    away = f"largest difference {found.difference:.1e}, {found.share:.1e} of the largest output ({found.largest:.4g})"
    if exact and not found.passed:
        raise Differs(f"{written.called} gives something else: {away}, not {TOLERANCE:.0e} of it: nothing written")
    what = "images" if data else "parts of two photographs (accuracy needs --data)"
    print(f"{written.called}, {found.images} {what}: {away}")
    if data and model.info.num_classes:
        for called, (top1, top5) in {"JAX": found.ours, written.called: found.theirs}.items():
            print(f"{called:32} {top1} top-1, {top5} top-5 correct")
        print(f"{'the same first class':32} {found.agreeing}")
    return away


def counted(batches, bar):
    for batch in batches:
        yield batch
        bar.update(int(batch["mask"].sum()))


def tell_speed(options, model, sessions):
    """Prints how long each session takes."""
    from ..exports import runtime

    preprocess = model.info.preprocess
    for batch in [options.batch] if options.batch else TIMED:
        pixels = np.random.default_rng(0).integers(
            0, 256, (batch, preprocess.crop, preprocess.crop, preprocess.channels), np.uint8
        )
        images = taken(options, model, pixels)
        times = runtime.milliseconds(sessions, images if options.with_preprocessing else nchw(images))
        print(f"batch {batch}: " + ", ".join(f"{name} {time:.2f} ms" for name, time in times.items()))


def default_name(options):
    """The checkpoint's name with the format's ending, here."""
    path = Path(options.checkpoint)
    stem = path.stem if path.suffix in (".pth", ".pt", ".safetensors") else path.name
    return stem + ("-int8" if options.int8 else "") + ENDINGS[options.format]


def batch_size(text):
    return None if text == "any" else positive_integer(text)


def parse(argv):
    parser = CommandLine(prog=program_of("export"), description=DESCRIPTION)
    told = (
        "a published name, a model directory, a training workdir, WORKDIR/checkpoints/N, a .pth or a .safetensors file"
    )
    parser.add_argument("checkpoint", help=told)
    told = "stablehlo for JAX, onnx, safetensors, or the names of a PyTorch project"
    parser.add_argument("--format", choices=ENDINGS, required=True, help=told)
    parser.add_argument(
        "--out", help="the file to write (default: the checkpoint's name with the format's ending, here)"
    )
    parser.add_argument("--ema", action="store_true", help="take the moving averages kept beside the weights")
    told = "images a call: any, or a number, which is faster on CPUs in JAX (default: any)"
    parser.add_argument("--batch", type=batch_size, metavar="any|N", default="any", help=told)
    told = "take uint8 crops (batch, side, side, channels) in RGB or grey, and normalise them inside"
    parser.add_argument("--with-preprocessing", action="store_true", help=told)
    group = parser.add_argument_group("comparison")
    told = "images on which both sides are compared, in any form of eval.py's --data (default: two photographs)"
    group.add_argument("--data", help=told)
    group.add_argument("--data-dir", help="where tfds: data sets lie (default: TFDS's own place)")
    group.add_argument("--split", help="the part of the data (default: the first of val, validation, test it has)")
    group.add_argument("--limit", type=positive_integer, help="compare on only that many images, the first ones")
    group = parser.add_argument_group("8 bits", "For onnx: weights and activations in 8 bits, after training.")
    told = f"images to choose the ranges of activations on, in any form of --data; at most {MOST_CALIBRATION} are read"
    group.add_argument("--int8", metavar="DATA", help=told)
    group.add_argument("--int8-split", metavar="SPLIT", help="their part of the data (default: as for --split)")
    told = "of the weights: 7 for CPUs without VNNI, on which 8 saturate (default: as this CPU wants them)"
    group.add_argument("--weight-bits", type=int, choices=[7, 8], help=told)
    options = parser.parse_args(argv)
    options.batch = None if options.batch == "any" else options.batch
    if options.format not in GRAPHS and (options.batch or options.with_preprocessing):
        raise InputError(f"--format {options.format} holds weights alone; leave --batch and --with-preprocessing out")
    if options.int8 and options.format != "onnx":
        raise InputError(f"--int8 is for --format onnx, not {options.format}")
    if options.weight_bits and not options.int8:
        raise InputError("--weight-bits is for --int8; add it, or leave both out")
    if not options.data and (options.split or options.limit):
        raise InputError("--split and --limit choose from --data; add it, or leave them out")
    return options
