"""A PyTorch checkpoint becomes a model directory: mapped to Flax and compared with PyTorch stage by stage; and back."""

import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch

from ..architecture import FEATURES, table_settings, width_of
from ..config import PREPROCESSING, ModelInfo, Preprocess
from ..data import normalization
from ..data.labels import imagenet_classes
from ..errors import InputError
from ..files import path_of, read_file
from ..model import ShuffleNetV2
from ..published import PUBLISHED
from . import dialects, reference
from .torch_files import TorchFile, read

logger = logging.getLogger(__name__)

# Shares of a stage's largest value. float64 rounds 1e-16 an operation, float32 6e-8, some 50 layers deep; random
# weights amplify that, trained ones hardly.
EXACT, TOLERANCE = 1e-9, 1e-5
NUMBER = re.compile(r"(c|cls|class|label)?[ _-]?(?P<number>[0-9]{1,9})", re.IGNORECASE)
OUTDATED = {"8860eec9": "an early model of 68.89 / 88.41; the published 69.55 / 88.92 are 20200812-5bf4721e's"}


@dataclass(frozen=True)
class Statements:
    """What its user says of a network, because its file does not: None leaves it to the file, or to a guess.

    Attributes:
      small_stem: whether the first convolution has stride 1 and no max pool follows, as for images of 16 to 64 pixels.
      preprocessing: whose way to prepare images, a name of config.PREPROCESSING.
      image_size: side of the square input, in pixels.
      classes: name of each label.
    """

    small_stem: bool | None = None
    preprocessing: str | None = None
    image_size: int | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint: the network, its variables, and what is known of them."""

    module: object
    variables: dict
    info: ModelInfo
    dialect: str
    tensors: dict  # As in the file, under the dialect's own keys.


def convert(file: TorchFile, *, dialect: str | None = None, statements: Statements = Statements()) -> Conversion:
    """Map a checkpoint's tensors to Flax variables; say in warnings what neither the file nor its user says.

    Args:
      file: a TorchFile.
      dialect: a name from dialects.DIALECTS to insist on; by default whichever fits.
      statements: what the user says of the network.
    Raises:
      InputError: it is not a ShuffleNetV2, another dialect, incomplete, or not as its user says.
    """
    if dialect not in (None, file.dialect):
        raise InputError(f"{file.name} speaks {file.dialect}, not {dialect}; leave `dialect` out or correct it")
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
    """Return how images are prepared: as stated, else as the dialect's authors do."""
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
    return (
        preprocess.with_side(side)
        if (side := statements.image_size or preprocess.crop) != preprocess.crop
        else preprocess
    )


def _label_names(
    num_classes: int, file: TorchFile, stated: tuple[str, ...] | None
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the class names, and what was guessed: those of ImageNet where nothing speaks against them."""
    if stated:
        if len(stated) != num_classes:
            raise InputError(f"`classes` names {len(stated)}, but the classifier of {file.name} has {num_classes}")
        return stated, []
    named = file.classes
    numbered = num_classes == 1000 and named and all(map(_only_numbers, named, range(len(named))))
    if named and not numbered and len(named) == num_classes:
        return (tuple(imagenet_classes()) if _are_imagenets(named) else named), []
    if named and num_classes and not numbered:
        return None, [
            f"{file.name} names {len(named)} classes, but its classifier has {num_classes}; they stay unnamed"
        ]
    if num_classes != 1000:
        return None, []
    return tuple(imagenet_classes()), [
        f"{file.name} {'only numbers' if numbered else 'names none of'} its 1000 classes: ImageNet's names are "
        "assumed; `classes` gives others"
    ]


def _only_numbers(name: str, label: int) -> bool:
    """Whether a name only repeats the label, like c7: MMPretrain's file of ImageNet has these."""
    found = NUMBER.fullmatch(name)
    return found is not None and int(found["number"]) == label


def _are_imagenets(names: tuple[str, ...]) -> bool:
    """Whether 1000 names are ImageNet's in their order, in one of their spellings."""
    spelled = [(_plain(name), _plain(ours)) for name, ours in zip(names, imagenet_classes().values(), strict=False)]
    return len(names) == 1000 and sum(name == ours for name, ours in spelled) > 500


def _plain(name: str) -> str:
    """Return the first word of a class name's synonyms in one spelling."""
    return name.partition(",")[0].replace("_", " ").strip().casefold()


def _guesses(file: TorchFile, statements: Statements, info: ModelInfo) -> list[str]:
    """Return what shapes do not show, a sentence each, unless the file or its user says it."""
    guesses = []
    unknown_stem = file.small_stem is None and statements.small_stem is None
    if unknown_stem and file.dialect == "torchvision" and info.num_classes in (10, 100, 200):
        guesses.append(
            f"{file.name} does not say which stem it has: stride 2 and a max pool are assumed; networks for small "
            f"images, like CIFAR's, have neither: convert those with `small_stem`"
        )
    if statements.preprocessing is None:
        side = info.preprocess.crop
        size = "" if statements.image_size else f" at {side} x {side} pixels"
        others = "`preprocessing` changes" if statements.image_size else "`preprocessing` and `image_size` change"
        guesses.append(
            f"{file.name} does not say how its images were prepared: normalized as {file.dialect} does{size} is "
            f"assumed; {others} it"
        )
    return guesses


def _is_published(file: TorchFile) -> bool:
    """Whether a file is one of those published, of which everything is known."""
    return any(
        file.sha256.startswith(published.sha256) if published.sha256 else file.name == published.file
        for published in PUBLISHED.values()
    )


def _outdated(file: TorchFile) -> list[str]:
    """Return a warning where a better file of the same name has been published since."""
    return [
        f"{file.name} is {reason}"
        for prefix, reason in OUTDATED.items()
        if file.sha256.startswith(prefix) or prefix in file.name
    ]


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Read class names from a text file, a name a line, in the order of the labels.

    Raises:
      InputError: it cannot be read, or a line is empty or repeats another one.
    """
    try:
        lines = read_file(path_of(path)).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"class names {path} cannot be read: {error}; give a name a line") from error
    names = tuple(line.strip() for line in lines)
    if not all(names) or len(set(names)) < len(names) or not names:
        raise InputError(f"class names {path} hold an empty line or a name twice; give one name a line")
    return names


def back_to_torch(module, variables, info, dialect):
    """{key: tensor} of a network in a dialect: what was converted comes back bit for bit.

    Raises:
      InputError: the network is wired in another way than the dialect's.
    """
    rules = dialects.DIALECTS[dialect]
    if rules.layout != module.layout:
        fitting = ", ".join(name for name, other in dialects.DIALECTS.items() if other.layout == module.layout)
        raise InputError(
            f"the network is wired like {module.layout}, {dialect} files like {rules.layout}: "
            f"no renaming turns one into the other; choose one of {fitting}"
        )
    if module.small_stem or module.in_chans != 3:
        own = "a stem of stride 1 without max pool" if module.small_stem else f"{module.in_chans} input channels"
        if dialect != "torchvision":
            raise InputError(f"the network has {own}, which {dialect}'s code does not know; choose torchvision")
        logger.warning("the network has %s, which the file cannot say: build it so before you load the weights", own)
    if width_of(module.table) is None:
        channels, repeats = map(list, module.table)
        logger.info("the file fits a network of channels %s and repeats %s: build it so first", channels, repeats)
    tensors = dialects.to_torch(variables, rules, info.source.get("batches_tracked", {}))
    return {key: torch.from_numpy(array) for key, array in tensors.items()}


def save_torch(tensors, dialect, path):
    """Writes a state dict as the dialect's project does."""
    buffer = io.BytesIO()  # Of a full disk PyTorch says no more than that a write failed.
    torch.save({"meta": {}, "state_dict": tensors} if dialect == "mmpretrain" else tensors, buffer)
    Path(path).write_bytes(buffer.getbuffer())


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
    module = conversion.module
    images = test_images(56 if module.small_stem else 224)[..., np.arange(module.in_chans) % 3]
    network = reference.network_like(module, conversion.dialect)
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


def test_images(side: int = 224) -> np.ndarray:
    """Make two seeded pictures, uint8 (2, side, side, 3): coloured squares under noise, so that all frequencies occur.

    Args:
      side: in pixels, a multiple of 7.
    """
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (2, 7, 7, 3)).repeat(side // 7, 1).repeat(side // 7, 2)
    return ((squares + rng.integers(0, 256, (2, side, side, 3))) // 2).astype(np.uint8)


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


def verified(path: str | Path, *, ema: bool) -> Conversion:
    """Convert a .pth file.

    Raises:
      InputError: it cannot be read, or computes something else than PyTorch does with it.
    """
    conversion = convert(read(path, ema=ema))
    rows = verify(conversion)
    if not all(row.passed for row in rows):
        raise InputError(f"{path} gives other numbers in JAX than in PyTorch:\n{table(rows)}")
    return conversion
