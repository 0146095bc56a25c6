"""The formats of `export`, one entry of a table each: how to write a file, and how to run it for comparison."""

import importlib.metadata
import io
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ..data import normalization
from ..data.labels import class_name
from ..inference import Model
from ..porting.dialects import DIALECTS
from . import browser
from .agreement import Outputs, example_pictures, last, nchw, nhwc
from .network import Signature, outputs_of
from .quantization import Quantization
from .tensors import metadata_of

logger = logging.getLogger(__name__)

MOST_PIXEL_DIFFERENCE = 1  # Of 255, between a browser's preparation of a photograph and ours: one rounding.
Pixels = UInt8[np.ndarray, "batch height width channels"]


class Written(NamedTuple):
    """A file that is loaded again.

    Attributes:
      called: name of the runtime.
      run: function from the file's input to its outputs, channels last.
      takes: function from uint8 images (B, H, W, C) to the file's input, channels last.
      close: ends the runtime.
    """

    called: str
    run: Callable[[np.ndarray], Outputs]
    takes: Callable[[np.ndarray], np.ndarray]
    close: Callable[[], None] = lambda: None

    def __call__(self, images: np.ndarray) -> Outputs:
        """Return the outputs for uint8 images (B, H, W, C)."""
        return self.run(self.takes(images))


class Watched(NamedTuple):
    """A network with visible activations, to choose ranges for 8 bits.

    Attributes:
      watch: function from normalized images (B, H, W, C) to all activations.
      groups: {activation: the group whose range it shares}; None means that none share.
    """

    watch: Callable[[np.ndarray], dict[str, np.ndarray]]
    groups: dict[str, str] | None


class Format(NamedTuple):
    """A format of files.

    Attributes:
      ending: of the file's name.
      write: function of (path, model, signature), for 8 bits a Quantization, and its `settings`.
      packages: required packages of extras, see installation.py.
      arguments: those of `export` that not all formats take.
      settings: those arguments that `write` takes by their names.
      folder: whether it is a folder of files.
      batch: default number of images per call; None means any number.
      watch: function that returns a Watched, for 8 bits with ranges.
      dynamic: whether it also has 8 bits without ranges.
    """

    ending: str
    write: Callable[..., Written]
    packages: tuple[str, ...] = ()
    arguments: frozenset[str] = frozenset()
    settings: tuple[str, ...] = ()
    folder: bool = False
    batch: int | None = None
    watch: Callable[[Model, Signature], Watched] | None = None
    dynamic: bool = False


def run_ours(model: Model, signature: Signature, images: Pixels) -> Outputs:
    """Return the outputs of our network in the order of an exported file.

    Args:
      model: the network.
      signature: of the file.
      images: uint8 (B, H, W, C).
    """
    logits, features = model.outputs(images)
    outputs = {**features, "logits": logits}
    return [np.asarray(outputs[name]) for name in outputs_of(model.module, features=signature.features)]


def normalized(model: Model, images: Pixels) -> Float[np.ndarray, "batch height width channels"]:
    """Normalize images as the network takes them.

    Args:
      model: the network.
      images: uint8 (B, H, W, C).
    """
    return np.asarray(normalization.normalize(images, model.info.preprocess))


def described(model: Model, signature: Signature) -> dict[str, str]:
    """Return the contents of model.json, and a chosen size of the images, as {name: JSON text}.

    Args:
      model: the network.
      signature: of the file.
    """
    height_width = {"resolution": f"[{signature.size[0]}, {signature.size[1]}]"} if signature.size else {}
    return {**metadata_of(model.info), **height_width}


def taking(model: Model, signature: Signature) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from uint8 images to a file's input.

    Args:
      model: the network.
      signature: of the file.
    """
    return (lambda images: images) if signature.with_preprocessing else partial(normalized, model)


def version_of(package: str) -> str:
    """Return the version of an installed package.

    Args:
      package: its name.
    """
    return importlib.metadata.version(package)


def write_stablehlo(path: Path, model: Model, signature: Signature) -> Written:
    """Write a StableHLO file.

    Args:
      path: of the file.
      model: the network.
      signature: its input and outputs.
    """
    from . import stablehlo

    stablehlo.save(path, model, **signature._asdict())
    network = stablehlo.load(path)

    def run(images: np.ndarray) -> Outputs:
        outputs = network(images)
        return [np.asarray(output) for output in (outputs.values() if isinstance(outputs, dict) else [outputs])]

    return Written(f"JAX {jax.__version__}, re-loaded", run, taking(model, signature))


def write_onnx(path: Path, model: Model, signature: Signature, quantization: Quantization | None = None) -> Written:
    """Write an ONNX file.

    Args:
      path: of the file.
      model: the network.
      signature: its input and outputs.
      quantization: how to compute in 8 bits; None computes in float32.
    """
    import onnx

    from . import graph, runtime

    settings: dict[str, Any] = {**signature._asdict(), "quantization": quantization}
    settings["metadata"] = described(model, signature)
    onnx.save(graph.make_model(model.module, model.variables, model.info.preprocess, **settings)[0], path)
    session = runtime.load(path)

    def run(images: np.ndarray) -> Outputs:
        return [
            nhwc(output) for output in runtime.run(session, images if signature.with_preprocessing else nchw(images))
        ]

    called = f"ONNX Runtime {version_of('onnxruntime')}" + (", int8" if quantization else "")
    return Written(called, run, taking(model, signature))


def watch_onnx(model: Model, signature: Signature) -> Watched:
    """Return the network in ONNX with visible activations.

    Args:
      model: the network.
      signature: of the file to write.
    """
    from . import graph, runtime

    settings: dict[str, Any] = {"size": signature.size, "features": signature.features}
    watched = runtime.watch(*graph.make_model(model.module, model.variables, model.info.preprocess, **settings))
    return Watched(lambda images: watched(nchw(images)), None)


def write_tflite(path: Path, model: Model, signature: Signature, quantization: Quantization | None = None) -> Written:
    """Write a .tflite file.

    Args:
      path: of the file.
      model: the network.
      signature: its input and outputs.
      quantization: how to compute in 8 bits; None computes in float32.
    """
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
    """Return the files of class names in a .tflite file: the classes' own, and short English ones of WNIDs.

    Args:
      classes: names of the classes.
    """
    names = [class_name(classes, label) for label in range(len(classes))]
    labels = {"labels.txt": list(classes), "labels_en.txt": names}
    return {file: lines for file, lines in labels.items() if lines and (file == "labels.txt" or names != list(classes))}


def watch_tflite(model: Model, signature: Signature) -> Watched:
    """Return the network in TFLite with visible activations.

    Args:
      model: the network.
      signature: of the file to write.
    """
    from . import litert, tflite

    written = tflite.make_model(model, signature._replace(batch=None, with_preprocessing=False), watched=True)
    return Watched(litert.watch(written.content, written.activations), written.groups)


def write_web(
    path: Path, model: Model, signature: Signature, *, runtime: Path | None = None, single_file: bool = False
) -> Written:
    """Write a page that classifies pictures in the browser.

    Args:
      path: of the page, or of its folder.
      model: the network.
      signature: its input and outputs.
      runtime: package of onnxruntime-web; None downloads the files.
      single_file: whether the page is one file.
    """
    from . import graph, web
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
        require_same_pixels(model, page)
        return Written(f"{web.RUNTIME} in {browser.version()}", page.logits, np.asarray, page.close)
    logger.warning("there is no Chromium here to compare the page; only its network is compared, in ONNX Runtime")
    session = onnx_runtime.load(network)
    run = partial(onnx_runtime.run, session)
    one_by_one = lambda images: [np.concatenate([run(image[None])[0] for image in images])]  # noqa: E731
    return Written(f"ONNX Runtime {version_of('onnxruntime')}", one_by_one, np.asarray)


def require_same_pixels(model: Model, page: "browser.Page") -> None:
    """Raise BrowserError if a page prepares photographs in another way than we do.

    Args:
      model: the network.
      page: in Chromium.
    """
    for name, picture in example_pictures().items():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        ours = model.preprocess(picture)
        try:
            theirs = page.prepared(file.getvalue()).reshape(ours.shape)
            difference = int(np.abs(theirs.astype(int) - ours).max())
        except browser.BrowserError:
            page.close()
            raise
        if difference > MOST_PIXEL_DIFFERENCE:
            page.close()
            raise browser.BrowserError(f"the page prepares {name} differently, by up to {difference} of 255")


def write_safetensors(path: Path, model: Model, _: Signature) -> Written:
    """Write the weights as a safetensors file.

    Args:
      path: of the file.
      model: the network.
    """
    from . import tensors

    tensors.save_safetensors(path, model)
    again = Model(*tensors.read_safetensors(path))
    return Written("Flax, from safetensors", lambda images: [np.asarray(last(*again.outputs(images)))], np.asarray)


def write_torch(dialect: str, path: Path, model: Model, _: Signature) -> Written:
    """Write the weights as a PyTorch file.

    Args:
      dialect: whose names it has.
      path: of the file.
      model: the network.
    """
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
