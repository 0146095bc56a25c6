"""8 bits for graphs of any format: ranges of activations, chosen on images, and weights as multiples of a step."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int8, Int32, Num

LEVELS = 255  # Steps of an activation in 8 bits.
BINS = 2048
SHARES = np.linspace(0.3, 1, 71)  # Candidates for the range of 8 bits, as shares of an activation's range.
# Histograms of activations with more values than FEW use only every SPARSE-th.
FEW, SPARSE = 2**15, 16


class Quantization(NamedTuple):
    """How a graph computes in 8 bits.

    Attributes:
      ranges: {activation: (least, largest) value that 8 bits represent}; None means that only weights have 8 bits, and
        activations are rounded at run time.
      largest_weight: 127, or 63 if products of 8 bits would overflow.
    """

    ranges: dict[str, tuple[float, float]] | None
    largest_weight: int


class Rounding(NamedTuple):
    """The meaning of an activation's 8 bits, 0 to LEVELS: `scale * (bits - zero)`.

    Attributes:
      scale: of a level.
      zero: the level of 0.
    """

    scale: np.float32
    zero: int


def rounding_of(least: float, largest: float) -> Rounding:
    """Return the Rounding for a range; 0 has its own level, so that padding with it is exact.

    Args:
      least: value of the range.
      largest: value of the range.
    """
    least, largest = min(least, 0.0), max(largest, 1e-6)
    scale = np.float32((largest - least) / LEVELS)
    return Rounding(scale, int(np.clip(round(-least / scale), 0, LEVELS)))


def round_weights(
    kernel: Float[np.ndarray, "outputs ..."],
    bias: Float[np.ndarray, " outputs"] | None,
    unit: float | np.float32 | None,
    most: int,
) -> tuple[Int8[np.ndarray, "outputs ..."], Float32[np.ndarray, " outputs"], Int32[np.ndarray, " outputs"] | None]:
    """Round a layer's weights, with a step for each output channel.

    Args:
      kernel: (O, ...).
      bias: (O,), or None.
      unit: scale of the layer's input; None if that stays in float32.
      most: largest multiple of a step, 127 or 63.

    Returns:
      (int8 kernel, its steps (O,) float32, int32 bias in multiples of steps and unit, or None).
    """
    steps = np.abs(kernel).reshape(len(kernel), -1).max(1) / most
    if bias is not None and unit:
        steps = np.maximum(steps, np.abs(bias) / unit / 2**30)  # Biases are 32-bit multiples of both scales.
    steps = np.maximum(steps, 1e-12).astype(np.float32)
    rounded = np.clip(np.round(kernel / steps.reshape(-1, *[1] * (kernel.ndim - 1))), -most, most).astype(np.int8)
    if bias is None or unit is None:
        return rounded, steps, None
    return rounded, steps, np.round(bias / (unit * steps).astype(np.float64)).astype(np.int32)


def calibrate(
    watch: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    batches: Callable[[], Iterable[np.ndarray]],
    groups: Mapping[str, str] | None = None,
) -> dict[str, tuple[float, float]]:
    """Choose the range of each activation with the least squared error of rounding within it and clipping beyond it.

    The first of two passes over the images takes the extremes, the second a histogram between them.

    Args:
      watch: function from a batch of images to all activations, channels first.
      batches: function that returns the batches of images.
      groups: {activation: the group whose range it shares}; None gives each one its own range.

    Returns:
      {activation: (least, largest)}.
    """
    group_of = dict(groups or {})
    extremes: dict[str, tuple[float, float]] = {}
    counts: dict[str, np.ndarray] = {}
    for images in batches():
        for name, array in watch(images).items():
            group = group_of.setdefault(name, name)
            least, largest = extremes.get(group, (0.0, 0.0))
            extremes[group] = min(least, float(array.min())), max(largest, float(array.max()))
    for images in batches():
        for name, array in watch(images).items():
            group = group_of[name]
            counted = np.histogram(array.ravel()[:: SPARSE if array.size > FEW else 1], BINS, extremes[group])[0]
            counts[group] = counts.get(group, np.zeros(BINS, np.int64)) + counted
    ranges = {group: best_range(counts[group], *extremes[group]) for group in extremes}
    return {name: ranges[group] for name, group in group_of.items() if group in ranges}


def best_range(counts: Num[np.ndarray, " bins"], least: float, largest: float) -> tuple[float, float]:
    """Return the range within a histogram's range whose 8 bits have the least squared error.

    Args:
      counts: (bins,), the histogram.
      least: start of its range.
      largest: end of its range.
    """
    edges = np.linspace(least, largest, len(counts) + 1)
    middles, best = (edges[1:] + edges[:-1]) / 2, (np.inf, (least, largest))
    for share in SHARES[::-1]:
        step = (largest - least) * share / LEVELS
        if step == 0:
            break
        levels = np.clip(np.round(middles / step), np.round(least * share / step), np.round(largest * share / step))
        error = float(counts @ np.square(levels * step - middles))
        best = min(best, (error, (least * share, largest * share)), key=lambda candidate: candidate[0])
    return best[1]
