"""One operation as the TPU compiler scheduled it: the bundles that run, how often, and what the units do in them.

A TPU core issues one bundle of instructions per cycle, waits included as empty bundles, so the bundles that run are the
cycles that pass. Which of them run how often is found by running the program's scalar instructions, as far as its
branches depend on them: loops over blocks, their pipelined first and last turns, what a kernel does in its first turn
only. What cannot be known that way (a value read from memory) is counted as if no branch were taken, and told.

The listing is ``packed-bundles-post-ra``: after register allocation, in static single assignment, its addresses in
order. Later listings leave out the waits.
"""

import dataclasses
import re

from ttt_jax.benchmark.tpu_schedule import scalar
from ttt_jax.benchmark.tpu_schedule.listing import ScheduleError, parse


@dataclasses.dataclass(frozen=True)
class Counts:
    """One run of an operation.

    Attributes:
      cycles: bundles that run.
      empty: of these, the bundles without an instruction: waiting for results or for a unit.
      slots: how much of each kind of unit is used, in cycles of one: ``MATMUL`` counts the cycles for which a matrix
        unit takes rows. ``VLOAD:FILL`` and ``VSTORE:SPILL`` are the part of ``VLOAD`` and ``VSTORE`` that moves
        registers from and to memory for want of registers.
      capacity: how many units there are of a kind.
      uncertain: cycles that may be skipped by a branch that is not known.
      unknown_loops: loops whose trip count is not known; they count as one turn.
    """

    cycles: int
    empty: int
    slots: dict[str, int]
    capacity: dict[str, int]
    uncertain: int
    unknown_loops: int


def counts(listing: str, utilization: str) -> Counts:
    """Counts one run of an operation.

    Args:
      listing: its ``packed-bundles-post-ra``.
      utilization: its ``hlo-static-per-bundle-utilization``.

    Raises:
      ScheduleError: where these are not in the form known here.
    """
    bundles = parse(listing)
    names, capacity, rows = _utilization(utilization)
    if len(rows) != len(bundles):
        raise ScheduleError(f"{len(rows)} rows of utilization for {len(bundles)} bundles; expected as many")
    run = scalar.Run(bundles)
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
    """Names of slots, how many of each there are, and how many are used in each bundle."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rows = [[int(n) for n in line.split()] for line in lines if re.fullmatch(r"[\d ]+", line)]
    names = next((line.split(", ") for line in lines if line.startswith("MATMUL, ")), [])
    if not names or len(rows) < 2 or {len(row) for row in rows} != {len(names)}:
        raise ScheduleError(f"utilization of an unknown form: {' / '.join(lines[:4])[:120]}")
    return names, rows[0], rows[1:]
