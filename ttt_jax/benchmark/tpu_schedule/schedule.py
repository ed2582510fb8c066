"""A program's schedule: each operation with its cycles, its bytes of HBM and its time."""

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from ttt_jax.benchmark.tpu_schedule import bundles, compile, hlo_operations
from ttt_jax.benchmark.tpu_schedule import listing as listing_lib
from ttt_jax.benchmark.tpu_schedule.bundles import Counts
from ttt_jax.benchmark.tpu_schedule.compile import Compiled, Function, Step
from ttt_jax.benchmark.tpu_schedule.hlo_operations import Operation
from ttt_jax.benchmark.tpu_schedule.listing import ScheduleError
from ttt_jax.distributed.chips import CHIPS
from ttt_jax.errors import ConfigError
from ttt_jax.planning import hlo, topology


@dataclasses.dataclass(frozen=True)
class Clocked:
    """A chip.

    Attributes:
      products: multiply-adds per cycle of all its matrix units: cloud.google.com/tpu/docs has 4 units of 128 x 128 per
        core, v6e 2 of 256 x 256, to each of which its compiler gives 2 rows per cycle.
      cores: that share the work on a chip; the schedule is that of one.
      clock: Hz.
      hbm_bandwidth: bytes/s, of the data sheet.
    """

    name: str
    products: int
    cores: int
    clock: float
    hbm_bandwidth: float


def _clocked(name: str, products: int, cores: int = 1) -> Clocked:
    chip = next(chip for chip in CHIPS if chip.name == name)
    return Clocked(name, products, cores, chip.peak_flops / (2 * products), chip.hbm_bandwidth)


CLOCKED = {
    "v5e": _clocked("v5e", 4 * 128 * 128),
    "v6e": _clocked("v6e", 2 * 256 * 256 * 2),
    "v5p": _clocked("v5p", 2 * 4 * 128 * 128, cores=2),
}


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An operation as it is scheduled.

    Attributes:
      counts: of one execution; None where it has no schedule of its own, as it only starts a copy or handles scalars,
        and where its cycles mean nothing, as it waits for other chips.
      control_cycles: around it, of all executions.
    """

    operation: Operation
    counts: Counts | None
    control_cycles: int
    chip: Clocked

    @property
    def cycles(self) -> int:
        """Of all executions, with what is around them."""
        return self.control_cycles + (self.operation.times * self.counts.cycles if self.counts else 0)

    @property
    def hbm_bytes(self) -> int:
        """Of all executions."""
        return self.operation.times * self.operation.hbm_bytes

    @property
    def compute_seconds(self) -> float:
        """Of its cycles."""
        return self.cycles / self.chip.clock

    @property
    def memory_seconds(self) -> float:
        """Of its bytes, at the bandwidth of the data sheet."""
        return self.hbm_bytes / self.chip.hbm_bandwidth

    @property
    def seconds(self) -> float:
        """The larger of both; the time of its bytes does not count where they move beside other operations."""
        return self.compute_seconds if self.operation.asynchronous else max(self.compute_seconds, self.memory_seconds)

    def utilization(self, unit: str) -> float:
        """The share of its cycles, times units, in which one of a kind is used."""
        if self.counts is None or not self.counts.cycles or not self.counts.capacity.get(unit):
            return 0.0
        return self.counts.slots[unit] / (self.counts.cycles * self.counts.capacity[unit])


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One run of a program on one chip.

    Attributes:
      operations: in the order of the hlo_operations.
      other_cycles: before the first operation and after the last.
      loops: where each comes from, and its trips; None where these are not known: they count as one.
      conditionals: of the program; all of their branches count.
      collectives: between chips; they have bytes and no time.
      without_schedule: operations that are called, but no schedule was found for; they count no cycles.
      unmatched: schedules of no operation of the program; they do not count.
    """

    target: str
    topology: str
    chip: Clocked
    compiled: Compiled
    operations: list[Scheduled]
    other_cycles: int
    loops: list[tuple[str, int | None]]
    conditionals: int
    collectives: list[hlo.Collective]
    without_schedule: list[str]
    unmatched: list[str]

    @cached_property
    def cycles(self) -> int:
        """Of all operations and what is between them."""
        return sum(o.cycles for o in self.operations) + self.other_cycles

    @property
    def control_cycles(self) -> int:
        """Of these, between operations."""
        return sum(o.control_cycles for o in self.operations) + self.other_cycles

    @cached_property
    def hbm_bytes(self) -> int:
        """Read and written."""
        return sum(o.hbm_bytes for o in self.operations)

    @property
    def compute_seconds(self) -> float:
        """Of all cycles."""
        return self.cycles / self.chip.clock

    @property
    def memory_seconds(self) -> float:
        """Of all bytes, at the bandwidth of the data sheet."""
        return self.hbm_bytes / self.chip.hbm_bandwidth

    @cached_property
    def seconds(self) -> float:
        """The estimate: every operation as long as the longer of its cycles and its bytes take, one after the other;
        at least as long as all bytes take."""
        one_by_one = sum(o.seconds for o in self.operations) + self.other_cycles / self.chip.clock
        return max(one_by_one, self.memory_seconds)

    def utilization(self, unit: str) -> float:
        """The share of all cycles, times units, in which one of a kind is used: ``MATMUL``, ``XLU``, ``VALU``, ..."""
        counted = [o for o in self.operations if o.counts]
        used = sum(o.operation.times * o.counts.slots.get(unit, 0) for o in counted if o.counts)
        capacity = next((o.counts.capacity.get(unit, 0) for o in counted if o.counts), 0)
        return used / (self.cycles * capacity) if capacity else 0.0

    @property
    def waiting(self) -> float:
        """The share of all cycles in which operations issue nothing, as they wait for results or for a unit."""
        return sum(o.operation.times * o.counts.empty for o in self.operations if o.counts) / self.cycles

    @property
    def units(self) -> list[str]:
        """Kinds of units, as the compiler calls them."""
        return next((list(o.counts.slots) for o in self.operations if o.counts), [])

    @property
    def vmem_bytes(self) -> int:
        """The most that an operation takes of vector memory for itself; what stays there between operations, not."""
        return max((o.operation.vmem_bytes for o in self.operations), default=0)

    @property
    def uncertain_cycles(self) -> int:
        """Cycles that may be skipped, by a branch that is not known."""
        return sum(o.operation.times * o.counts.uncertain for o in self.operations if o.counts)

    @property
    def unknown_loops(self) -> int:
        """Loops, of the program and inside operations, that count as one turn as their trips are not known."""
        inside = sum(o.counts.unknown_loops for o in self.operations if o.counts)
        return inside + sum(trips is None for _, trips in self.loops)


def measure(target: Function | Step, topology_name: str = "v5e:1x1", keep: Path | None = None) -> Schedule:
    """Compiles a target for chips that need not be there, and counts.

    Args:
      topology_name: ``v5e:2x2`` and its like; a function runs on one chip of it.
      keep: a folder that keeps the program and the compiler's files; without, they are removed.

    Raises:
      ConfigError: where the target or the topology cannot be.
      ScheduleError: where the compiler fails, or leaves a schedule in a form not known here.
    """
    parsed = topology.parse(topology_name)
    if parsed.chip not in CLOCKED:
        raise ConfigError(f"--topology {topology_name}: has no schedule; expected one of {', '.join(CLOCKED)}")
    with _folder(keep) as folder:
        compiled = compile.run(target, topology_name, folder)
        return read(str(target), topology_name, compiled, folder / compile.DUMP)


def read(target: str, topology_name: str, compiled: Compiled, dump: Path) -> Schedule:
    """Counts what a compilation left."""
    chip = CLOCKED[topology.parse(topology_name).chip]
    files = _files(dump)
    if "TLP" not in files:
        raise ScheduleError(
            f"the compiler left {len(files)} schedules and none of the program that calls them; "
            "known to work: libtpu 0.0.52"
        )
    found = hlo_operations.read(compiled.text)
    listing = files["TLP"][0].read_text(errors="replace")
    calls = set(listing_lib.called(listing))
    counted = {name: _counts(name, *pair) for name, pair in files.items() if name != "TLP"}
    by_signature = {o.signature: counted[o.name] for o in found.operations if o.name in counted}
    times = {o.name: o.times for o in found.operations}
    around = listing_lib.cycles(listing, times)
    operations = []
    for o in found.operations:
        counts = None if o.asynchronous else counted.get(o.name, by_signature.get(o.signature))
        operations.append(Scheduled(o, counts, around.pop(o.name, 0), chip))
    ends = sum(counts.cycles for name, counts in counted.items() if name.startswith("<late-"))
    return Schedule(
        target=target,
        topology=topology_name,
        chip=chip,
        compiled=compiled,
        operations=operations,
        other_cycles=ends + sum(around.values()),
        loops=found.loops,
        conditionals=found.conditionals,
        collectives=hlo.collectives(compiled.text),
        without_schedule=[
            o.operation.name
            for o in operations
            if o.counts is None and o.operation.name in calls and not o.operation.asynchronous
        ],
        unmatched=[name for name in counted if name not in times and not name.startswith("<late-")],
    )


def _counts(name: str, listing: Path, utilization: Path) -> Counts:
    try:
        return bundles.counts(listing.read_text(errors="replace"), utilization.read_text(errors="replace"))
    except ScheduleError as error:
        raise ScheduleError(f"the schedule of {name}: {error}") from error


def _files(dump: Path) -> dict[str, tuple[Path, Path]]:
    """Listing and utilization of each operation; of several tries of the compiler, the last."""
    found: dict[str, tuple[Path, Path]] = {}
    for listing in sorted(dump.glob(f"*-{compile.LISTING}.txt")):
        match = re.fullmatch(rf"(\d+-(.+))-\d+-{compile.LISTING}\.txt", listing.name)
        if match is None:
            continue
        others = sorted(dump.glob(f"{_escaped(match[1])}-[0-9]*-{compile.UTILIZATION}.txt"))
        if not others:
            raise ScheduleError(f"the schedule of {match[2]}: no utilization beside it")
        found[match[2]] = (listing, others[0])
    return found


def _escaped(name: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", name)


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise ConfigError(f"--keep {keep}: is not empty; expected a new folder")
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="ttt-schedule-") as folder:
        yield Path(folder)
