"""Counts from the text of a compiled program: collectives, and the bytes that its kernels touch.

XLA's own analysis counts the body of a loop once, and reports nothing on GPUs.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

logger = logging.getLogger(__name__)

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
# Instructions that move nothing by themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"),
    *("replica-id", "opt-barrier", "while", "call", "conditional"),
}
ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


class Exchange(NamedTuple):
    """All collectives of a kind in a program.

    Attributes:
      number: how often they run.
      size: bytes of their operands or results, whichever are larger, on one device.
    """

    number: int
    size: int


@dataclass
class Counts:
    """Counts for one run of a program on one device.

    Attributes:
      collectives: {kind: its Exchange}.
      touched: bytes of all operands and results of all kernels in the device's main memory. An operand counts in full
        even if a kernel reads only a part; padding to the tiles of TPUs does not count.
    """

    collectives: dict[str, Exchange] = field(default_factory=dict)
    touched: int = 0

    @property
    def total(self) -> Exchange:
        """All collectives of all kinds."""
        kinds = self.collectives.values()
        return Exchange(sum(kind.number for kind in kinds), sum(kind.size for kind in kinds))


class Instruction(NamedTuple):
    """A line of a program: `%name = shape opcode(%operand, ...), attributes`.

    Attributes:
      name: of its result.
      shape: of its result, as text.
      opcode: the operation.
      operands: names of other instructions, or the value of a constant.
      attributes: the rest of the line.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


Computations = dict[str, list[Instruction]]


def count(text: str) -> Counts:
    """Count what a program does, with loop bodies as often as they run.

    Args:
      text: an optimized HLO module, as `Compiled.as_text()` returns it.
    """
    counts = Counts()
    computations, entry = _parse(text)
    _walk(computations, entry, 1, counts, kernels=True)
    return counts


def _walk(computations: Computations, name: str, times: int, counts: Counts, *, kernels: bool) -> None:
    """Add several runs of a computation to the counts; its bytes only if its instructions are kernels."""
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for instruction in computations[name]:
        operands = [shapes[operand] for operand in instruction.operands if operand in shapes]
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            exchanged = _bytes_exchanged(instruction, operands)
            before = counts.collectives.get(kind, Exchange(0, 0))
            counts.collectives[kind] = Exchange(before.number + times, before.size + times * exchanged)
        if kernels and instruction.opcode not in FREE:
            counts.touched += times * _bytes_touched(instruction, operands)
        for called, runs in _calls(computations, instruction):
            holds_kernels = instruction.opcode in ("while", "call", "conditional")
            _walk(computations, called, times * runs, counts, kernels=kernels and holds_kernels)


def _calls(computations: Computations, instruction: Instruction) -> Iterator[tuple[str, int]]:
    """Yield the computations that an instruction runs, and how often."""
    if instruction.opcode == "while":
        names = {role: _named(instruction, role)[0] for role in ("condition", "body")}
        yield names["body"], _trips(computations, instruction, names["condition"])
    elif instruction.opcode == "call":
        yield from ((name, 1) for name in _named(instruction, "to_apply"))
    elif instruction.opcode == "conditional":
        for role in ("branch_computations", "true_computation", "false_computation"):
            yield from ((name, 1) for name in _named(instruction, role))
    elif instruction.opcode in ("fusion", "async-start"):
        yield from ((name, 1) for name in _named(instruction, "calls"))


def _named(instruction: Instruction, role: str) -> list[str]:
    """Return the names of the computations that an attribute gives."""
    match = re.search(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
    return re.findall(r"%?([\w.\-]+)", match[1]) if match else []


def _trips(computations: Computations, loop: Instruction, condition: str) -> int:
    """Return how often a loop runs: as XLA notes it, else the only number in its condition."""
    noted = re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    limits = {
        line.operands[0]
        for line in computations[condition]
        if line.opcode == "constant" and re.match(r"[su]\d+\[\]", line.shape) and line.operands
    }
    if len(limits) == 1 and (limit := limits.pop()).isdigit():
        return int(limit)
    logger.warning("the program does not say how often its loop %s runs; it counts once", loop.name)
    return 1


def _bytes_touched(instruction: Instruction, operands: Sequence[str]) -> int:
    read, written = (sum(_sizes(shapes, main_memory=True)) for shapes in (operands, [instruction.shape]))
    if instruction.opcode.endswith("-start"):  # Its results are those of `-done`, and its operands once more.
        return read
    return written if instruction.opcode.endswith("-done") else read + written


def _bytes_exchanged(instruction: Instruction, operands: Sequence[str]) -> int:
    read, written = sum(_sizes(operands)), sum(_sizes([instruction.shape]))
    return max(read, written - read if instruction.opcode.endswith("-start") else written)


def _sizes(shapes: Sequence[str], *, main_memory: bool = False) -> Iterator[int]:
    """Yield the bytes of each array in some shapes; `main_memory` skips those that a TPU keeps on its chip."""
    for shape in shapes:
        for kind, dimensions, layout in ARRAY.findall(shape):
            if main_memory and re.search(r"S\([1-9]\d*\)", layout):
                continue
            bits = 8 if kind == "pred" else int(re.sub(r"^[a-z]+", "", kind.partition("e")[0]))
            yield math.ceil(bits / 8 * math.prod(int(side) for side in re.findall(r"\d+", dimensions)))


def _parse(text: str) -> tuple[Computations, str]:
    """Return the computations of a program, and the name of the first one to run."""
    computations: Computations = {}
    entry = ""
    lines: list[Instruction] = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            lines.append(_instruction(match[1], match[2]))
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _end(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _end(rest, start)
    opcode, between = rest[:start], rest[start + 1 : end - 1]
    operands = (between,) if opcode == "constant" else tuple(re.findall(r"%([\w.\-]+)", between))
    return Instruction(name, shape, opcode, operands, rest[end:])


def _end(text: str, start: int) -> int:
    """Return the place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.end()
    raise ValueError(f"a parenthesis stays open in {text[:80]}")
