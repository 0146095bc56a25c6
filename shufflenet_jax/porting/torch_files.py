"""PyTorch files: the network's tensors and what stands beside them, read without running code.

torch.load reads with `weights_only`. Every class and function that it does not know becomes a stand-in, which keeps its
state and does nothing: options, histories, whole pickled modules and TorchScript programs show the tensors in them.
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

SAVE = 'save its weights alone, where it was made, with torch.save(model.state_dict(), "weights.pth")'
# Where a file holds several networks, the first of these names wins.
USUAL = ("state_dict", "model_state_dict", "model", "module", "net", "network", "student")
DEEPEST, MOST_OBJECTS = 6, 100_000  # How deep and how far tables of tensors are looked for.
AVERAGED = {"avg", "average", "averaged", "averages", "ema", "polyak", "shadow", "swa"}
NAMES = ("CLASSES", "classes", "class_names", "class_to_idx", "idx_to_class")
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # How files begin that are no zip.
OTHER_KINDS = {  # {how a file begins: what it is}
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch it with git lfs pull",
    b"<": "a page of a website, not a PyTorch file; fetch the file itself",
    b"\x89HDF": "an HDF5 file, not a PyTorch file; give a checkpoint of PyTorch",
    b"\x80": f"a pickle that torch.save did not write; {SAVE}",
}


class StandIn:
    """What takes the place of an object of a class, or the result of a function, that a file names."""

    name = ""  # The class or function.
    state: dict[str, Any]  # The object's attributes.

    def __new__(cls, *_: Any, **__: Any) -> Any:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


def _stand_in(name: str) -> type:
    """Return the class that takes the place of a class or function: containers still hold what is put into them."""
    content: dict[str, Any] = {"name": name}
    kind = name.rpartition(".")[2].lower()
    if kind.startswith(("module", "parameter")):  # PyTorch's own are no containers but modules.
        pass
    elif kind.endswith("dict"):
        content["__new__"] = lambda _, *given, **__: OrderedDict(
            *(item for item in given[:1] if isinstance(item, dict))
        )
    elif kind.endswith(("list", "deque")):
        content["__new__"] = lambda *_, **__: []
    return type("StandIn", (StandIn,), content)


@dataclass(frozen=True)
class TorchFile:
    """What a checkpoint file holds that matters here.

    Attributes:
      tensors: {the dialect's own key: array} of the network.
      dialect: whose names the file has.
      classes: class names, where the file gives them.
      small_stem: whether the stem has stride 1 and no max pool, where the file says so: whole modules do.
      notes: what was chosen among averaged and other weights, a sentence each.
      warnings: what was chosen or left out by a guess, a sentence each.
      name: of the file.
      sha256: of the file.
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
    """Tensors with names, as they lie somewhere in a file."""

    path: tuple[str, ...]  # The keys that lead there.
    tensors: dict[str, torch.Tensor]
    modules: dict[str, StandIn]  # The pickled modules that hold the tensors, by the names in front of them.


class Candidate(NamedTuple):
    """A network in a table."""

    table: Table
    network: dialects.Network
    siblings: list[dialects.Network]  # All networks in the table.

    @property
    def place(self) -> tuple[str, ...]:
        """The names that lead to the network's tensors."""
        return (*self.table.path, *self.network.prefix.split(".")[:-1])

    @property
    def averaged(self) -> bool:
        """Whether the tensors are averages, as far as their place tells."""
        words = {word.lower() for name in self.place for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
        return bool(words & AVERAGED) or "n_averaged" in self.table.tensors

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts the networks of a file: usual names first, then those with most tensors."""
        return sum(USUAL.index(name) if name in USUAL else len(USUAL) for name in self.place), -self.network.matches

    def describe(self) -> str:
        """Return where the network lies, in words."""
        return '"' + "/".join(self.place) + '"' if self.place else "the outermost one"


def read(path: str | Path, *, ema: bool = False) -> TorchFile:
    """Read a network from a PyTorch checkpoint; nothing in the file is run.

    Args:
      path: the file.
      ema: take the averaged weights that the training kept beside the others.
    Raises:
      InputError: the file is missing, damaged, no checkpoint of a ShuffleNetV2, or cannot be read without running code.
    """
    file: Path = path_of(path)
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
        doubts.append(f"{file.name} holds {len(left_out)} tensors of other networks, which are left out: {shown}")
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


def _load(path: Path) -> tuple[Any, bool]:
    """Return what a file holds, with stand-ins, and whether it is a TorchScript program."""
    scripted = False
    try:
        with open(path, "rb") as file:
            scripted = _is_script(file)
            checkpoint = _without_program(file) if scripted else file
            stand_ins: list[Any] = [(_stand_in(name), name) for name in _names_in(checkpoint)]
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # What PyTorch warns of ends in the errors below.
                return torch.load(checkpoint, map_location="cpu", weights_only=True), scripted
    except Exception as error:  # Damaged files raise almost anything.
        raise InputError(f"checkpoint {path} {_describe_failure(path, error, scripted=scripted)}") from error


def _describe_failure(path: Path, error: Exception, *, scripted: bool) -> str:
    if scripted:
        return f"is a TorchScript program whose tensors cannot be read; {SAVE}"
    if any(word in str(error) for word in ("Unsupported", "blocked", "Can only", "persistent_load")):
        return f"holds objects that are not tensors, which could run code; it was not loaded; {SAVE}"
    with open(path, "rb") as file:
        first = file.read(32)
    if first[8:10] == b'{"':
        return "is a safetensors file; only those that `export` wrote can be read, under the ending .safetensors"
    kinds = [kind for start, kind in OTHER_KINDS.items() if first.startswith(start) and not first.startswith(LEGACY)]
    return f"is {kinds[0]}" if kinds else "is damaged or not a PyTorch file; fetch it again"


def _is_script(file: io.BufferedReader) -> bool:
    """Whether a file is a TorchScript program: a zip with constants beside the data."""
    is_zip = file.read(4) == b"PK\3\4"
    file.seek(0)
    if not is_zip:
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    file.seek(0)
    return any(name.endswith("/constants.pkl") for name in names)


def _without_program(file: io.BufferedReader) -> io.BytesIO:
    """Return a TorchScript file's tensors and attributes in the form of a checkpoint; its code is left out."""
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
    """Return the names of all classes and functions in a checkpoint's pickles; nothing is unpickled."""
    start: io.BufferedReader | io.BytesIO = file
    count = 4  # Older files: three about the file itself, then the content.
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


def _tables(content: Any) -> Iterator[Table]:
    """Yield every table of tensors in what a file holds, the outermost first; those in two places twice."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    for _ in range(MOST_OBJECTS):  # A file may hold what contains itself.
        if not waiting:
            return
        path, content = waiting.popleft()
        inside: list[tuple[Any, Any]] = []
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
    """Yield (what stands in front of its tensors' names, module) for a pickled module and all modules in it."""
    waiting, seen = [("", module)], {id(module)}
    while waiting:
        prefix, module = waiting.pop()
        yield prefix, module
        children = [(f"{prefix}{name}.", child) for name, child in _attributes(module, "_modules")]
        for name, child in reversed(children):
            if isinstance(child, StandIn) and id(child) not in seen:
                seen.add(id(child))
                waiting.append((name, child))


def _attributes(module: StandIn, *kinds: str) -> list[tuple[str, Any]]:
    """Return what a pickled module holds of some kinds; a TorchScript module keeps all its attributes side by side."""
    tables = [module.state.get(kind) for kind in kinds] if "_modules" in module.state else [module.state]
    return [(str(name), value) for table in tables if isinstance(table, dict) for name, value in table.items()]


def _require_float(tables: list[Table], path: Path) -> None:
    """Raise InputError where the weights are those of a network that computes with 8 bits."""
    for table in tables:
        if any(tensor.is_quantized for tensor in table.tensors.values()):
            raise InputError(
                f"checkpoint {path} is quantised: it holds 8-bit weights with the batch norms folded into them, which "
                "is another network; convert the float checkpoint that it was made from"
            )


def _no_network(content: Any, tables: list[Table], path: Path, *, scripted: bool) -> str:
    """Return why a file gives no network, and what to do."""
    kind = "TorchScript program" if scripted else f"pickled {content.name}" if isinstance(content, StandIn) else ""
    if tables:
        keys = max((table.tensors for table in tables), key=len)
        return (
            f"checkpoint {path} {f'is a {kind} and ' if kind else ''}holds {len(keys)} tensors, but not those of a "
            f"ShuffleNetV2 (first names: {', '.join(sorted(keys)[:3])}); give a checkpoint of MMPretrain, torchvision, "
            f"Megvii or ericsun99{f'; from a module, {SAVE}' if kind else ''}"
        )
    if not isinstance(content, dict):
        return f"checkpoint {path} holds a {kind or type(content).__name__}, not a state dict; {SAVE}"
    objects = sorted({value.name for value in content.values() if isinstance(value, StandIn)})
    if objects:
        named = ", ".join(objects[:3])
        return f"checkpoint {path} holds objects that could run code ({named}), no tensors; it was not loaded; {SAVE}"
    return f"checkpoint {path} holds no state dict: no table of names and tensors; {SAVE}"


# Which network, and what is known of it


def _choose(candidates: list[Candidate], path: Path, *, ema: bool) -> tuple[Candidate, list[str], list[str]]:
    """Return the network to take, what to say of averaged weights, and what to warn of where several would do."""
    averaged = [candidate for candidate in candidates if candidate.averaged]
    if ema and not averaged:
        raise InputError(f"checkpoint {path} holds no averaged weights; leave `ema` out")
    fitting = averaged if ema else [candidate for candidate in candidates if not candidate.averaged] or averaged
    chosen = min(fitting, key=lambda candidate: candidate.rank)
    notes, doubts = [], []
    if averaged and not ema:
        advice = "there are no others" if fitting is averaged else f"`ema` takes those in {averaged[0].describe()}"
        notes.append(f"{path.name}: took {'averaged' if fitting is averaged else 'the'} weights; {advice}")
    if len(fitting) > 1:
        others = ", ".join(candidate.describe() for candidate in fitting if candidate is not chosen)
        doubts.append(f"{path.name} holds {len(fitting)} networks; {chosen.describe()} is taken, not {others}")
    return chosen, notes, doubts


def _class_names(content: Any) -> tuple[str, ...] | None:
    """Return the class names that a file gives, in the spelling of MMPretrain 0.x or 1.x or of training loops."""
    meta = _field(content, "meta")
    for place in (meta, _field(meta, "dataset_meta"), content, _field(content, "hyper_parameters")):
        for key in NAMES:
            names = _listed(_field(place, key), names_first=key == "class_to_idx")
            if names:
                return names
    return None


def _field(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _listed(names: Any, *, names_first: bool) -> tuple[str, ...] | None:
    """Return class names in the order of their labels, from a list or a table of names and labels.

    Args:
      names: {name: label}, {label: name}, or a list; None for anything else.
      names_first: whether a table whose names are numbers too is {name: label}.
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
    """Return whether a pickled module's first convolution has stride 1 and no max pool follows; None: not known."""
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
    """Widen half types, which loses nothing. Raises TypeError where a few stored numbers stand for many."""
    tensor = tensor.detach()
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise TypeError("expanded")
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
