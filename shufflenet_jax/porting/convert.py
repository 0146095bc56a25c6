"""A published PyTorch checkpoint becomes a model directory: read without running code, recognised, converted, proven.

Files: legacy and zip, MMPretrain 0.x and 1.x, torchvision, Megvii, ericsun99.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import torch

from .. import checkpoint
from ..cli import cache_dir
from ..config import ModelInfo
from ..data import transforms
from ..data.labels import imagenet_classes
from ..errors import InputError
from ..model import FEATURES
from . import dialects, reference

TOLERANCE = 1e-5  # Of the largest value of a stage: float32 rounds 6e-8 an operation, some 50 layers deep.
OUTDATED = {"8860eec9": "an early model of 68.89 / 88.41; the published 69.55 / 88.92 are 20200812-5bf4721e's"}


class Inert:
    """Stands in for the training history that MMPretrain 1.x pickles beside the weights: takes anything, does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        pass


# What MMEngine's message hub holds. None of the real objects is imported, not even `getattr`.
STAND_INS = [
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.config.config.ConfigDict",
    "builtins.getattr",
    "collections.deque",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.dtypes.{name}DType" for name in ("Float32", "Float64", "Int32", "Int64", "Bool")),
]


@dataclass(frozen=True)
class TorchFile:
    """What a checkpoint file holds that matters here."""

    tensors: dict  # {key: float32 or integer NumPy array}
    classes: tuple | None  # Class names, where the file gives them.
    name: str
    sha256: str


def read(path, *, ema=False):
    """Reads a PyTorch checkpoint; nothing in it is run.

    Args:
      path: the file.
      ema: take the averaged weights which the training kept beside the others.
    Raises:
      InputError: the file is missing, damaged, no checkpoint, or would have to run code.
    """
    path = Path(path).expanduser()
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror}; check the path") from error
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in STAND_INS]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files raise almost anything.
        if "Unsupported" in str(error) or "blocked" in str(error):
            told = "holds objects that are not tensors, which could run code; it was not loaded"
        else:
            told = "is damaged or not a PyTorch file; fetch it again"
        raise InputError(f"checkpoint {path} {told}") from error

    tensors, meta = _unwrap(content, path, ema=ema)
    if any(not isinstance(value, torch.Tensor) for value in tensors.values()) or not tensors:
        raise InputError(f"checkpoint {path} holds no state dict: no table of names and tensors; give one that does")
    return TorchFile({key: _numpy(value) for key, value in tensors.items()}, _classes(meta), path.name, sha256)


def _unwrap(content, path, *, ema):
    """The state dict inside a training file, and MMPretrain's `meta`."""
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict; give one that does")
    if ema:
        averaged = next((content[key] for key in ("ema_state_dict", "model_ema") if key in content), None)
        if not isinstance(averaged, dict):
            raise InputError(f"checkpoint {path} holds no averaged weights; leave --ema out")
        # The averaging itself counts its updates beside the weights.
        tensors = {key: value for key, value in averaged.items() if key not in ("steps", "n_averaged")}
    else:
        tensors = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    meta = content.get("meta")
    return tensors, meta if isinstance(meta, dict) else {}


def _classes(meta):
    """Class names in MMPretrain's spelling of 0.x or 1.x."""
    dataset = meta.get("dataset_meta")
    names = meta.get("CLASSES") or (dataset.get("classes") if isinstance(dataset, dict) else None)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else None


def _numpy(tensor):
    """Half types widened, which loses nothing."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint: the network, its variables, and what is known of them."""

    module: object
    variables: dict
    info: ModelInfo
    dialect: str
    tensors: dict  # As in the file, under the dialect's own keys.


def convert(file, *, dialect=None):
    """Maps a checkpoint's tensors to Flax variables.

    Args:
      file: a TorchFile.
      dialect: a name from dialects.DIALECTS to insist on; by default whichever fits.
    Raises:
      InputError: it is not a ShuffleNetV2, another dialect, or incomplete.
    """
    spoken = dialects.recognize(file.tensors)
    if dialect not in (None, spoken):
        raise InputError(f"{file.name} speaks {spoken}, not {dialect}; leave --dialect out or correct it")
    rules = dialects.DIALECTS[spoken]
    tensors = dialects.canonical(file.tensors, rules)
    module = dialects.module_for(tensors, rules)
    try:
        variables, counts = dialects.from_torch(tensors, rules, module)
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from error
    info = ModelInfo(
        width=module.width,
        layout=module.layout,
        num_classes=module.num_classes,
        conv5=module.conv5,
        classes=_label_names(module.num_classes, file.classes),
        preprocess=rules.preprocess.get(module.width, rules.preprocess[None]),
        source={"file": file.name, "sha256": file.sha256, "dialect": spoken, "batches_tracked": counts},
    )
    return Conversion(module, variables, info, spoken, tensors)


def _label_names(num_classes, named):
    if num_classes == 1000:  # ImageNet, whatever a file may call its classes.
        return tuple(imagenet_classes())
    return named if named and len(named) == num_classes else None


def back_to_torch(directory, dialect):
    """{key: tensor} of a model directory in a dialect: what was converted comes back bit for bit.

    Raises:
      InputError: the network is wired in another way than the dialect's.
    """
    module, variables, info = checkpoint.load_model(directory)
    rules = dialects.DIALECTS[dialect]
    if rules.layout != module.layout:
        raise InputError(
            f"{directory} is wired like {module.layout}, {dialect} files like {rules.layout}: "
            "no renaming turns one into the other; choose another --dialect"
        )
    counts = info.source.get("batches_tracked", {})
    tensors = dialects.to_torch(variables, rules, counts)
    return {key: torch.from_numpy(array) for key, array in tensors.items()}


def verify(conversion):
    """Runs the file's tensors in PyTorch, under their own names, and the converted ones in JAX, on the same images.

    Returns:
      [(stage, largest difference, largest value)] over the features and, where there is a classifier, the logits.
    """
    module, info = conversion.module, conversion.info
    network = reference.NETWORKS[conversion.dialect](module.width, module.num_classes, conv5=module.conv5)
    network.load_state_dict({key: torch.from_numpy(np.array(array)) for key, array in conversion.tensors.items()})
    network.eval()

    inputs = np.asarray(transforms.normalize(test_images(), info.preprocess))
    with jax.default_matmul_precision("highest"):
        logits, features = jax.jit(module.apply)(conversion.variables, inputs)
    with torch.no_grad():
        expected_logits, expected = network(torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy()))
    rows = []
    for name in FEATURES:
        if name in expected:
            theirs = expected[name].numpy()
            theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
            rows.append(_difference(name, np.asarray(features[name]), theirs))
    if expected_logits is not None:
        rows.append(_difference("logits", np.asarray(logits), expected_logits.numpy()))
    return rows


def _difference(name, ours, theirs):
    return name, float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())


def test_images():
    """Two seeded pictures, uint8 (2, 224, 224, 3): coloured squares under noise, so that all frequencies occur."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (2, 7, 7, 3)).repeat(32, 1).repeat(32, 2)
    return ((squares + rng.integers(0, 256, (2, 224, 224, 3))) // 2).astype(np.uint8)


def passed(rows):
    """Whether a verification is within tolerance everywhere; NaN is not."""
    return all(difference <= TOLERANCE * largest for _, difference, largest in rows)


def table(rows):
    """A verification as text, a line a stage."""
    lines = [f"{'stage':8} {'largest value':>14} {'difference':>12} {'relative':>10}"]
    for name, difference, largest in rows:
        relative = difference / largest if largest else difference
        mark = "" if difference <= TOLERANCE * largest else f"  over {TOLERANCE:g}"
        lines.append(f"{name:8} {largest:14.6g} {difference:12.3g} {relative:10.2e}{mark}")
    return "\n".join(lines)


def cached(path):
    """The model directory of a .pth file in the cache; converted, and verified, on first use."""
    file = read(path)
    directory = cache_dir() / "converted" / f"{Path(path).stem}-{file.sha256[:16]}"
    if not directory.exists():
        conversion = convert(file)
        rows = verify(conversion)
        if not passed(rows):
            raise InputError(f"{path} gives other numbers in JAX than in PyTorch:\n{table(rows)}")
        checkpoint.save_model(directory, conversion.info, conversion.variables, overwrite=True)
    return directory


def warn_if_outdated(file):
    """Says so on stderr when a better file of the same name has been published since."""
    for prefix, reason in OUTDATED.items():
        if file.sha256.startswith(prefix) or prefix in file.name:
            print(f"warning: {file.name} is {reason}", file=sys.stderr)
