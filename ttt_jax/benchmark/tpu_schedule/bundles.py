"""Count the cycles of one operation, and the use of each unit, from the bundles that the TPU compiler scheduled.

A TPU core issues one bundle of instructions per cycle, and waits are empty bundles, so the bundles that run are the
cycles that pass. Where a branch depends on an unknown value, such as one read from memory, it counts as not taken, and
the region that it may skip is reported.

The listing is ``packed-bundles-post-ra``: after register allocation, in static single assignment, with addresses in
order. Later listings leave out the waits.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from ttt_jax.benchmark.tpu_schedule import scalar_instructions
from ttt_jax.benchmark.tpu_schedule.listing import ScheduleError, parse
from ttt_jax.benchmark.tpu_schedule.scalar_run import Run


@dataclasses.dataclass(frozen=True)
class Region:
    """A region of bundles behind a branch on a value in memory, such as the mask of a block of attention.

    Attributes:
      cycles: cycles of one pass, or their mean, with all regions inside.
      passes: number of passes that count.
      reached: number of passes if none of them is skipped.
      known: whether the value is a constant of the program, so that ``passes`` is what happens.
    """

    cycles: int
    passes: int
    reached: int
    known: bool


@dataclasses.dataclass(frozen=True)
class Counts:
    """The counts of one run of an operation.

    Attributes:
      cycles: number of bundles that run.
      raw_cycles: the same, if branches on values in memory skip nothing.
      empty: number of these bundles without an instruction, which wait for results or for a unit.
      slots: use of each kind of unit, in cycles of one unit: ``MATMUL`` counts the cycles in which a matrix unit takes
        rows. ``VLOAD:FILL`` and ``VSTORE:SPILL`` are the parts of ``VLOAD`` and ``VSTORE`` that only move registers
        from and to memory.
      capacity: number of units of each kind.
      regions: regions behind a branch on a value in memory.
      uncertain: cycles that a branch on an unknown value may skip.
      unknown_loops: number of loops with an unknown trip count, which count as one turn.
    """

    cycles: int
    raw_cycles: int
    empty: int
    slots: dict[str, int]
    capacity: dict[str, int]
    regions: tuple[Region, ...]
    uncertain: int
    unknown_loops: int


def counts(listing: str, utilization: str, constants: Mapping[int, Sequence[int]] | None = None) -> Counts:
    """Count one run of an operation.

    Args:
      listing: the ``packed-bundles-post-ra`` of the operation.
      utilization: its ``hlo-static-per-bundle-utilization``.
      constants: the words of those operands that are constants, by the number of the operand.

    Raises:
      ScheduleError: where one of them is not in a known form.
    """
    bundles = parse(listing)
    names, capacity, rows = _utilization(utilization)
    if len(rows) != len(bundles):
        raise ScheduleError(f"{len(rows)} rows of utilization for {len(bundles)} bundles; expected as many")
    raw = run = Run(bundles)
    if constants and (raw.unknown or raw.unknown_loops):
        operands = scalar_instructions.copied_operands(bundles)
        run = Run(bundles, {name: constants[n] for name, n in operands.items() if n in constants})
    slots, empty = [0] * len(names), 0
    for times, bundle, row in zip(run.times, bundles, rows, strict=True):
        if not times:
            continue
        empty += 0 if bundle else times
        for index, used in enumerate(row):
            slots[index] += times * used
    return Counts(
        cycles=sum(run.times),
        raw_cycles=sum(raw.times),
        empty=empty,
        slots=dict(zip(names, slots, strict=True)),
        capacity=dict(zip(names, capacity, strict=True)),
        regions=_regions(raw, run),
        uncertain=run.uncertain,
        unknown_loops=len(run.unknown_loops),
    )


def _regions(raw: Run, run: Run) -> tuple[Region, ...]:
    """Return the regions that branches may skip by what nothing is known of in one run, and perhaps in another."""
    found = []
    for at, (first, last) in sorted(raw.unknown.items()):
        reached = raw.passes[at]
        cycles = round(sum(raw.times[first:last]) / reached)
        if cycles:
            found.append(Region(cycles, run.passes[at], reached, at not in run.unknown))
    return tuple(found)


def _utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Return the names of slots, the number of each, and how many each bundle uses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rows = [[int(n) for n in line.split()] for line in lines if re.fullmatch(r"[\d ]+", line)]
    names = next((line.split(", ") for line in lines if line.startswith("MATMUL, ")), [])
    if not names or len(rows) < 2 or {len(row) for row in rows} != {len(names)}:
        raise ScheduleError(f"utilization of an unknown form: {' / '.join(lines[:4])[:120]}")
    return names, rows[0], rows[1:]
