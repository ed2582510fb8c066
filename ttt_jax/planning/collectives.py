"""List the collectives between chips that a compiled program runs.

XLA's own counts take the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from ttt_jax.planning.constants import Constants
from ttt_jax.planning.hlo import Instruction, array_bytes, elements, parse
from ttt_jax.planning.loops import trip_count

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


def read(text: str) -> list[Collective]:
    """Return all collectives that a program runs, in the order of its text.

    A loop whose trip count is not in the text counts as one iteration; for scans it is in the text.

    Args:
      text: ``compiled.as_text()``.
    """
    computations, entry = parse(text)
    constants = Constants(computations)
    match = re.search(r"num_partitions=(\d+)", text[:100_000])
    devices = int(match[1]) if match else 1
    return list(_walk(constants, entry, devices, 1, (), set(), ""))


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
    constants: Constants,
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
    for instruction in constants.computations[name]:
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
            trips = trip_count(instruction, name, constants) or 1
            yield from _walk(constants, body, devices, times * trips, (*loops, op_name), set(started), op_name)
        else:
            for called in instruction.called:
                inside = started if instruction.opcode == "fusion" else set()
                if called in constants.computations:
                    yield from _walk(constants, called, devices, times, loops, inside, op_name)


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
