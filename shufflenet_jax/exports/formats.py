"""The formats of `export`, one entry of a table each: how a file is written, and run again to be compared."""

import importlib.metadata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ..data import normalization
from ..data.labels import class_name
from ..inference import Model
from ..porting.dialects import DIALECTS
from .agreement import last, nchw, nhwc
from .network import Signature, outputs_of
from .quantization import Quantization
from .tensors import metadata_of

Outputs = Sequence[np.ndarray]


class Written(NamedTuple):
    """A file that is loaded again."""

    called: str  # The runtime.
    run: Callable[[np.ndarray], Outputs]  # Outputs, channels last, of what the file takes, channels last.
    takes: Callable[[np.ndarray], np.ndarray]  # What the file takes, of uint8 images (B, H, W, C).

    def __call__(self, images: np.ndarray) -> Outputs:
        return self.run(self.takes(images))


class Watched(NamedTuple):
    """A network whose activations can be seen, to choose ranges for 8 bits."""

    watch: Callable[[np.ndarray], dict[str, np.ndarray]]  # All activations of normalized images (B, H, W, C).
    groups: dict[str, str] | None  # {activation: the group whose range it shares}.


class Format(NamedTuple):
    """What there is to know of a format."""

    ending: str  # Of the file's name.
    write: Callable[..., Written]  # Of (path, model, signature), and with 8 bits a Quantization.
    packages: tuple[str, ...] = ()  # Of extras, that must be installed: see installation.py.
    arguments: frozenset[str] = frozenset()  # Of `export`, that not all formats take.
    batch: int | None = None  # Images a call where nothing is said; None: any number.
    watch: Callable[[Model, Signature], Watched] | None = None  # For 8 bits with ranges.
    dynamic: bool = False  # Whether there are 8 bits without ranges too.


def run_ours(model: Model, signature: Signature, images: np.ndarray) -> Outputs:
    """Return the outputs of our network for uint8 images (B, H, W, C), in the order of an exported file."""
    logits, features = model.outputs(images)
    outputs = {**features, "logits": logits}
    return [np.asarray(outputs[name]) for name in outputs_of(model.module, features=signature.features)]


def normalized(model: Model, images: np.ndarray) -> np.ndarray:
    """Return uint8 images (B, H, W, C) as the network takes them."""
    return np.asarray(normalization.normalize(images, model.info.preprocess))


def described(model: Model, signature: Signature) -> dict[str, str]:
    """Return model.json, and the images' height and width where they were chosen, as {name: JSON text}."""
    height_width = {"resolution": f"[{signature.size[0]}, {signature.size[1]}]"} if signature.size else {}
    return {**metadata_of(model.info), **height_width}


def taking(model, signature):
    return (lambda images: images) if signature.with_preprocessing else partial(normalized, model)


def version_of(package):
    return importlib.metadata.version(package)


def write_stablehlo(path: Path, model: Model, signature: Signature) -> Written:
    from . import stablehlo

    stablehlo.save(path, model, **signature._asdict())
    network = stablehlo.load(path)

    def run(images):
        outputs = network(images)
        return [np.asarray(output) for output in (outputs.values() if signature.features else [outputs])]

    return Written(f"JAX {jax.__version__}, re-loaded", run, taking(model, signature))


def write_onnx(path: Path, model: Model, signature: Signature, quantization: Quantization | None = None) -> Written:
    import onnx

    from . import graph, runtime

    settings = {**signature._asdict(), "quantization": quantization, "metadata": described(model, signature)}
    onnx.save(graph.make_model(model.module, model.variables, model.info.preprocess, **settings)[0], path)
    session = runtime.load(path)

    def run(images):
        return [
            nhwc(output) for output in runtime.run(session, images if signature.with_preprocessing else nchw(images))
        ]

    called = f"ONNX Runtime {version_of('onnxruntime')}" + (", int8" if quantization else "")
    return Written(called, run, taking(model, signature))


def watch_onnx(model: Model, signature: Signature) -> Watched:
    from . import graph, runtime

    settings = {"size": signature.size, "features": signature.features}
    watched = runtime.watch(*graph.make_model(model.module, model.variables, model.info.preprocess, **settings))
    return Watched(lambda images: watched(nchw(images)), None)


def write_tflite(path: Path, model: Model, signature: Signature, quantization: Quantization | None = None) -> Written:
    from . import litert, tflite

    written = tflite.make_model(
        model,
        signature,
        quantization=quantization,
        metadata=described(model, signature),
        labels=labels_of(model.info.classes or ()),
    )
    path.write_bytes(written.content)
    kind = "" if quantization is None else ", int8 weights" if quantization.ranges is None else ", int8"
    network = litert.load(written.content)
    called = f"LiteRT {version_of('ai-edge-litert')}" + kind
    return Written(called, partial(litert.run, network), taking(model, signature))


def labels_of(classes: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of class names in a .tflite file: the classes' own, and short English ones of WNIDs."""
    names = [class_name(classes, label) for label in range(len(classes))]
    labels = {"labels.txt": list(classes), "labels_en.txt": names}
    return {file: lines for file, lines in labels.items() if lines and (file == "labels.txt" or names != list(classes))}


def watch_tflite(model: Model, signature: Signature) -> Watched:
    from . import litert, tflite

    written = tflite.make_model(model, signature._replace(batch=None, with_preprocessing=False), watched=True)
    return Watched(litert.watch(written.content, written.activations), written.groups)


def write_safetensors(path: Path, model: Model, signature: Signature) -> Written:
    from . import tensors

    tensors.save_safetensors(path, model)
    again = Model(*tensors.read_safetensors(path))
    return Written("Flax, from safetensors", lambda images: [np.asarray(last(*again.outputs(images)))], np.asarray)


def write_torch(dialect: str, path: Path, model: Model, signature: Signature) -> Written:
    from . import tensors

    tensors.save_torch(path, model, dialect)
    run = tensors.load_torch(path, model, dialect)
    return Written("PyTorch", lambda images: [last(*run(images))], partial(normalized, model))


GRAPH = frozenset({"batch", "with_preprocessing", "resolution", "features"})
FORMATS = {
    "stablehlo": Format(".stablehlo", write_stablehlo, arguments=GRAPH),
    "onnx": Format(
        ".onnx",
        write_onnx,
        packages=("onnx", "onnxruntime"),
        arguments=GRAPH | {"int8", "weight_bits"},
        watch=watch_onnx,
    ),
    "tflite": Format(
        ".tflite",
        write_tflite,
        packages=("ai_edge_litert",),
        arguments=GRAPH | {"int8"},
        batch=1,
        watch=watch_tflite,
        dynamic=True,
    ),
    "safetensors": Format(".safetensors", write_safetensors, packages=("safetensors",)),
    **{dialect: Format(f"-{dialect}.pth", partial(write_torch, dialect), packages=("torch",)) for dialect in DIALECTS},
}
