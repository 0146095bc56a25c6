"""LiteRT, which runs the files of tflite.py."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from .agreement import nchw


def load(content: bytes, *, threads: int | None = None) -> Interpreter:
    """Return an interpreter on the CPU.

    Args:
      content: bytes of a .tflite file.
      threads: number of threads; None means one per core.
    """
    network = Interpreter(model_content=content, num_threads=threads or os.cpu_count())
    network.allocate_tensors()
    return network


def run(network: Interpreter, images: np.ndarray) -> list[np.ndarray]:
    """Return the outputs for images; real numbers replace 8 bits.

    Args:
      network: from `load`.
      images: the file's input.
    """
    (given,) = network.get_input_details()
    if list(given["shape"]) != list(images.shape):
        network.resize_tensor_input(given["index"], images.shape, strict=True)
        network.allocate_tensors()
    network.set_tensor(given["index"], _rounded(images, given))
    network.invoke()
    return [_real(network.get_tensor(output["index"]), output) for output in network.get_output_details()]


def watch(content: bytes, names: Sequence[str]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return a function from normalized float32 images (b, H, W, C) to {activation: its values, channels first}.

    Args:
      content: a float32 file that outputs all activations except the images.
      names: of the activations, in its order.
    """
    network = load(content)
    inner = [name for name in names if name != "images"]

    def watched(images: np.ndarray) -> dict[str, np.ndarray]:
        values = run(network, images)
        shown = {"images": images, **dict(zip(inner, values, strict=True))}
        return {name: nchw(array) if array.ndim == 4 else array for name, array in shown.items()}

    return watched


def _rounded(images: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    scale, zero = details["quantization"]
    if details["dtype"] == images.dtype or not scale:
        return images
    limits = np.iinfo(details["dtype"])
    return np.clip(np.round(images / np.float32(scale)) + zero, limits.min, limits.max).astype(details["dtype"])


def _real(array: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    scale, zero = details["quantization"]
    if array.dtype == np.float32:
        return array
    return (array.astype(np.float32) - zero) * np.float32(scale)
