"""Execute the scalar instructions of a schedule, to find how often each of its bundles runs.

Only instructions on which branches depend are executed: loops over blocks with their pipelined first and last turns,
and what a kernel does in some of its turns. A value that is read from memory is known where a kernel copies the operand
there when it begins, and the operand is a constant of the program, such as the mask of the blocks that attention
computes. A branch on an unknown value counts as not taken.
"""

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence

from ttt_jax.benchmark.tpu_schedule import scalar_instructions as scalar
from ttt_jax.benchmark.tpu_schedule.listing import DELAY_SLOTS, ScheduleError, branches
from ttt_jax.benchmark.tpu_schedule.scalar_instructions import WORD, Instruction

_MOST_SEGMENTS = 2_000_000  # straight runs between branches


class Run:
    """A run of the bundles of a schedule.

    Attributes:
      times: how often each bundle ran.
      passes: how often each branch forward was not taken, by its bundle.
      unknown: the first bundle of the region behind each branch forward on an unknown value, and the first one after
        it, by the bundle of the branch.
      unknown_loops: bundles that end a loop with an unknown trip count.

    Raises:
      ScheduleError: for a branch of an unknown form, and where the run does not end.
    """

    def __init__(self, bundles: list[str], memory: Mapping[str, Sequence[int]] | None = None):
        """Run bundles.

        Args:
          memory: the words of scalar memory that are known, by the name of their allocation.
        """
        self.times = [0] * len(bundles)
        self.passes = Counter[int]()
        self.unknown: dict[int, tuple[int, int]] = {}
        self.unknown_loops: set[int] = set()
        self._memory = memory or {}
        self._branches = branches(bundles)
        self._instructions, self._defined = scalar.needed(bundles, [p for p, _ in self._branches.values()])
        self._places = sorted(self._instructions)
        self._values: dict[str, int | None] = {}
        self._go(len(bundles))

    @property
    def uncertain(self) -> int:
        """Return the number of executions of bundles that a branch on an unknown value may skip."""
        inside = {place for region in self.unknown.values() for place in range(*region)}
        return sum(self.times[place] for place in inside)

    def _go(self, end: int) -> None:
        branches, segments = sorted(self._branches), Counter[tuple[int, int]]()
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
                self.unknown[at] = (min(at + 1 + DELAY_SLOTS, end), min(target, end))
            if not taken:
                self.passes[at] += target > at
                segments[start, at + 1] += 1
                start, jumped_back = at + 1, False
                continue
            self._evaluate(at + 1, at + 1 + DELAY_SLOTS, False)
            segments[start, min(end, at + 1 + DELAY_SLOTS)] += 1
            start, jumped_back = target, target <= at
        else:
            raise ScheduleError(f"a schedule that does not end within {_MOST_SEGMENTS} runs between branches")
        self._count(segments, end)

    def _count(self, segments: Counter, end: int) -> None:
        changes = [0] * (end + 1)
        for (first, last), n in segments.items():
            changes[first] += n
            changes[last] -= n
        running = 0
        for index in range(end):
            running += changes[index]
            self.times[index] = running

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

    def _merge(self, phi: Instruction, place: int, turn: bool) -> int | None:
        """Return the operand from inside the loop after a jump back to its start, else the one from before the loop."""
        for operand in phi.operands:
            if (self._defined.get(operand, -1) >= place) == turn:
                return self._value(operand)
        return None

    def _result(self, i: Instruction) -> int | None:
        if i.opcode == "scalar_select":
            choice = self._value(i.operands[0])
            return None if choice is None else self._value(i.operands[1 if choice else 2])
        if i.predicate and (i.otherwise or i.opcode == "sst"):
            holds = self._value(i.predicate)
            if not holds:
                return None if holds is None else self._value(i.otherwise or i.result)
        values = [self._value(operand) for operand in i.operands]
        if i.memory:
            return self._load(i.memory, values)
        if i.opcode in scalar.THREE_VALUED:
            return scalar.THREE_VALUED[i.opcode](*values)
        known = [v for v in values if v is not None]
        if len(known) < len(values) or i.opcode not in scalar.OPCODES:
            return None
        return int(scalar.OPCODES[i.opcode](*known)) % WORD

    def _load(self, allocation: str, offsets: list[int | None]) -> int | None:
        """Return the word of an allocation at the sum of offsets."""
        words = self._memory.get(allocation, ())
        address = sum(offset for offset in offsets if offset is not None)
        return words[address] if None not in offsets and address < len(words) else None

    def _value(self, operand: str) -> int | None:
        if operand.startswith("!"):
            value = self._value(operand[1:])
            return None if value is None else int(not value)
        return int(operand) % WORD if operand.isdecimal() else self._values.get(operand)
