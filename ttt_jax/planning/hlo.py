"""Read optimized HLO text: instructions, trip counts of loops, sizes of arrays, and the collectives that run.

XLA's own counts take the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``%name = shape opcode(rest``."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    def attribute(self, pattern: str) -> str:
        """Return the first group of a pattern in the operands and attributes, or "" where it does not match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        """Return the place in the traced program that the instruction comes from."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def operands(self) -> list[str]:
        """Return the names of the instructions whose results this one takes."""
        depth = 1
        for index, character in enumerate(self.rest):
            depth += {"(": 1, ")": -1}.get(character, 0)
            if not depth:
                return re.findall(r"%([\w.$-]+)", self.rest[:index])
        return []

    @property
    def called(self) -> list[str]:
        """Return the names of the computations that the instruction calls, without those of loops."""
        return [name for match in _CALLED.finditer(self.rest) for name in re.findall(r"[\w.$-]+", match[1])]


Computations = dict[str, list[Instruction]]
_HEADER = re.compile(r"(ENTRY )?%?([\w.$-]+) \(.*\{$")
_ASSIGNMENT = re.compile(r"\s+(ROOT )?%?([\w.$-]+) = ")
_CALLED = re.compile(
    r"(?:to_apply|calls|branch_computations|true_computation|false_computation)=\{?([^,}]+(?:, ?%[^,}]+)*)"
)


def parse(text: str) -> tuple[Computations, str]:
    """Return the instructions of each computation, and the name of the computation that the program starts with.

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
    """Return the trip count of a loop, or None.

    It is what the compiler states, or else the constant that the loop's counter, which begins at 0, is compared with.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = computations.get(loop.attribute(r"condition=%?([\w.$-]+)"), [])
    limits = [
        int(i.rest.partition(")")[0]) for i in condition if i.opcode == "constant" and i.shape[:3] in ("s32", "u32")
    ]
    return limits[0] if len(limits) == 1 else None


def array_bytes(shape: str) -> int:
    """Return the bytes of an array ``bf16[8,256]{1,0}``, or of all arrays of a tuple, without padding."""
    bits = 0
    for dtype, size, dimensions in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape):
        bits += (8 if dtype == "pred" else int(size)) * math.prod(int(n) for n in dimensions.split(",") if n)
    return bits // 8


def hbm_bytes(shape: str) -> int:
    """Return the bytes of those arrays of a shape that are in a TPU's HBM, with the padding of their tiles.

    A layout ``{1,0:T(8,128)(2,1)S(1)}`` lists dimensions from the fastest, then the tile of the fastest of them, then
    the memory, which is HBM where none is listed. Scalars do not count: they are in scalar memory.
    """
    in_hbm = [bool(match[2]) and not re.search(r"S\([1-9]", match[3] or "") for match in _ARRAY.finditer(shape)]
    return sum(size for size, counts in zip(padded_bytes(shape), in_hbm, strict=True) if counts)


def padded_bytes(shape: str) -> list[int]:
    """Return the bytes of each array of a shape, in any memory, with the padding of its tiles."""
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
    """Split a text into the shape at its beginning, in which tuples have spaces, and the rest."""
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
    """Return the elements of a tuple shape."""
    found, depth = [""], 0
    for character in shape[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return found


ON_DEVICE = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"  # any collective over the data center network: TPU programs do not tell which
KINDS = (*ON_DEVICE, BETWEEN_SLICES)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it.

    Attributes:
      kind: one of :data:`KINDS`.
      bytes: size of the whole array, the result of an all-gather or the operand of a reduce-scatter; per execution.
      group: number of devices that take part, this one included; 2 between slices.
      times: executions per run of the program: the product of the trip counts of all loops around it.
      loops: ``op_name`` of the loops around it, the outermost first.
      computation: name of the HLO computation that contains it.
      op_name: its place in the traced program, such as ``jit(step)/.../layers/mixer/wq/dot_general``.
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
        """Return the bytes that a device sends to others per execution, by the ring algorithm."""
        if self.kind in ("collective-permute", BETWEEN_SLICES):
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """Return all collectives that a program runs, in the order of its text.

    A loop whose trip count is not in the text counts as one iteration; for scans it is in the text.

    Args:
      text: ``compiled.as_text()``.
    """
    computations, entry = parse(text)
    match = re.search(r"num_partitions=(\d+)", text[:100_000])
    devices = int(match[1]) if match else 1
    return list(_walk(computations, entry, devices, 1, (), set(), ""))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind that a chip takes part in in a run of the program."""

    count: int
    bytes: int  # sizes of the whole arrays
    sent: float  # bytes that the chip sends to others


def by_kind(found: Sequence[Collective]) -> dict[str, Traffic]:
    """Sum the collectives of each kind, each as often as it is executed."""
    kinds = {}
    for kind in KINDS:
        some = [c for c in found if c.kind == kind]
        if some:
            kinds[kind] = Traffic(
                sum(c.times for c in some), sum(c.times * c.bytes for c in some), sum(c.times * c.sent for c in some)
            )
    return kinds


def _walk(
    computations: Computations,
    name: str,
    devices: int,
    times: int,
    loops: tuple[str, ...],
    started: set[str],
    caller: str,
) -> Iterator[Collective]:
    """Yield the collectives of a computation and of all computations that it calls.

    TPU programs spread an asynchronous collective over a chain of fusions, which all contain a copy of it with the same
    channel. ``started`` holds the channels of chains that have begun, and is passed into loops that run beside them.
    """
    for instruction in computations[name]:
        op_name = instruction.op_name or caller
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and "megascale" in instruction.rest:
            size = array_bytes(elements(instruction.shape)[0])
            yield Collective(BETWEEN_SLICES, size, 2, times, loops, name, op_name)
        elif kind in ON_DEVICE:
            if "chain_id=" in instruction.rest:
                channel = instruction.attribute(r"channel_id=(\d+)")
                if channel in started:
                    continue
                started.add(channel)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # a fusion of TPU programs: a sum of which each device keeps a part
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
    """Return the number of devices in the group of a collective, from any of the notations of HLO."""
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
    """Return the bytes of a collective's result; the shape of an asynchronous start has the operands before it."""
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return array_bytes(elements(instruction.shape)[1])
    return array_bytes(instruction.shape)
