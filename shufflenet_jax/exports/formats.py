"""The formats of `export`, one entry of a table each: how a file is written, and run again to be compared."""

import importlib.metadata
import io
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from ..data import normalization
from ..data.labels import class_name
from ..inference import Model
from ..porting.dialects import DIALECTS
from .agreement import example_pictures, last, nchw, nhwc
from .network import Signature, outputs_of
from .quantization import Quantization
from .tensors import metadata_of

logger = logging.getLogger(__name__)

MOST_PIXEL_DIFFERENCE = 1  # Of 255, between a browser's preparation of a photograph and ours: one rounding.
Outputs = Sequence[np.ndarray]


class Written(NamedTuple):
    """A file that is loaded again."""

    called: str  # The runtime.
    run: Callable[[np.ndarray], Outputs]  # Outputs, channels last, of what the file takes, channels last.
    takes: Callable[[np.ndarray], np.ndarray]  # What the file takes, of uint8 images (B, H, W, C).
    close: Callable[[], None] = lambda: None  # Ends what runs it.

    def __call__(self, images: np.ndarray) -> Outputs:
        return self.run(self.takes(images))


class Watched(NamedTuple):
    """A network whose activations can be seen, to choose ranges for 8 bits."""

    watch: Callable[[np.ndarray], dict[str, np.ndarray]]  # All activations of normalized images (B, H, W, C).
    groups: dict[str, str] | None  # {activation: the group whose range it shares}.


class Format(NamedTuple):
    """What there is to know of a format."""

    ending: str  # Of the file's name.
    write: Callable[..., Written]  # Of (path, model, signature), with 8 bits a Quantization, and its `settings`.
    packages: tuple[str, ...] = ()  # Of extras, that must be installed: see installation.py.
    arguments: frozenset[str] = frozenset()  # Of `export`, that not all formats take.
    settings: tuple[str, ...] = ()  # Those arguments that `write` takes by their names.
    folder: bool = False  # Whether it is a folder of files.
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


def write_web(
    path: Path, model: Model, signature: Signature, *, runtime: Path | None = None, single_file: bool = False
) -> Written:
    from . import browser, graph, web
    from . import runtime as onnx_runtime

    web.require_classifier(model)
    contents = web.runtime_files(runtime)
    settings = signature._replace(batch=1, with_preprocessing=True)._asdict()
    network, _ = graph.make_model(
        model.module, model.variables, model.info.preprocess, **settings, metadata=described(model, signature)
    )
    contents["network"] = network.SerializeToString()
    html = web.page_of(model, signature, contents, single=single_file)
    web.write_page(path, html, contents, single=single_file)
    if browser.find():
        page = browser.Page(path)
        require_same_pixels(model, signature, page)
        return Written(f"{web.RUNTIME} in {browser.version()}", page.logits, np.asarray, page.close)
    logger.warning(
        "there is no Chromium here, in which the page would be compared; its network is compared in ONNX Runtime alone"
    )
    session = onnx_runtime.load(network)
    run = partial(onnx_runtime.run, session)
    one_by_one = lambda images: [np.concatenate([run(image[None])[0] for image in images])]  # noqa: E731
    return Written(f"ONNX Runtime {version_of('onnxruntime')}", one_by_one, np.asarray)


def require_same_pixels(model: Model, signature: Signature, page: Any) -> None:
    """Raise BrowserError if a page prepares photographs in another way than we do."""
    from .browser import BrowserError

    for name, picture in example_pictures().items():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        ours = model.preprocess(picture)
        try:
            theirs = page.prepared(file.getvalue()).reshape(ours.shape)
            difference = int(np.abs(theirs.astype(int) - ours).max())
        except BrowserError:
            page.close()
            raise
        if difference > MOST_PIXEL_DIFFERENCE:
            page.close()
            raise BrowserError(f"the page prepares {name} otherwise, by up to {difference} of 255")


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
    "web": Format(
        "-web",
        write_web,
        packages=("onnx", "onnxruntime"),
        arguments=frozenset({"resolution", "runtime", "single_file"}),
        settings=("runtime", "single_file"),
        folder=True,
    ),
    "safetensors": Format(".safetensors", write_safetensors),
    **{dialect: Format(f"-{dialect}.pth", partial(write_torch, dialect), packages=("torch",)) for dialect in DIALECTS},
}
