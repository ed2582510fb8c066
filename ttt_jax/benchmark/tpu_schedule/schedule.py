"""Compile a program for TPUs that need not be present, and count the cycles, bytes and time of each operation.

Clocks are not published. They follow from the peak of the data sheet and the size of the matrix units, and come out at
1.50 GHz (v5e) and 1.75 GHz (v6e, v5p). That is an assumption, so ratios of times are more reliable than times.
"""

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
from ttt_jax.benchmark.tpu_schedule.hlo_operations import Operation, Words
from ttt_jax.benchmark.tpu_schedule.listing import ScheduleError
from ttt_jax.distributed.chips import CHIPS
from ttt_jax.errors import ConfigError
from ttt_jax.planning import collectives, topology
from ttt_jax.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Clocked:
    """A chip with its clock.

    Attributes:
      products: multiply-adds per cycle of all matrix units. By cloud.google.com/tpu/docs a core has 4 units of
        128 x 128, on v6e 2 of 256 x 256, to each of which the compiler gives 2 rows per cycle.
      cores: number of cores that share the work of a chip; the schedule is for one of them.
      clock: Hz.
      hbm_bandwidth: bytes/s, from the data sheet.
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
    """An operation with its schedule.

    Attributes:
      counts: counts of one execution. None where the operation has no schedule of its own, because it only starts a
        copy or handles scalars, and where its cycles mean nothing, because it waits for other chips.
      control_cycles: cycles of the calling program around the operation, in all executions.
    """

    operation: Operation
    counts: Counts | None
    control_cycles: int
    chip: Clocked

    @property
    def cycles(self) -> int:
        """Return the cycles of all executions, with the control cycles around them."""
        return self.control_cycles + (self.operation.times * self.counts.cycles if self.counts else 0)

    @property
    def hbm_bytes(self) -> int:
        """Return the bytes of HBM of all executions."""
        return self.operation.times * self.operation.hbm_bytes

    @property
    def compute_seconds(self) -> float:
        """Return the time of the cycles."""
        return self.cycles / self.chip.clock

    @property
    def memory_seconds(self) -> float:
        """Return the time of the bytes, at the bandwidth of the data sheet."""
        return self.hbm_bytes / self.chip.hbm_bandwidth

    @property
    def seconds(self) -> float:
        """Return the larger of both times; bytes that move beside other operations take no time of their own."""
        return self.compute_seconds if self.operation.asynchronous else max(self.compute_seconds, self.memory_seconds)

    @property
    def raw_cycles(self) -> int:
        """Return the cycles of all executions, if branches on values in memory skip nothing."""
        return self.control_cycles + (self.operation.times * self.counts.raw_cycles if self.counts else 0)

    @property
    def raw_seconds(self) -> float:
        """Return the estimated time, if branches on values in memory skip nothing."""
        raw = self.raw_cycles / self.chip.clock
        return raw if self.operation.asynchronous else max(raw, self.memory_seconds)

    def utilization(self, unit: str) -> float:
        """Return the share of cycles, times units, in which a unit of a kind is used."""
        if self.counts is None or not self.counts.cycles or not self.counts.capacity.get(unit):
            return 0.0
        return self.counts.slots[unit] / (self.counts.cycles * self.counts.capacity[unit])


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of one run of a program on one chip.

    Attributes:
      operations: operations in the order of the program.
      other_cycles: cycles before the first operation and after the last.
      loops: ``op_name`` and trip count of each loop; a trip count of None is unknown and counts as one.
      conditionals: number of conditionals; all of their branches count.
      collectives: collectives between chips; they have bytes and no time.
      without_schedule: operations that are called but have no schedule; they count no cycles.
      unmatched: schedules that belong to no operation of the program; they do not count.
    """

    target: str
    topology: str
    chip: Clocked
    compiled: Compiled
    operations: list[Scheduled]
    other_cycles: int
    loops: list[tuple[str, int | None]]
    conditionals: int
    collectives: list[Collective]
    without_schedule: list[str]
    unmatched: list[str]

    @cached_property
    def cycles(self) -> int:
        """Return the cycles of all operations and of the program between them."""
        return sum(o.cycles for o in self.operations) + self.other_cycles

    @property
    def control_cycles(self) -> int:
        """Return the cycles between operations."""
        return sum(o.control_cycles for o in self.operations) + self.other_cycles

    @cached_property
    def hbm_bytes(self) -> int:
        """Return the bytes of HBM that are read and written."""
        return sum(o.hbm_bytes for o in self.operations)

    @property
    def compute_seconds(self) -> float:
        """Return the time of all cycles."""
        return self.cycles / self.chip.clock

    @property
    def memory_seconds(self) -> float:
        """Return the time of all bytes, at the bandwidth of the data sheet."""
        return self.hbm_bytes / self.chip.hbm_bandwidth

    @cached_property
    def seconds(self) -> float:
        """Return the estimated time.

        It is the sum over operations of the longer of the times of cycles and bytes, or the time of all bytes where
        that is longer.
        """
        one_by_one = sum(o.seconds for o in self.operations) + self.other_cycles / self.chip.clock
        return max(one_by_one, self.memory_seconds)

    @cached_property
    def raw_seconds(self) -> float:
        """Return the estimated time, if branches on values in memory skip nothing."""
        one_by_one = sum(o.raw_seconds for o in self.operations) + self.other_cycles / self.chip.clock
        return max(one_by_one, self.memory_seconds)

    @property
    def raw_cycles(self) -> int:
        """Return the cycles of the program, if branches on values in memory skip nothing."""
        return sum(o.raw_cycles for o in self.operations) + self.other_cycles

    def utilization(self, unit: str) -> float:
        """Return the share of all cycles, times units, in which a unit of a kind (``MATMUL``, ``XLU``, ...) is used."""
        counted = [o for o in self.operations if o.counts]
        used = sum(o.operation.times * o.counts.slots.get(unit, 0) for o in counted if o.counts)
        capacity = next((o.counts.capacity.get(unit, 0) for o in counted if o.counts), 0)
        return used / (self.cycles * capacity) if capacity else 0.0

    @property
    def waiting(self) -> float:
        """Return the share of all cycles in which operations issue nothing while they wait for results or a unit."""
        return sum(o.operation.times * o.counts.empty for o in self.operations if o.counts) / self.cycles

    @property
    def units(self) -> list[str]:
        """Return the kinds of units, as the compiler names them."""
        return next((list(o.counts.slots) for o in self.operations if o.counts), [])

    @property
    def vmem_bytes(self) -> int:
        """Return the most vector memory that an operation reserves, without what stays there between operations."""
        return max((o.operation.vmem_bytes for o in self.operations), default=0)

    @property
    def regions(self) -> list[tuple[Operation, bundles.Region]]:
        """Return the regions that branches on values in memory may skip, each with its operation."""
        return [(o.operation, region) for o in self.operations if o.counts for region in o.counts.regions]

    @property
    def uncertain_cycles(self) -> int:
        """Return the cycles that a branch on an unknown value may skip."""
        return sum(o.operation.times * o.counts.uncertain for o in self.operations if o.counts)

    @property
    def unknown_loops(self) -> int:
        """Return the number of loops, of the program and inside operations, whose unknown trip count counts as one."""
        inside = sum(o.counts.unknown_loops for o in self.operations if o.counts)
        return inside + sum(trips is None for _, trips in self.loops)


def measure(target: Function | Step, topology_name: str = "v5e:1x1", keep: Path | None = None) -> Schedule:
    """Compile a target for chips that need not be present, and count its schedule.

    Args:
      topology_name: a topology such as ``v5e:2x2``; a function runs on one of its chips.
      keep: a new folder for the program and the compiler's files, which are otherwise removed.

    Raises:
      ConfigError: where the target or the topology does not exist.
      ScheduleError: where the compiler fails, or leaves a schedule in an unknown form.
    """
    parsed = topology.parse(topology_name)
    if parsed.chip not in CLOCKED:
        raise ConfigError(f"--topology {topology_name}: has no schedule; expected one of {', '.join(CLOCKED)}")
    with _folder(keep) as folder:
        compiled = compile.run(target, topology_name, folder)
        return read(str(target), topology_name, compiled, folder / compile.DUMP)


def read(target: str, topology_name: str, compiled: Compiled, dump: Path) -> Schedule:
    """Count the schedule that a compilation has left in a folder."""
    chip = CLOCKED[topology.parse(topology_name).chip]
    files = _files(dump)
    if "TLP" not in files:
        raise ScheduleError(
            f"the compiler left {len(files)} schedules and none of the program that calls them; "
            "known to work: libtpu 0.0.52"
        )
    program = hlo_operations.read(compiled.text)
    listing = files["TLP"][0].read_text(errors="replace")
    calls = set(listing_lib.called(listing))
    names = [name for name in files if name != "TLP"]
    counted: dict[tuple[str, Words], Counts] = {(name, ()): _counts(name, *files[name]) for name in names}
    by_signature = {o.signature: o.name for o in program.operations if o.name in files}
    times = {o.name: o.times for o in program.operations}
    around = listing_lib.cycles(listing, times)
    operations = []
    for o in program.operations:
        key = (o.name if o.name in files else by_signature.get(o.signature, ""), o.constants)
        if key[0] and key not in counted:
            counted[key] = _counts(key[0], *files[key[0]], o.constants)
        operations.append(Scheduled(o, None if o.asynchronous else counted.get(key), around.pop(o.name, 0), chip))
    ends = sum(counted[name, ()].cycles for name in names if name.startswith("<late-"))
    return Schedule(
        target=target,
        topology=topology_name,
        chip=chip,
        compiled=compiled,
        operations=operations,
        other_cycles=ends + sum(around.values()),
        loops=program.loops,
        conditionals=program.conditionals,
        collectives=collectives.read(compiled.text),
        without_schedule=[
            o.operation.name
            for o in operations
            if o.counts is None and o.operation.name in calls and not o.operation.asynchronous
        ],
        unmatched=[name for name in names if name not in times and not name.startswith("<late-")],
    )


def _counts(name: str, listing: Path, utilization: Path, constants: Words = ()) -> Counts:
    try:
        listed, used = (path.read_text(errors="replace") for path in (listing, utilization))
        return bundles.counts(listed, used, dict(constants))
    except ScheduleError as error:
        raise ScheduleError(f"the schedule of {name}: {error}") from error


def _files(dump: Path) -> dict[str, tuple[Path, Path]]:
    """Return the files with listing and utilization of each operation, from the last try of the compiler."""
    files: dict[str, tuple[Path, Path]] = {}
    for listing in sorted(dump.glob(f"*-{compile.LISTING}.txt")):
        match = re.fullmatch(rf"(\d+-(.+))-\d+-{compile.LISTING}\.txt", listing.name)
        if match is None:
            continue
        others = sorted(dump.glob(f"{_escaped(match[1])}-[0-9]*-{compile.UTILIZATION}.txt"))
        if not others:
            raise ScheduleError(f"the schedule of {match[2]}: no utilization beside it")
        files[match[2]] = (listing, others[0])
    return files


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
