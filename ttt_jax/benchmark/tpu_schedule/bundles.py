"""Count the cycles of one operation, and the use of each unit, from the bundles that the TPU compiler scheduled.

A TPU core issues one bundle of instructions per cycle, and waits are empty bundles, so the bundles that run are the
cycles that pass. To find how often each bundle runs, the scalar instructions on which branches depend are executed:
loops over blocks with their pipelined first and last turns, and what a kernel does in its first turn only. Where a
branch depends on an unknown value, such as one read from memory, it counts as not taken, and is reported.

The listing is ``packed-bundles-post-ra``: after register allocation, in static single assignment, with addresses in
order. Later listings leave out the waits.
"""

import bisect
import dataclasses
import re
from collections import Counter
from collections.abc import Callable

from ttt_jax.benchmark.tpu_schedule.listing import DELAY_SLOTS, ScheduleError, branches, parse


@dataclasses.dataclass(frozen=True)
class Counts:
    """The counts of one run of an operation.

    Attributes:
      cycles: number of bundles that run.
      empty: number of these bundles without an instruction, which wait for results or for a unit.
      slots: use of each kind of unit, in cycles of one unit: ``MATMUL`` counts the cycles in which a matrix unit takes
        rows. ``VLOAD:FILL`` and ``VSTORE:SPILL`` are the parts of ``VLOAD`` and ``VSTORE`` that only move registers
        from and to memory.
      capacity: number of units of each kind.
      uncertain: cycles that a branch on an unknown value may skip.
      unknown_loops: number of loops with an unknown trip count, which count as one turn.
    """

    cycles: int
    empty: int
    slots: dict[str, int]
    capacity: dict[str, int]
    uncertain: int
    unknown_loops: int


def counts(listing: str, utilization: str) -> Counts:
    """Count one run of an operation.

    Args:
      listing: the ``packed-bundles-post-ra`` of the operation.
      utilization: its ``hlo-static-per-bundle-utilization``.

    Raises:
      ScheduleError: where one of them is not in a known form.
    """
    bundles = parse(listing)
    names, capacity, rows = _utilization(utilization)
    if len(rows) != len(bundles):
        raise ScheduleError(f"{len(rows)} rows of utilization for {len(bundles)} bundles; expected as many")
    run = Run(bundles)
    slots, empty = [0] * len(names), 0
    for times, bundle, row in zip(run.times, bundles, rows, strict=True):
        if not times:
            continue
        empty += 0 if bundle else times
        for index, used in enumerate(row):
            slots[index] += times * used
    return Counts(
        cycles=sum(run.times),
        empty=empty,
        slots=dict(zip(names, slots, strict=True)),
        capacity=dict(zip(names, capacity, strict=True)),
        uncertain=run.uncertain,
        unknown_loops=len(run.unknown_loops),
    )


def _utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Return the names of slots, the number of each, and how many each bundle uses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rows = [[int(n) for n in line.split()] for line in lines if re.fullmatch(r"[\d ]+", line)]
    names = next((line.split(", ") for line in lines if line.startswith("MATMUL, ")), [])
    if not names or len(rows) < 2 or {len(row) for row in rows} != {len(names)}:
        raise ScheduleError(f"utilization of an unknown form: {' / '.join(lines[:4])[:120]}")
    return names, rows[0], rows[1:]


_MOST_SEGMENTS = 2_000_000  # straight runs between branches
_WORD = 1 << 32


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A scalar instruction; ``predicate`` and ``operands`` are names, ``!`` before negated ones, or numbers."""

    result: str
    opcode: str
    predicate: str
    otherwise: str  # the result of a move where the predicate does not hold
    operands: tuple[str, ...]


class Run:
    """A run of the bundles of a schedule, in which scalar instructions are executed as far as branches depend on them.

    Attributes:
      times: how often each bundle ran.
      uncertain: executions of bundles that a branch on an unknown value may skip.
      unknown_loops: bundles that end a loop with an unknown trip count.

    Raises:
      ScheduleError: for a branch of an unknown form, and where the run does not end.
    """

    def __init__(self, bundles: list[str]):
        self.times = [0] * len(bundles)
        self.uncertain = 0
        self.unknown_loops: set[int] = set()
        self._branches = branches(bundles)
        self._instructions, self._defined = _needed(bundles, [p for p, _ in self._branches.values()])
        self._places = sorted(self._instructions)
        self._values: dict[str, int | None] = {}
        self._go(len(bundles))

    def _go(self, end: int) -> None:
        branches, segments, skipped = sorted(self._branches), Counter[tuple[int, int]](), set[tuple[int, int]]()
        start, jumped_back = 0, False
        for _ in range(_MOST_SEGMENTS):
            index = bisect.bisect_left(branches, start)
            if index == len(branches):
                segments[start, end] += 1
                break
            at = branches[index]
            predicate, target = self._branches[at]
            self._evaluate(start, at + 1, jumped_back)
            taken = self._value(predicate) if predicate else 1
            if taken is None and target <= at:
                self.unknown_loops.add(at)
            elif taken is None:
                skipped.add((at + 1 + DELAY_SLOTS, target))
            if not taken:
                segments[start, at + 1] += 1
                start, jumped_back = at + 1, False
                continue
            self._evaluate(at + 1, at + 1 + DELAY_SLOTS, False)
            segments[start, min(end, at + 1 + DELAY_SLOTS)] += 1
            start, jumped_back = target, target <= at
        else:
            raise ScheduleError(f"a schedule that does not end within {_MOST_SEGMENTS} runs between branches")
        self._count(segments, skipped, end)

    def _count(self, segments: Counter, skipped: set[tuple[int, int]], end: int) -> None:
        changes, doubt = [0] * (end + 1), [0] * (end + 1)
        for (first, last), n in segments.items():
            changes[first] += n
            changes[last] -= n
        for first, last in skipped:
            doubt[min(first, end)] += 1
            doubt[min(last, end)] -= 1
        running = doubts = 0
        for index in range(end):
            running += changes[index]
            doubts += doubt[index]
            self.times[index] = running
            self.uncertain += running if doubts > 0 else 0

    def _evaluate(self, start: int, end: int, jumped_back: bool) -> None:
        """Execute the instructions of bundles; in each bundle, those that merge values come first."""
        for place in self._places[bisect.bisect_left(self._places, start) : bisect.bisect_left(self._places, end)]:
            instructions = self._instructions[place]
            turn = jumped_back and place == start
            merged = {i.result: self._merge(i, place, turn) for i in instructions if i.opcode == "sphi"}
            self._values.update(merged)
            for instruction in instructions:
                if instruction.opcode != "sphi":
                    self._values[instruction.result] = self._result(instruction)

    def _merge(self, phi: _Instruction, place: int, turn: bool) -> int | None:
        """Return the operand from inside the loop after a jump back to its start, else the one from before the loop."""
        for operand in phi.operands:
            if (self._defined.get(operand, -1) >= place) == turn:
                return self._value(operand)
        return None

    def _result(self, i: _Instruction) -> int | None:
        if i.opcode == "scalar_select":
            choice = self._value(i.operands[0])
            return None if choice is None else self._value(i.operands[1 if choice else 2])
        if i.predicate and (i.otherwise or i.opcode == "sst"):
            holds = self._value(i.predicate)
            if not holds:
                return None if holds is None else self._value(i.otherwise or i.result)
        values = [self._value(operand) for operand in i.operands]
        if i.opcode in _THREE_VALUED:
            return _THREE_VALUED[i.opcode](*values)
        known = [v for v in values if v is not None]
        if len(known) < len(values) or i.opcode not in _OPCODES:
            return None
        return int(_OPCODES[i.opcode](*known)) % _WORD

    def _value(self, operand: str) -> int | None:
        if operand.startswith("!"):
            value = self._value(operand[1:])
            return None if value is None else int(not value)
        return int(operand) % _WORD if operand.isdecimal() else self._values.get(operand)


def _signed(x: int) -> int:
    return x - _WORD if x >= _WORD // 2 else x


def _or(a: int | None, b: int | None) -> int | None:
    return 1 if a or b else (None if a is None or b is None else 0)


def _and(a: int | None, b: int | None) -> int | None:
    return 0 if 0 in (a, b) else (None if a is None or b is None else 1)


def _not(a: int | None) -> int | None:
    return None if a is None else int(not a)


_THREE_VALUED: dict[str, Callable[..., int | None]] = {
    "por": _or,
    "pand": _and,
    "pnor": lambda a, b: _not(_or(a, b)),
    "pnand": lambda a, b: _not(_and(a, b)),
    "pneg": _not,
    "pmov": lambda a: a,
}
_OPCODES: dict[str, Callable[..., int]] = {
    "smov.u32": lambda a: a,
    "sld": lambda a: a,
    "sst": lambda a: a,
    "sadd.s32": lambda a, b: a + b,
    "ssub.s32": lambda a, b: a - b,
    "smul.u32": lambda a, b: a * b,
    "sand.u32": lambda a, b: a & b,
    "sor.u32": lambda a, b: a | b,
    "sxor.u32": lambda a, b: a ^ b,
    "sshll.u32": lambda a, b: a << b if b < 32 else 0,
    "sshrl.u32": lambda a, b: a >> b if b < 32 else 0,
    "sshra.s32": lambda a, b: _signed(a) >> min(b, 31),
    "smin.u32": min,
    "smax.u32": max,
    **{
        f"scmp.{name}.{kind}": (lambda a, b, compare=compare, sign=sign: compare(sign(a), sign(b)))
        for kind, sign in (("s32.totalorder", _signed), ("u32.totalorder", int), ("s32", _signed), ("u32", int))
        for name, compare in (
            ("eq", int.__eq__), ("ne", int.__ne__), ("lt", int.__lt__),
            ("le", int.__le__), ("gt", int.__gt__), ("ge", int.__ge__),
        )
    },
}  # fmt: skip
_RESULT = re.compile(r"(?:(%\w+) = )?((?:s|p)[a-z][\w.]*) ?(.*)")
_PREDICATE = re.compile(r"\((!?%\w+)(?:, (%\w+))?\),? ?")
_SPILLED = re.compile(r"\[smem:\[(#allocation\d+_spill)\]\]")


def _instruction(text: str) -> _Instruction | None:
    """Parse a scalar instruction; return None for others. A spilled register gets the name of its place in memory."""
    match = _RESULT.fullmatch(text.strip())
    if match is None:
        return None
    result, opcode, rest = match[1] or "", match[2], match[3]
    predicate = otherwise = ""
    if found := _PREDICATE.search(rest):
        predicate, otherwise = found[1], found[2] or ""
        rest = rest[: found.start()] + rest[found.end() :]
    spilled = _SPILLED.search(rest)
    if opcode == "sst":
        result, rest = (spilled[1], rest[spilled.end() :]) if spilled else ("", "")
    elif opcode == "sld":
        rest = spilled[1] if spilled else "?"
    operands = tuple(part.strip() for part in rest.split(",") if part.strip())
    return _Instruction(result, opcode, predicate, otherwise, operands) if result else None


def _needed(bundles: list[str], predicates: list[str]) -> tuple[dict[int, list[_Instruction]], dict[str, int]]:
    """Return the instructions that predicates depend on, by bundle, and the bundle in which each name is defined."""
    by_result: dict[str, list[tuple[int, _Instruction]]] = {}
    for place, bundle in enumerate(bundles):
        for text in bundle.split(";;"):
            if instruction := _instruction(text):
                by_result.setdefault(instruction.result, []).append((place, instruction))
    needed: dict[int, list[_Instruction]] = {}
    left, seen = [p.lstrip("!") for p in predicates], set[str]()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for place, instruction in by_result.get(name, []):
            needed.setdefault(place, []).append(instruction)
            operands = (*instruction.operands, instruction.predicate, instruction.otherwise)
            left += [operand.lstrip("!") for operand in operands]
    return needed, {name: uses[0][0] for name, uses in by_result.items()}
