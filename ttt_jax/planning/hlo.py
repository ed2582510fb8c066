"""The collectives of a compiled program, read from its optimized HLO text.

XLA's own counts take the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from ttt_jax.planning import hlo_text
from ttt_jax.planning.hlo_text import Computations, Instruction

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
    computations, entry = hlo_text.parse(text)
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
            size = hlo_text.array_bytes(hlo_text.elements(instruction.shape)[0])
            yield Collective(BETWEEN_SLICES, size, 2, times, loops, name, op_name)
        elif kind in _ON_DEVICE:
            if "chain_id=" in instruction.rest:
                channel = instruction.attribute(r"channel_id=(\d+)")
                if channel in started:
                    continue
                started.add(channel)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # a fusion of TPUs: the sum, of which each device keeps a part
                size = hlo_text.array_bytes(instruction.shape)
                group = _group(instruction, devices)
            else:
                group = _group(instruction, devices)
                size = _result_bytes(instruction) * (group if kind == "reduce-scatter" else 1)
            yield Collective(kind, size, group, times, loops, name, op_name)
        elif instruction.opcode == "while":
            body = instruction.attribute(r"body=%?([\w.$-]+)")
            trips = hlo_text.trip_count(instruction, computations) or 1
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
        return hlo_text.array_bytes(hlo_text.elements(instruction.shape)[1])
    return hlo_text.array_bytes(instruction.shape)
