"""Read optimized HLO text: computations, instructions, trips of loops, sizes of arrays, and the collectives that run.

XLA's own counts take the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``%name = shape opcode(rest``."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the operands and attributes; empty where it is not found."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it takes."""
        depth = 1
        for index, character in enumerate(self.rest):
            depth += {"(": 1, ")": -1}.get(character, 0)
            if not depth:
                return re.findall(r"%([\w.$-]+)", self.rest[:index])
        return []

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls, but those of loops."""
        return [name for match in _CALLED.finditer(self.rest) for name in re.findall(r"[\w.$-]+", match[1])]


Computations = dict[str, list[Instruction]]
_HEADER = re.compile(r"(ENTRY )?%?([\w.$-]+) \(.*\{$")
_ASSIGNMENT = re.compile(r"\s+(ROOT )?%?([\w.$-]+) = ")
_CALLED = re.compile(
    r"(?:to_apply|calls|branch_computations|true_computation|false_computation)=\{?([^,}]+(?:, ?%[^,}]+)*)"
)


def parse(text: str) -> tuple[Computations, str]:
    """The instructions of each computation, and the name of the computation that the program starts with.

    Args:
      text: ``compiled.as_text()``.
    """
    computations: Computations = {}
    entry, instructions = "", []
    for line in text.splitlines():
        if match := _HEADER.match(line):
            instructions = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif match := _ASSIGNMENT.match(line):
            shape, rest = _split_shape(line[match.end() :])
            opcode, _, rest = rest.partition("(")
            instructions.append(Instruction(match[2], shape, opcode.strip(), rest, bool(match[1])))
    return computations, entry


def trip_count(loop: Instruction, computations: Computations) -> int | None:
    """As the compiler states it, or the constant that the counter, from 0, is compared with; None where neither is
    there."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = computations.get(loop.attribute(r"condition=%?([\w.$-]+)"), [])
    limits = [
        int(i.rest.partition(")")[0]) for i in condition if i.opcode == "constant" and i.shape[:3] in ("s32", "u32")
    ]
    return limits[0] if len(limits) == 1 else None


def array_bytes(shape: str) -> int:
    """Of an array ``bf16[8,256]{1,0}`` or of all arrays of a tuple, without the padding of layouts."""
    bits = 0
    for dtype, size, dimensions in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape):
        bits += (8 if dtype == "pred" else int(size)) * math.prod(int(n) for n in dimensions.split(",") if n)
    return bits // 8


def hbm_bytes(shape: str) -> int:
    """Of those arrays of a shape that lie in a TPU's HBM, with the padding of their tiles.

    A layout ``{1,0:T(8,128)(2,1)S(1)}`` lists dimensions from the fastest, then the tile of the fastest of them, then
    the memory, which is HBM where it lists none. Scalars count nothing: they are in scalar memory.
    """
    in_hbm = [bool(match[2]) and not re.search(r"S\([1-9]", match[3] or "") for match in _ARRAY.finditer(shape)]
    return sum(size for size, counts in zip(padded_bytes(shape), in_hbm, strict=True) if counts)


def padded_bytes(shape: str) -> list[int]:
    """Of each array of a shape, wherever it lies, with the padding of its tiles."""
    return [_padded_bytes(match[1], match[2], match[3] or "") for match in _ARRAY.finditer(shape)]


_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


def _padded_bytes(dtype: str, dimensions: str, layout: str) -> int:
    sizes = [int(n) for n in dimensions.split(",") if n]
    fastest_first = [sizes[int(d)] for d in layout.partition(":")[0].split(",") if d] or sizes[::-1]
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        for index, size in enumerate(reversed(tile[1].split(","))):
            if index < len(fastest_first):
                fastest_first[index] = -(-fastest_first[index] // int(size)) * int(size)
    digits = re.search(r"\d+", dtype)
    return (int(digits[0]) if digits else 8) * math.prod(fastest_first) // 8


def _split_shape(text: str) -> tuple[str, str]:
    """A shape, of which tuples have spaces in them, and what follows it."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return text[: index + 1], text[index + 1 :].lstrip()
    return text, ""


def elements(shape: str) -> list[str]:
    """The elements of a tuple shape."""
    elements, depth = [""], 0
    for character in shape[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            elements.append("")
        else:
            elements[-1] += character
    return elements


_ON_DEVICE = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"  # how TPUs write what goes over the data center network, whatever the collective
KINDS = (*_ON_DEVICE, BETWEEN_SLICES)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it.

    Attributes:
      kind: one of :data:`KINDS`.
      bytes: of the whole array, which an all-gather ends with and a reduce-scatter starts from; each time.
      group: devices that take part, this one included; 2 where it goes between slices.
      times: executions per run of the program: the trip counts of all loops around it, multiplied.
      loops: ``op_name`` of the loops around it, the outermost first.
      computation: the HLO computation it stands in.
      op_name: where in the traced program it comes from: ``jit(step)/.../layers/mixer/wq/dot_general``.
    """

    kind: str
    bytes: int
    group: int
    times: int
    loops: tuple[str, ...]
    computation: str
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others each time, by the ring algorithm."""
        if self.kind in ("collective-permute", BETWEEN_SLICES):
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """All collectives that the program runs, in the order of its text.

    A loop whose trip count the text does not tell counts as one iteration; those of scans are told.

    Args:
      text: ``compiled.as_text()``.
    """
    computations, entry = parse(text)
    match = re.search(r"num_partitions=(\d+)", text[:100_000])
    devices = int(match[1]) if match else 1
    return list(_walk(computations, entry, devices, 1, (), set(), ""))


def _walk(
    computations: Computations,
    name: str,
    devices: int,
    times: int,
    loops: tuple[str, ...],
    started: set[str],
    caller: str,
) -> Iterator[Collective]:
    """The collectives of a computation and of all that it calls.

    TPUs spread one asynchronous collective over a chain of fusions, which all hold a copy of it with the same channel;
    ``started`` has the channels of the chains that are under way, also where a loop runs beside them.
    """
    for instruction in computations[name]:
        op_name = instruction.op_name or caller
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and "megascale" in instruction.rest:
            size = array_bytes(elements(instruction.shape)[0])
            yield Collective(BETWEEN_SLICES, size, 2, times, loops, name, op_name)
        elif kind in _ON_DEVICE:
            if "chain_id=" in instruction.rest:
                channel = instruction.attribute(r"channel_id=(\d+)")
                if channel in started:
                    continue
                started.add(channel)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # a fusion of TPUs: the sum, of which each device keeps a part
                size = array_bytes(instruction.shape)
                group = _group(instruction, devices)
            else:
                group = _group(instruction, devices)
                size = _result_bytes(instruction) * (group if kind == "reduce-scatter" else 1)
            yield Collective(kind, size, group, times, loops, name, op_name)
        elif instruction.opcode == "while":
            body = instruction.attribute(r"body=%?([\w.$-]+)")
            trips = trip_count(instruction, computations) or 1
            yield from _walk(computations, body, devices, times * trips, (*loops, op_name), set(started), op_name)
        else:
            for called in instruction.called:
                inside = started if instruction.opcode == "fusion" else set()
                if called in computations:
                    yield from _walk(computations, called, devices, times, loops, inside, op_name)


def _group(instruction: Instruction, devices: int) -> int:
    """Devices that take part in a collective, from any of the ways in which HLO writes its groups."""
    if listed := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return listed.count(",") + 1
    if iota := instruction.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(iota)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", instruction.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _result_bytes(instruction: Instruction) -> int:
    """Of what a collective ends with; the shape of an asynchronous start has the operands before it."""
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return array_bytes(elements(instruction.shape)[1])
    return array_bytes(instruction.shape)
