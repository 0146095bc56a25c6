"""PyTorch files: reads a network's tensors, class names and other data without running code from the file.

torch.load reads with `weights_only`. A stand-in replaces every class and function that torch.load does not allow; it
keeps the state of an object and does nothing. The reader therefore sees the tensors inside options, histories, whole
pickled modules and TorchScript programs.
"""

import io
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import InputError
from ..files import LARGEST, hash_of, path_of
from . import dialects

Pickled = Any  # An unpickled object: the file alone decides its type.

SAVE = 'save only its weights, in the program that wrote it, with torch.save(model.state_dict(), "weights.pth")'
# If a file holds several networks, the one under the first of these names wins.
USUAL = ("state_dict", "model_state_dict", "model", "module", "net", "network", "student")
DEEPEST, MOST_OBJECTS = 6, 100_000  # Limits of the search for tensors: levels of containers, and objects.
AVERAGED = {"avg", "average", "averaged", "averages", "ema", "polyak", "shadow", "swa"}
NAMES = ("CLASSES", "classes", "class_names", "class_to_idx", "idx_to_class")
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # The first bytes of files in the format before zips.
OTHER_KINDS = {  # {first bytes of a file: what the file is}
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch the file with git lfs pull",
    b"<": "a web page, not a PyTorch file; download the file itself",
    b"\x89HDF": "an HDF5 file, not a PyTorch file; give a PyTorch checkpoint",
    b"\x80": f"a pickle that torch.save did not write; {SAVE}",
}


class StandIn:
    """A replacement for an object of a class, or for the result of a function, that a file names.

    Attributes:
      name: the class or function.
      state: the attributes of the object.
    """

    name = ""
    state: dict[str, Pickled]

    def __new__(cls, *_: Pickled, **__: Pickled) -> "StandIn":
        """Make an object without state; arguments of the original class are ignored."""
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *_: Pickled, **__: Pickled) -> None:
        pass

    def __setstate__(self, state: Pickled) -> None:
        self.state = state if isinstance(state, dict) else {}


def _stand_in(name: str) -> type:
    """Return the class that replaces a class or function. A replaced container still holds its items."""
    content: dict[str, Pickled] = {"name": name}
    kind = name.rpartition(".")[2].lower()
    if kind.startswith(("module", "parameter")):  # PyTorch's ModuleList and the like are modules.
        pass
    elif kind.endswith("dict"):
        content["__new__"] = lambda _, *args, **__: OrderedDict(*(item for item in args[:1] if isinstance(item, dict)))
    elif kind.endswith(("list", "deque")):
        content["__new__"] = lambda *_, **__: []
    return type("StandIn", (StandIn,), content)


@dataclass(frozen=True)
class TorchFile:
    """A network from a checkpoint file.

    Attributes:
      tensors: {the dialect's own key: array}.
      dialect: whose names the file has, a key of dialects.DIALECTS.
      classes: class names; None if the file has none.
      small_stem: whether the stem has stride 1 and no max pool; None if the file does not say. Whole modules do.
      notes: the choice between averaged and other weights, a sentence each.
      warnings: other choices and skipped tensors, a sentence each.
      name: name of the file.
      sha256: hash of the file, in hexadecimal.
    """

    tensors: dict[str, np.ndarray]
    dialect: str
    classes: tuple[str, ...] | None
    small_stem: bool | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    name: str
    sha256: str


class Table(NamedTuple):
    """Named tensors at one place of a file.

    Attributes:
      path: the keys that lead to the place.
      tensors: {name: tensor}.
      modules: {prefix of the tensors' names: the pickled module that holds these tensors}; {} outside pickled modules.
    """

    path: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    modules: dict[str, StandIn]


class Candidate(NamedTuple):
    """A network in a table of tensors.

    Attributes:
      table: the table.
      network: its place in the table.
      siblings: all networks in the table.
    """

    table: Table
    network: dialects.Network
    siblings: list[dialects.Network]

    @property
    def place(self) -> tuple[str, ...]:
        """The names that lead to the network's tensors."""
        return (*self.table.path, *self.network.prefix.split(".")[:-1])

    @property
    def averaged(self) -> bool:
        """Whether the tensors are averages, judging by the names that lead to them."""
        words = {word.lower() for name in self.place for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
        return bool(words & AVERAGED) or "n_averaged" in self.table.tensors

    @property
    def rank(self) -> tuple[int, int]:
        """The sort key for the networks of a file: usual names first, then most tensors."""
        return sum(USUAL.index(name) if name in USUAL else len(USUAL) for name in self.place), -self.network.matches

    def describe(self) -> str:
        """Describe the place of the network in the file."""
        return '"' + "/".join(self.place) + '"' if self.place else "the outermost one"


def read(path: str | Path, *, ema: bool = False) -> TorchFile:
    """Read a network from a PyTorch checkpoint without running code from the file.

    Args:
      path: the file.
      ema: take the averaged weights that the training kept beside the others.

    Raises:
      InputError: the file is missing or damaged, holds no ShuffleNetV2, or cannot be read without running its code.
    """
    file = path_of(path)
    sha256 = hash_of(file)
    content, scripted = _load(file)
    tables = list(_tables(content))
    _require_float(tables, file)
    candidates = [
        Candidate(table, network, networks)
        for table in tables
        for networks in [dialects.find_networks(table.tensors)]
        for network in networks
    ]
    if not candidates:
        raise InputError(_no_network(content, tables, file, scripted=scripted))
    chosen, notes, doubts = _choose(candidates, file, ema=ema)
    tensors, left_out = dialects.canonical(chosen.table.tensors, chosen.network, chosen.siblings)
    if left_out:
        parts = sorted({".".join(key.split(".")[:2]) for key in left_out})
        shown = ", ".join(parts[:5]) + (", ..." if len(parts) > 5 else "")
        doubts.append(f"{file.name} holds {len(left_out)} tensors of other networks, which are skipped: {shown}")
    try:
        arrays = {key: _numpy(value) for key, value in tensors.items()}
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise InputError(f"checkpoint {file} holds sparse, expanded or empty tensors; store plain ones") from error
    return TorchFile(
        tensors=arrays,
        dialect=chosen.network.dialect,
        classes=_class_names(content),
        small_stem=_small_stem(chosen),
        notes=tuple(notes),
        warnings=tuple(doubts),
        name=file.name,
        sha256=sha256,
    )


# Files to objects


def _load(path: Path) -> tuple[Pickled, bool]:
    """Return the content of a file, with stand-ins, and whether the file is a TorchScript program."""
    scripted = False
    try:
        with open(path, "rb") as file:
            scripted = _is_script(file)
            checkpoint = _without_program(file) if scripted else file
            stand_ins = [(_stand_in(name), name) for name in _names_in(checkpoint)]
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Each of these problems also raises an error, which is handled below.
                return torch.load(checkpoint, map_location="cpu", weights_only=True), scripted
    except Exception as error:  # Damaged files raise almost any exception.
        raise InputError(f"checkpoint {path} {_describe_failure(path, error, scripted=scripted)}") from error


def _describe_failure(path: Path, error: Exception, *, scripted: bool) -> str:
    """Return why a file cannot be read, and what to do, as the end of a sentence about it."""
    if scripted:
        return f"is a TorchScript program whose tensors cannot be read; {SAVE}"
    if any(word in str(error) for word in ("Unsupported", "blocked", "Can only", "persistent_load")):
        return f"holds objects other than tensors, which could run code; it was not loaded; {SAVE}"
    with open(path, "rb") as file:
        first = file.read(32)
    if first[8:10] == b'{"':
        return "is a safetensors file; give one that `export` wrote, with the suffix .safetensors"
    kinds = [kind for start, kind in OTHER_KINDS.items() if first.startswith(start) and not first.startswith(LEGACY)]
    return f"is {kinds[0]}" if kinds else "is damaged or not a PyTorch file; fetch it again"


def _is_script(file: io.BufferedReader) -> bool:
    """Whether a file is a TorchScript program: a zip with constants.pkl beside the data."""
    is_zip = file.read(4) == b"PK\3\4"
    file.seek(0)
    if not is_zip:
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    file.seek(0)
    return any(name.endswith("/constants.pkl") for name in names)


def _without_program(file: io.BufferedReader) -> io.BytesIO:
    """Return the tensors and attributes of a TorchScript program as a checkpoint file without code."""
    checkpoint = io.BytesIO()
    with zipfile.ZipFile(file) as script, zipfile.ZipFile(checkpoint, "w") as plain:
        members = [
            member
            for member in script.infolist()
            if (name := member.filename.partition("/")[2]) in ("data.pkl", "version", "byteorder")
            or name.startswith("data/")
        ]
        if sum(member.file_size for member in members) > LARGEST:
            raise ValueError("too large")
        for member in members:
            plain.writestr(member.filename, script.read(member))
    checkpoint.seek(0)
    return checkpoint


def _names_in(file: io.BufferedReader | io.BytesIO) -> set[str]:
    """Return the names of all classes and functions in a checkpoint's pickles, without unpickling them."""
    start: io.BufferedReader | io.BytesIO = file
    count = 4  # Pickles in older files: three describe the file, the fourth is the content.
    if file.read(4) == b"PK\3\4":
        with zipfile.ZipFile(file) as archive:
            member = next(member for member in archive.infolist() if member.filename.endswith("/data.pkl"))
            if member.file_size > LARGEST:
                raise ValueError("too large")
            start, count = io.BytesIO(archive.read(member)), 1
    start.seek(0)
    names = set()
    for _ in range(count):
        for operation, argument, _ in pickletools.genops(start):
            if operation.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                names.add(f"{IMPORT_MAPPING.get(module, module)}.{name}")
    file.seek(0)
    return names


# Objects to tables of tensors


def _tables(content: Pickled) -> Iterator[Table]:
    """Yield every table of tensors in the content of a file, the outermost first. A table in two places comes twice."""
    waiting: deque[tuple[tuple[str, ...], Pickled]] = deque([((), content)])
    for _ in range(MOST_OBJECTS):  # An object in a file may contain itself.
        if not waiting:
            return
        path, content = waiting.popleft()
        inside: list[tuple[Pickled, Pickled]] = []
        if isinstance(content, StandIn):
            modules = dict(_modules_of(content))
            tensors = {
                prefix + name: value
                for prefix, module in modules.items()
                for name, value in _attributes(module, "_parameters", "_buffers")
                if isinstance(value, torch.Tensor)
            }
            if tensors:
                yield Table(path, tensors, modules)
        elif isinstance(content, dict):
            tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
            if tensors and all(isinstance(key, str) for key in tensors):
                yield Table(path, tensors, {})
            inside = list(content.items())
        elif isinstance(content, (list, tuple)):
            inside = list(enumerate(content))
        if len(path) < DEEPEST and len(waiting) < MOST_OBJECTS:
            containers = (dict, list, tuple, StandIn)
            waiting.extend(((*path, str(key)), value) for key, value in inside if isinstance(value, containers))


def _modules_of(module: StandIn) -> Iterator[tuple[str, StandIn]]:
    """Yield (prefix of its tensors' names, module) for a pickled module and all modules in it."""
    waiting, seen = [("", module)], {id(module)}
    while waiting:
        prefix, module = waiting.pop()
        yield prefix, module
        children = [(f"{prefix}{name}.", child) for name, child in _attributes(module, "_modules")]
        for name, child in reversed(children):
            if isinstance(child, StandIn) and id(child) not in seen:
                seen.add(id(child))
                waiting.append((name, child))


def _attributes(module: StandIn, *kinds: str) -> list[tuple[str, Pickled]]:
    """Return (name, value) of a pickled module's attributes of some kinds; of a TorchScript module all attributes."""
    tables = [module.state.get(kind) for kind in kinds] if "_modules" in module.state else [module.state]
    return [(str(name), value) for table in tables if isinstance(table, dict) for name, value in table.items()]


def _require_float(tables: list[Table], path: Path) -> None:
    """Raise InputError if the weights belong to a quantized network, which computes with 8 bits."""
    for table in tables:
        if any(tensor.is_quantized for tensor in table.tensors.values()):
            raise InputError(
                f"checkpoint {path} is quantized: it holds 8-bit weights with batch norm folded into them, which is "
                "another network; convert the float checkpoint from which it was made"
            )


def _no_network(content: Pickled, tables: list[Table], path: Path, *, scripted: bool) -> str:
    """Return why a file has no network that can be read, and what to do."""
    kind = "TorchScript program" if scripted else f"pickled {content.name}" if isinstance(content, StandIn) else ""
    if tables:
        keys = max((table.tensors for table in tables), key=len)
        return (
            f"checkpoint {path} {f'is a {kind} and ' if kind else ''}holds {len(keys)} tensors, but no "
            f"ShuffleNetV2 (first names: {', '.join(sorted(keys)[:3])}); give a checkpoint of MMPretrain, torchvision, "
            f"Megvii or ericsun99{f'; from a module, {SAVE}' if kind else ''}"
        )
    if not isinstance(content, dict):
        return f"checkpoint {path} holds a {kind or type(content).__name__}, not a state dict; {SAVE}"
    objects = sorted({value.name for value in content.values() if isinstance(value, StandIn)})
    if objects:
        named = ", ".join(objects[:3])
        return (
            f"checkpoint {path} holds objects that could run code ({named}) and no tensors; it was not loaded; {SAVE}"
        )
    return f"checkpoint {path} holds no state dict, {{name: tensor}}; {SAVE}"


# Choice of the network, and other data in the file


def _choose(candidates: list[Candidate], path: Path, *, ema: bool) -> tuple[Candidate, list[str], list[str]]:
    """Choose the network to read.

    Returns:
      The network, notes on averaged weights, and warnings if several networks fit.
    """
    averaged = [candidate for candidate in candidates if candidate.averaged]
    if ema and not averaged:
        raise InputError(f"checkpoint {path} holds no averaged weights; omit `ema`")
    fitting = averaged if ema else [candidate for candidate in candidates if not candidate.averaged] or averaged
    chosen = min(fitting, key=lambda candidate: candidate.rank)
    notes, doubts = [], []
    if averaged and not ema:
        advice = "the file has no others" if fitting is averaged else f"`ema` takes those in {averaged[0].describe()}"
        notes.append(f"{path.name}: took {'averaged' if fitting is averaged else 'the'} weights; {advice}")
    if len(fitting) > 1:
        others = ", ".join(candidate.describe() for candidate in fitting if candidate is not chosen)
        doubts.append(f"{path.name} holds {len(fitting)} networks; {chosen.describe()} is taken, not {others}")
    return chosen, notes, doubts


def _class_names(content: Pickled) -> tuple[str, ...] | None:
    """Return the class names in a file, where MMPretrain 0.x, MMPretrain 1.x or training loops store them."""
    meta = _field(content, "meta")
    for place in (meta, _field(meta, "dataset_meta"), content, _field(content, "hyper_parameters")):
        for key in NAMES:
            names = _listed(_field(place, key), names_first=key == "class_to_idx")
            if names:
                return names
    return None


def _field(content: Pickled, key: str) -> Pickled:
    return content.get(key) if isinstance(content, dict) else None


def _listed(names: Pickled, *, names_first: bool) -> tuple[str, ...] | None:
    """Return class names in the order of their labels, or None where there are none.

    Args:
      names: {name: label}, {label: name} or a list of names; any other object gives None.
      names_first: whether a dict from numbers to numbers is {name: label}.
    """
    if isinstance(names, dict):
        pairs = [pair[::-1] if names_first or not isinstance(pair[0], int) else pair for pair in names.items()]
        if sorted(label for label, _ in pairs if isinstance(label, int)) != list(range(len(names))):
            return None
        names = [name for _, name in sorted(pairs)]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, (str, int)) for name in names):
        return None
    return tuple(map(str, names)) or None


def _small_stem(chosen: Candidate) -> bool | None:
    """Return whether the stem of a pickled module has stride 1 and no max pool; None if unknown."""
    prefix, modules = chosen.network.prefix, chosen.table.modules
    first = dialects.bare(dialects.DIALECTS[chosen.network.dialect].conv1[0])
    if f"{prefix}{first}." not in modules:
        return None
    stride = modules[f"{prefix}{first}."].state.get("stride")
    pools = any(module.name.endswith(".MaxPool2d") for name, module in modules.items() if name.startswith(prefix))
    if stride == (2, 2) and pools:
        return False
    return True if stride == (1, 1) and not pools else None


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """Convert a tensor to NumPy, half precision to float32. Raise TypeError if it repeats a few stored numbers."""
    tensor = tensor.detach()
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise TypeError("expanded")
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
