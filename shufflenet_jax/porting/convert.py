"""Conversion of PyTorch checkpoints to Flax, its verification stage by stage, and the way back."""

import io
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
from jaxtyping import Float, UInt8

from ..architecture import FEATURES, table_settings, width_of
from ..config import PREPROCESSING, ModelInfo, Preprocess
from ..data import normalization
from ..data.labels import are_imagenets, imagenet_classes
from ..errors import InputError
from ..files import path_of, read_file
from ..model import ShuffleNetV2
from ..published import PUBLISHED
from . import dialects, reference
from .torch_files import TorchFile, read

logger = logging.getLogger(__name__)

Logits = Float[jax.Array, "batch classes"] | Float[torch.Tensor, "batch classes"]

# Largest allowed differences, as shares of a stage's largest value. An operation rounds by 1e-16 in float64 and by 6e-8
# in float32. The network has some 50 layers; random weights amplify the differences, trained weights hardly do.
EXACT, TOLERANCE = 1e-9, 1e-5
NUMBER = re.compile(r"(c|cls|class|label)?[ _-]?(?P<number>[0-9]{1,9})", re.IGNORECASE)
OUTDATED = {"8860eec9": "an early model of 68.89 / 88.41; the published 69.55 / 88.92 are 20200812-5bf4721e's"}


@dataclass(frozen=True)
class Statements:
    """What the user states about a network because the file lacks it. None leaves it to the file or to a guess.

    Attributes:
      small_stem: whether the first convolution has stride 1 and no max pool follows, as for images of 16 to 64 pixels.
      preprocessing: how images are prepared: a key of config.PREPROCESSING or of dialects.DIALECTS.
      image_size: side of the square input, in pixels.
      classes: name of each label.
    """

    small_stem: bool | None = None
    preprocessing: str | None = None
    image_size: int | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
      module: the network.
      variables: {"params", "batch_stats"} of float32 NumPy arrays.
      info: description of the network, for model.json.
      dialect: whose names the file has, a key of dialects.DIALECTS.
      tensors: {the dialect's own key: the file's array}.
    """

    module: ShuffleNetV2
    variables: dialects.Variables
    info: ModelInfo
    dialect: str
    tensors: dict[str, np.ndarray]


def convert(file: TorchFile, *, dialect: str | None = None, statements: Statements = Statements()) -> Conversion:
    """Convert a checkpoint's tensors to Flax variables. Log a warning for every guess.

    Args:
      file: the checkpoint.
      dialect: the dialect that the file must have, a key of dialects.DIALECTS; None accepts any.
      statements: what the user states about the network.

    Raises:
      InputError: the tensors form no ShuffleNetV2, or contradict the arguments.
    """
    if dialect not in (None, file.dialect):
        raise InputError(f"{file.name} has the names of {file.dialect}, not of {dialect}; omit or correct `dialect`")
    rules = dialects.DIALECTS[file.dialect]
    try:
        module = dialects.module_for(file.tensors, rules)
        variables, counts = dialects.from_torch(file.tensors, rules, module)
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from error
    stated = (file.small_stem, statements.small_stem)
    module = module.clone(small_stem=bool(stated[0] if stated[1] is None else stated[1]))
    preprocess = _preprocess(statements, rules, module, file.name)
    classes, guesses = _label_names(module.num_classes, file, statements.classes)
    info = ModelInfo(
        **table_settings(module.table),
        layout=module.layout,
        num_classes=module.num_classes,
        in_chans=module.in_chans,
        small_stem=module.small_stem,
        conv5=module.conv5,
        classes=classes,
        preprocess=preprocess,
        source={"file": file.name, "sha256": file.sha256, "dialect": file.dialect, "batches_tracked": counts},
    )
    guesses += _guesses(file, statements, info)
    for note in file.notes:
        logger.info("%s", note)
    for warning in (*file.warnings, *_outdated(file), *([] if _is_published(file) else guesses)):
        logger.warning("%s", warning)
    return Conversion(module, variables, info, file.dialect, file.tensors)


def _preprocess(statements: Statements, rules: dialects.Dialect, module: ShuffleNetV2, name: str) -> Preprocess:
    """Return how images are prepared: as stated, else as the authors of the dialect prepare them."""
    stated = statements.preprocessing
    if stated is None or stated in dialects.DIALECTS:
        preprocess = (dialects.DIALECTS[stated] if stated else rules).preprocess_of(module.table)
    else:
        preprocess = PREPROCESSING[stated]
        if preprocess.channels not in (3, module.in_chans):
            raise InputError(
                f"{name} takes images of {module.in_chans} channels, but `preprocessing` {stated} makes them grey; "
                "choose another one"
            )
    preprocess = preprocess.with_channels(module.in_chans)
    side = statements.image_size or preprocess.crop
    return preprocess if side == preprocess.crop else preprocess.with_side(side)


def _label_names(
    num_classes: int, file: TorchFile, stated: tuple[str, ...] | None
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the class names and the guesses behind them: 1000 classes get ImageNet's names unless the file has names.

    Raises:
      InputError: the user states another number of classes than the classifier has.
    """
    if stated:
        if len(stated) != num_classes:
            raise InputError(
                f"`classes` names {len(stated)} classes, but the classifier of {file.name} has {num_classes}; "
                "give one name per class"
            )
        return stated, []
    named = file.classes
    numbered = num_classes == 1000 and named and all(map(_only_numbers, named, range(len(named))))
    if named and not numbered and len(named) == num_classes:
        return (tuple(imagenet_classes()) if are_imagenets(named) else named), []
    if named and num_classes and not numbered:
        return None, [
            f"{file.name} names {len(named)} classes, but its classifier has {num_classes}: the names are ignored"
        ]
    if num_classes != 1000:
        return None, []
    return tuple(imagenet_classes()), [
        f"{file.name} {'only numbers' if numbered else 'does not name'} its 1000 classes: ImageNet's names are "
        "assumed; `classes` sets others"
    ]


def _only_numbers(name: str, label: int) -> bool:
    """Whether a name only repeats the label, like c7, as in MMPretrain's ImageNet checkpoint."""
    match = NUMBER.fullmatch(name)
    return match is not None and int(match["number"]) == label


def _guesses(file: TorchFile, statements: Statements, info: ModelInfo) -> list[str]:
    """Return a sentence for each property that neither the shapes, the file nor the user determines."""
    guesses = []
    unknown_stem = file.small_stem is None and statements.small_stem is None
    if unknown_stem and file.dialect == "torchvision" and info.num_classes in (10, 100, 200):
        guesses.append(
            f"{file.name} does not say which stem it has: stride 2 and a max pool are assumed; set `small_stem` for a "
            "network for small images, like CIFAR's, which has neither"
        )
    if statements.preprocessing is None:
        height, width = info.preprocess.size
        size = "" if statements.image_size else f" at {height} x {width} pixels"
        others = "`preprocessing` changes" if statements.image_size else "`preprocessing` and `image_size` change"
        guesses.append(
            f"{file.name} does not say how its images were prepared: {file.dialect}'s preprocessing{size} is assumed; "
            f"{others} it"
        )
    return guesses


def _is_published(file: TorchFile) -> bool:
    """Whether a file is a published one, for which nothing has to be guessed."""
    return any(
        file.sha256.startswith(published.sha256) if published.sha256 else file.name == published.file
        for published in PUBLISHED.values()
    )


def _outdated(file: TorchFile) -> list[str]:
    """Return a warning if a better checkpoint replaced this published file."""
    return [
        f"{file.name} is {reason}"
        for prefix, reason in OUTDATED.items()
        if file.sha256.startswith(prefix) or prefix in file.name
    ]


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Read class names from a text file with one name per line, in the order of the labels.

    Args:
      path: the file, in UTF-8.

    Raises:
      InputError: the file cannot be read, or a line is empty or repeats another line.
    """
    try:
        lines = read_file(path_of(path)).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"class names {path} cannot be read: {error}; give one name per line") from error
    names = tuple(line.strip() for line in lines)
    if not all(names) or len(set(names)) < len(names) or not names:
        raise InputError(f"class names {path} hold an empty line or a name twice; give one name per line")
    return names


def back_to_torch(
    module: ShuffleNetV2, variables: dialects.Variables, info: ModelInfo, dialect: str
) -> dict[str, torch.Tensor]:
    """Convert a network's variables to PyTorch tensors: the inverse of `convert`, bit for bit.

    Args:
      module: the network.
      variables: {"params", "batch_stats"} of the network.
      info: description of the network.
      dialect: a key of dialects.DIALECTS, whose names the tensors get.

    Returns:
      {the dialect's own key: tensor}.

    Raises:
      InputError: the code of the dialect has no network of this layout, stem or number of input channels.
    """
    rules = dialects.DIALECTS[dialect]
    if rules.layout != module.layout:
        fitting = ", ".join(name for name, other in dialects.DIALECTS.items() if other.layout == module.layout)
        raise InputError(
            f"the network is wired like {module.layout}, but {dialect} files are wired like {rules.layout}, which "
            f"renaming the tensors cannot change; choose one of {fitting}"
        )
    if module.small_stem or module.in_chans != 3:
        special = "a stem of stride 1 without max pool" if module.small_stem else f"{module.in_chans} input channels"
        if dialect != "torchvision":
            raise InputError(f"the network has {special}, which {dialect}'s code does not support; choose torchvision")
        logger.warning(
            "the network has %s, which the file cannot state: build the network with it before you load the weights",
            special,
        )
    if width_of(module.table) is None:
        channels, repeats = map(list, module.table)
        logger.info("build the network with channels %s and repeats %s to load the file", channels, repeats)
    tensors = dialects.to_torch(variables, rules, info.source.get("batches_tracked", {}))
    return {key: torch.from_numpy(array) for key, array in tensors.items()}


def save_torch(tensors: dict[str, torch.Tensor], dialect: str, path: str | Path) -> None:
    """Write a state dict in the form of the dialect's project.

    Args:
      tensors: {the dialect's own key: tensor}.
      dialect: a key of dialects.DIALECTS.
      path: the file to write.
    """
    buffer = io.BytesIO()  # PyTorch's own writing does not report that a disk is full.
    torch.save({"meta": {}, "state_dict": tensors} if dialect == "mmpretrain" else tensors, buffer)
    Path(path).write_bytes(buffer.getbuffer())


class Row(NamedTuple):
    """The result of a verification at one stage. Differences are shares of the stage's largest value.

    Attributes:
      stage: name of the feature, or "logits".
      largest: largest absolute value of the stage.
      exact: difference between JAX and PyTorch in float64, which shows a wrong weight or operation.
      single: difference between JAX and PyTorch in float32.
      rounding: difference between float32 and float64 in PyTorch.
    """

    stage: str
    largest: float
    exact: float
    single: float
    rounding: float

    @property
    def passed(self) -> bool:
        """Whether JAX and PyTorch agree in float64 and, as closely as rounding allows, in float32; false for NaN."""
        # Both float32 results deviate from the exact value. Ours may deviate three times as much as PyTorch's.
        return self.exact <= EXACT and self.single <= max(TOLERANCE, 4 * self.rounding)


def verify(conversion: Conversion) -> list[Row]:
    """Compare the file's tensors in PyTorch with the converted variables in JAX, on the same images.

    Args:
      conversion: the converted checkpoint.

    Returns:
      A Row for each feature and, if there is a classifier, for the logits.
    """
    module = conversion.module
    images = verification_images(56 if module.small_stem else 224)[..., np.arange(module.in_chans) % 3]
    network = reference.network_like(module, conversion.dialect)
    network.load_state_dict({key: torch.from_numpy(np.array(array)) for key, array in conversion.tensors.items()})
    network.eval()

    ours: dict[str, dict[str, np.ndarray]] = {}
    theirs: dict[str, dict[str, np.ndarray]] = {}
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
        with np.errstate(invalid="ignore"):  # Damaged weights may overflow float32, and inf - inf is invalid.
            differences = (ours["float64"][stage] - exact, ours["float32"][stage] - single, single - exact)
        rows.append(Row(stage, float(largest), *(float(np.abs(values).max() / unit) for values in differences)))
    return rows


def _outputs(logits: Logits | None, features: Mapping[str, jax.Array | torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the features and logits as NumPy arrays, in the order of the network."""
    outputs = {**features, "logits": logits}
    return {name: np.asarray(outputs[name]) for name in (*FEATURES, "logits") if outputs.get(name) is not None}


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Transpose (B, C, H, W) to (B, H, W, C); leave (B, C) as it is."""
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def verification_images(side: int = 224) -> UInt8[np.ndarray, "2 side side 3"]:
    """Make two pictures of colored squares under noise, which contain all spatial frequencies; always the same ones.

    Args:
      side: height and width in pixels, a multiple of 7.
    """
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (2, 7, 7, 3)).repeat(side // 7, 1).repeat(side // 7, 2)
    return ((squares + rng.integers(0, 256, (2, side, side, 3))) // 2).astype(np.uint8)


def table(rows: Iterable[Row]) -> str:
    """Format a verification as a text table with a line per stage."""
    lines = [
        "largest differences between JAX and PyTorch, as shares of the stage's largest value",
        f"{'stage':8} {'largest':>10} {'float64':>10} {'float32':>10}   PyTorch's own float32 rounding",
    ]
    for row in rows:
        numbers = f"{row.stage:8} {row.largest:10.4g} {row.exact:10.1e} {row.single:10.1e} {row.rounding:10.1e}"
        lines.append(numbers if row.passed else f"{numbers}  <- differs")
    return "\n".join(lines)


def verified(path: str | Path, *, ema: bool) -> Conversion:
    """Convert and verify a PyTorch checkpoint.

    Args:
      path: the file.
      ema: take the averaged weights that the training kept beside the others.

    Raises:
      InputError: the file cannot be read, or JAX and PyTorch compute different outputs from it.
    """
    conversion = convert(read(path, ema=ema))
    rows = verify(conversion)
    if not all(row.passed for row in rows):
        raise InputError(
            f"{path} gives different outputs in JAX and PyTorch, so its weights may be damaged; fetch it again:\n"
            f"{table(rows)}"
        )
    return conversion
