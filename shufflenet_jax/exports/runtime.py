"""ONNX Runtime, which runs the models of graph.py."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

VNNI = {"avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni"}
ARM = {"arm64", "aarch64"}


def load(path: str | Path | onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session on the CPU, without warnings; errors are still raised.

    Args:
      path: of an ONNX file, or a model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, images: np.ndarray) -> list[np.ndarray]:
    """Return the outputs for images.

    Args:
      session: from `load`.
      images: the model's input.
    """
    return session.run(None, {"images": images})


def weight_bits(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> int:
    """Return 8 if this CPU adds products of 8 bits without overflow, 7 if it does not or this is unknown.

    x86 without VNNI adds pairs of products in 16 bits, which saturates silently.

    Args:
      cpuinfo: Linux's description of the CPU.
      machine: type of the CPU; None means this one.
    """
    if (machine or platform.machine()).lower() in ARM:
        return 8
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return 7
    return 8 if VNNI & set(flags.split()) else 7


def watch(model: onnx.ModelProto, activations: Sequence[str]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return a function from normalized float32 images (b, C, H, W) to {activation: its values}, for `calibrate`.

    Args:
      model: in float32, without preprocessing.
      activations: names of those that are rounded.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    inner = [name for name in activations if name != "images"]
    outputs = {output.name for output in watched.graph.output}
    infos = {info.name: info for info in watched.graph.value_info}
    watched.graph.output.extend(infos[name] for name in inner if name not in outputs)
    session = load(watched)
    return lambda images: {"images": images, **dict(zip(inner, session.run(inner, {"images": images}), strict=True))}
