"""A published PyTorch checkpoint becomes a model directory: read without running code, recognised, converted, proven.

Files: legacy and zip, MMPretrain 0.x and 1.x, torchvision, Megvii, ericsun99.
"""

import sys
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
import torch

from .. import checkpoint
from ..architecture import FEATURES
from ..config import ModelInfo
from ..data import normalization
from ..data.labels import imagenet_classes
from ..errors import InputError
from ..files import hash_of, path_of
from . import dialects, reference

# Shares of a stage's largest value. float64 rounds 1e-16 an operation, float32 6e-8, some 50 layers deep; random
# weights amplify that, trained ones hardly.
EXACT, TOLERANCE = 1e-9, 1e-5
OUTDATED = {"8860eec9": "an early model of 68.89 / 88.41; the published 69.55 / 88.92 are 20200812-5bf4721e's"}


class Inert:
    """Stands in for the training history that MMPretrain 1.x pickles beside the weights; does nothing."""

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

    tensors: dict  # {key: NumPy array}
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
    path = path_of(path)
    sha256 = hash_of(path)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in STAND_INS]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What PyTorch warns of ends in the errors below.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files raise almost anything.
        if "Unsupported" in str(error) or "blocked" in str(error):
            told = "holds objects that are not tensors, which could run code; it was not loaded"
        else:
            told = "is damaged or not a PyTorch file; fetch it again"
        raise InputError(f"checkpoint {path} {told}") from error

    tensors, meta = _unwrap(content, path, ema=ema)
    if not tensors or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()):
        raise InputError(f"checkpoint {path} holds no state dict: no table of names and tensors; give one that does")
    try:
        arrays = {key: _numpy(value) for key, value in tensors.items()}
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"checkpoint {path} holds sparse, quantised, expanded or empty tensors; store plain ones"
        ) from error
    return TorchFile(arrays, _classes(meta), path.name, sha256)


def _unwrap(content, path, *, ema):
    """The state dict inside a training file, and MMPretrain's `meta`."""
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict; give one that does")
    if ema:
        averaged = next((content[key] for key in ("ema_state_dict", "model_ema") if key in content), None)
        if not isinstance(averaged, dict):
            raise InputError(f"checkpoint {path} holds no averaged weights; leave `ema` out")
        # The averaging itself counts its updates beside the weights.
        tensors = {key: value for key, value in averaged.items() if key not in ("steps", "n_averaged")}
    else:
        tensors = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    meta = content.get("meta")
    return tensors, meta if isinstance(meta, dict) else {}


def _classes(meta):
    """Class names in MMPretrain's spelling of 0.x or 1.x."""
    dataset = meta.get("dataset_meta")
    names = meta.get("CLASSES", dataset.get("classes") if isinstance(dataset, dict) else None)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else None


def _numpy(tensor):
    """Half types widened, which loses nothing. Raises TypeError where a few stored numbers stand for many."""
    tensor = tensor.detach()
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise TypeError("expanded")
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


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
        raise InputError(f"{file.name} speaks {spoken}, not {dialect}; leave `dialect` out or correct it")
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
        preprocess=rules.preprocess_of(module.width),
        source={"file": file.name, "sha256": file.sha256, "dialect": spoken, "batches_tracked": counts},
    )
    return Conversion(module, variables, info, spoken, tensors)


def _label_names(num_classes, named):
    if num_classes == 1000:  # ImageNet, whatever a file may call its classes.
        return tuple(imagenet_classes())
    return named if named and len(named) == num_classes else None


def back_to_torch(module, variables, info, dialect):
    """{key: tensor} of a network in a dialect: what was converted comes back bit for bit.

    Raises:
      InputError: the network is wired in another way than the dialect's.
    """
    rules = dialects.DIALECTS[dialect]
    if module.small_stem or module.in_chans != 3:
        raise InputError(f"the network has a stem of its own, which {dialect}'s code does not know; it stays in JAX")
    if rules.layout != module.layout:
        fitting = ", ".join(name for name, other in dialects.DIALECTS.items() if other.layout == module.layout)
        raise InputError(
            f"the network is wired like {module.layout}, {dialect} files like {rules.layout}: "
            f"no renaming turns one into the other; choose one of {fitting}"
        )
    tensors = dialects.to_torch(variables, rules, info.source.get("batches_tracked", {}))
    return {key: torch.from_numpy(array) for key, array in tensors.items()}


def save_torch(tensors, dialect, path):
    """Writes a state dict as the dialect's project does."""
    torch.save({"meta": {}, "state_dict": tensors} if dialect == "mmpretrain" else tensors, path)


class Row(NamedTuple):
    """What a verification found at one stage; differences are shares of the stage's largest value."""

    stage: str
    largest: float
    exact: float  # Between JAX and PyTorch, both in float64: a wrong weight or operation shows here.
    single: float  # The same in float32.
    rounding: float  # Between PyTorch's own float32 and float64.

    @property
    def passed(self):
        """Equal where rounding cannot hide a mistake, and in float32 as near as float32 allows; NaN is neither."""
        # Ours and theirs both stray from the exact value; ours may stray three times as far.
        return self.exact <= EXACT and self.single <= max(TOLERANCE, 4 * self.rounding)


def verify(conversion):
    """Runs the file's tensors in PyTorch, under their own names, and the converted ones in JAX, on the same images.

    Returns:
      A Row for each feature and, where there is a classifier, the logits.
    """
    module, images = conversion.module, test_images()
    network = reference.NETWORKS[conversion.dialect](module.width, module.num_classes, conv5=module.conv5)
    network.load_state_dict({key: torch.from_numpy(np.array(array)) for key, array in conversion.tensors.items()})
    network.eval()

    ours, theirs = {}, {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            inputs = np.asarray(normalization.normalize(images, conversion.info.preprocess, dtype))
            ours[dtype] = _outputs(*jax.jit(module.clone(dtype=dtype).apply)(conversion.variables, inputs))
        with torch.no_grad():
            channels_first = torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy())
            theirs[dtype] = _outputs(*network.to(channels_first.dtype)(channels_first))
    rows = []
    for stage, exact in theirs["float64"].items():
        exact = _channels_last(exact)
        single, largest = _channels_last(theirs["float32"][stage]), np.abs(exact).max()
        unit = largest or 1.0
        with np.errstate(invalid="ignore"):  # Damaged weights may overflow float32; infinities have no difference.
            differences = (ours["float64"][stage] - exact, ours["float32"][stage] - single, single - exact)
        rows.append(Row(stage, largest, *(np.abs(difference).max() / unit for difference in differences)))
    return rows


def _outputs(logits, features):
    outputs = {**features, "logits": logits}
    return {name: np.asarray(outputs[name]) for name in (*FEATURES, "logits") if outputs.get(name) is not None}


def _channels_last(array):
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def test_images():
    """Two seeded pictures, uint8 (2, 224, 224, 3): coloured squares under noise, so that all frequencies occur."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (2, 7, 7, 3)).repeat(32, 1).repeat(32, 2)
    return ((squares + rng.integers(0, 256, (2, 224, 224, 3))) // 2).astype(np.uint8)


def table(rows):
    """A verification as text, a line a stage."""
    lines = [
        "largest differences between JAX and PyTorch, as shares of the stage's largest value",
        f"{'stage':8} {'largest':>10} {'float64':>10} {'float32':>10}   PyTorch's own float32 rounding",
    ]
    for row in rows:
        numbers = f"{row.stage:8} {row.largest:10.4g} {row.exact:10.1e} {row.single:10.1e} {row.rounding:10.1e}"
        lines.append(numbers if row.passed else f"{numbers}  <- differs")
    return "\n".join(lines)


def into_cache(path, directory, *, ema):
    """Converts a .pth file, verifies it and leaves the model directory."""
    conversion = convert(read(path, ema=ema))
    rows = verify(conversion)
    if not all(row.passed for row in rows):
        raise InputError(f"{path} gives other numbers in JAX than in PyTorch:\n{table(rows)}")
    checkpoint.save_model(directory, conversion.info, conversion.variables, overwrite=True)


def warn_if_outdated(file):
    """Says so on stderr when a better file of the same name has been published since."""
    for prefix, reason in OUTDATED.items():
        if file.sha256.startswith(prefix) or prefix in file.name:
            print(f"warning: {file.name} is {reason}", file=sys.stderr)
