"""ONNX Runtime: it runs what graph.py writes."""

import platform
from pathlib import Path

import onnx
import onnxruntime

VNNI = {"avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni"}
ARM = {"arm64", "aarch64"}


def load(path):
    """A session on the CPU for an ONNX file or model. Its warnings are kept back; errors are raised anyway."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(session, images):
    """The outputs for images as the file takes them."""
    return session.run(None, {"images": images})


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


def watch(model, activations):
    """A function of normalised float32 images (b, C, H, W) to {activation: its values}, for `calibrate`.

    Args:
      model: the float32 ModelProto, without preprocessing.
      activations: names of those that are rounded.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    inner = [name for name in activations if name != "images"]
    known = {output.name for output in watched.graph.output}
    infos = {info.name: info for info in watched.graph.value_info}
    watched.graph.output.extend(infos[name] for name in inner if name not in known)
    session = load(watched)
    return lambda images: {"images": images, **dict(zip(inner, session.run(inner, {"images": images}), strict=True))}
