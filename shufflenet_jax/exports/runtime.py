"""ONNX Runtime: it runs what graph.py writes, and watches activations so that 8 bits can be chosen for them."""

import platform
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from .graph import LEVELS, Quantization

BINS = 2048
SHARES = np.linspace(0.3, 1, 71)  # Of the whole range of an activation: what 8 bits may stand for.
FEW_PIXELS = 16  # Every so many values of an activation are looked at for its histogram.
VNNI = {"avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni"}
ARM = {"arm64", "aarch64"}
SECONDS = 1.0


def load(path):
    """A session on the CPU for an ONNX file or model. Its warnings are kept back; errors are raised anyway."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(session, images):
    """The output for images as the file takes them."""
    return session.run(None, {"images": images})[0]


def weight_bits(cpuinfo=Path("/proc/cpuinfo"), machine=None):
    """8 where this CPU adds products of 8 bits without overflow, 7 where it does not or nobody knows.

    x86 without VNNI adds pairs of products in 16 bits, which saturates silently.
    """
    if (machine or platform.machine()).lower() in ARM:
        return 8
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return 7
    return 8 if VNNI & set(flags.split()) else 7


def calibrate(model, activations, batches, bits):
    """How to compute in 8 bits.

    Each activation gets the range within which rounding and, beyond it, clipping make the least squared error. Two
    passes: the first finds the extremes, the second a histogram between them.

    Args:
      model: the float32 ModelProto, without preprocessing.
      activations: names of those that are rounded.
      batches: a function that returns an iterable of normalised float32 images (b, C, side, side).
      bits: of the weights, 8 or 7.
    Returns:
      A Quantization.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    inner = [name for name in activations if name != "images"]
    known = {output.name for output in watched.graph.output}
    infos = {info.name: info for info in watched.graph.value_info}
    watched.graph.output.extend(infos[name] for name in inner if name not in known)
    session = load(watched)

    def values(images):
        return zip(["images", *inner], [images, *session.run(inner, {"images": images})], strict=True)

    extremes, counts = {}, {}
    for images in batches():
        for name, array in values(images):
            least, largest = extremes.get(name, (0.0, 0.0))
            extremes[name] = min(least, float(array.min())), max(largest, float(array.max()))
    for images in batches():
        for name, array in values(images):
            counts[name] = counts.get(name, 0) + np.histogram(array.ravel()[::FEW_PIXELS], BINS, extremes[name])[0]
    ranges = {name: best_range(counts[name], *extremes[name]) for name in extremes}
    return Quantization(ranges, 2 ** (bits - 1) - 1)


def best_range(counts, least, largest):
    """The (least, largest) share of a histogram's range whose 8 bits err least in the square."""
    edges = np.linspace(least, largest, len(counts) + 1)
    middles, best = (edges[1:] + edges[:-1]) / 2, (np.inf, (least, largest))
    for share in SHARES[::-1]:
        step = (largest - least) * share / LEVELS
        if step == 0:
            break
        levels = np.clip(np.round(middles / step), np.round(least * share / step), np.round(largest * share / step))
        error = float(counts @ np.square(levels * step - middles))
        best = min(best, (error, (least * share, largest * share)), key=lambda found: found[0])
    return best[1]


def milliseconds(sessions, images):
    """{name: median milliseconds of a call} of sessions that run in turn on the same images."""
    times = {name: [] for name in sessions}
    for session in sessions.values():
        run(session, images)
    end = time.perf_counter() + SECONDS * len(sessions)
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < end:
        for name, session in sessions.items():
            start = time.perf_counter()
            run(session, images)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(measured) for name, measured in times.items()}
