"""Print schedules as text and as JSON."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ttt_jax.benchmark.tpu_schedule.bundles import Region
from ttt_jax.benchmark.tpu_schedule.hlo_operations import Operation
from ttt_jax.benchmark.tpu_schedule.parts import INNER_LOOP, pass_of, place_of, seconds_of_parts
from ttt_jax.benchmark.tpu_schedule.schedule import Schedule, Scheduled
from ttt_jax.planning import collectives
from ttt_jax.terminal import console as console_lib

_UNITS = {
    "MATMUL": "matrix units (MXU)",
    "XLU": "cross-lane units (XLU)",
    "VALU": "vector slots (VPU)",
    "EUP": "transcendentals",
    "VLOAD": "load slots",
    "VSTORE": "store slot",
}
_NOT_MODELLED = (
    "not modelled: waits for DMAs, operations that compete for HBM, collectives between chips, the host. Times assume "
    "the clock; trust ratios first"
)


def text(schedule: Schedule, top: int = 15) -> str:
    """Return a report with the ``top`` operations that take longest."""
    s, chip = schedule, schedule.chip
    console = _console()
    memory = " + ".join(
        f"{_size(n)} {what}"
        for n, what in (
            (s.compiled.arguments, "arguments"),
            (s.compiled.outputs, "outputs"),
            (s.compiled.temporaries, "temporaries"),
        )
    )
    lines = [
        ("program", f"{s.target}, on {s.topology}; compiled in {s.compiled.seconds:.0f} s"),
        ("estimate", f"{_us(s.seconds)} us, at {chip.clock / 1e9:.2f} GHz and {chip.hbm_bandwidth / 1e9:,.0f} GB/s"),
        *([("raw", f"{_us(s.raw_seconds)} us, if nothing is skipped")] if s.raw_seconds != s.seconds else []),
        (
            "computing",
            f"{_us(s.compute_seconds)} us: {s.cycles:,} cycles, {s.control_cycles:,} of them between operations",
        ),
        ("HBM", f"{_us(s.memory_seconds)} us: {_size(s.hbm_bytes)} read and written"),
        ("in HBM", memory),
        *(_units(s)),
    ]
    for name, value in lines:
        console.print(f"{name:<12}{value}", soft_wrap=True)
    for number, (part, seconds) in enumerate(seconds_of_parts(s.operations).items()):
        console.print(f"{'' if number else 'of these':<12}{_us(seconds):>10} us {seconds / s.seconds:>6.1%}  {part}")
    console.print()
    console.print(_operations(s.operations, top, s.seconds))
    console.print()
    for line in (*_remarks(s), _NOT_MODELLED):
        console.print(line, soft_wrap=True)
    return _text(console)


def as_dict(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule for JSON; times in seconds, memory in bytes, cycles and bytes of all executions."""
    s = schedule
    return {
        "target": s.target,
        "topology": s.topology,
        "clock_hz": s.chip.clock,
        "seconds": s.seconds,
        "raw_seconds": s.raw_seconds,
        "compute_seconds": s.compute_seconds,
        "memory_seconds": s.memory_seconds,
        "cycles": s.cycles,
        "raw_cycles": s.raw_cycles,
        "control_cycles": s.control_cycles,
        "hbm_bytes": s.hbm_bytes,
        "utilization": {unit: s.utilization(unit) for unit in s.units},
        "waiting": s.waiting,
        "parts": seconds_of_parts(s.operations),
        "vmem_bytes": s.vmem_bytes,
        "argument_bytes": s.compiled.arguments,
        "output_bytes": s.compiled.outputs,
        "temporary_bytes": s.compiled.temporaries,
        "compile_seconds": s.compiled.seconds,
        "regions": [
            {"operation": o.name, "op_name": o.op_name, "times": o.times, **dataclasses.asdict(region)}
            for o, region in s.regions
        ],
        "uncertain_cycles": s.uncertain_cycles,
        "unknown_loops": s.unknown_loops,
        "conditionals": s.conditionals,
        "without_schedule": s.without_schedule,
        "unmatched_schedules": s.unmatched,
        "loops": [{"op_name": name, "trips": trips} for name, trips in s.loops],
        "collectives": {kind: dataclasses.asdict(found) for kind, found in collectives.by_kind(s.collectives).items()},
        "operations": [_operation(o) for o in s.operations if o.seconds],
    }


def comparison(schedules: Mapping[str, Schedule]) -> str:
    """Return a table with a line per schedule, and its speed as a ratio to the first."""
    first = next(iter(schedules.values()))
    of_step = bool(seconds_of_parts(first.operations))
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    titles = ["us", "ratio", "computing", "HBM", "cycles", "MXU", "XLU", "VPU", "store", "spills", "temporaries"]
    for title in titles + ["inner loop"] * of_step:
        table.add_column(title, justify="right", no_wrap=True)
    for name, s in schedules.items():
        row = [
            _us(s.seconds),
            f"{first.seconds / s.seconds:.2f}x",
            _us(s.compute_seconds),
            _us(s.memory_seconds),
            f"{s.cycles:,}",
            *(f"{s.utilization(unit):.0%}" for unit in ("MATMUL", "XLU", "VALU", "VSTORE", "VSTORE:SPILL")),
            _size(s.compiled.temporaries),
        ]
        inner = seconds_of_parts(s.operations).get(INNER_LOOP, 0.0)
        table.add_row(name, *row, *([f"{_us(inner)} us, {inner / s.seconds:.0%}"] * of_step))
    console = _console()
    console.print(f"{first.target} on {first.topology}, against the first", soft_wrap=True)
    console.print()
    console.print(table)
    console.print()
    for name, s in schedules.items():
        for line in _remarks(s):
            console.print(f"{name}: {line}", soft_wrap=True)
    console.print(_NOT_MODELLED, soft_wrap=True)
    return _text(console)


def _units(s: Schedule) -> list[tuple[str, str]]:
    used = ", ".join(f"{name} {s.utilization(unit):.0%}" for unit, name in _UNITS.items() if unit in s.units)
    spills, fills = (f"{s.utilization(unit):.1%}" for unit in ("VSTORE:SPILL", "VLOAD:FILL"))
    return [
        ("units", used),
        ("waiting", f"{s.waiting:.0%} of all cycles: nothing is issued"),
        ("spills", f"{spills} of the store slots, filled again in {fills} of the load slots"),
        ("VMEM", f"{_size(s.vmem_bytes)}, the most that one operation has for itself"),
    ]


def _operations(operations: Sequence[Scheduled], top: int, total: float) -> Table:
    rows = [
        (
            _us(o.seconds),
            f"{o.seconds / total:.1%}",
            "HBM" if o.memory_seconds > o.compute_seconds else "compute",
            str(o.operation.times),
            f"{o.counts.cycles:,}" if o.counts else "-",
            _size(o.operation.hbm_bytes),
            f"{o.utilization('MATMUL'):.0%}",
            pass_of(o.operation.op_name),
            _shortened(place_of(o.operation.op_name), 56),
            _shortened(o.operation.name, 30),
        )
        for o in sorted(operations, key=lambda o: -o.seconds)[:top]
        if o.seconds
    ]
    table = Table(box=None, pad_edge=False)
    for title in ("us", "share", "bound by", "times", "cycles", "HBM bytes", "MXU"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("pass", "of", "operation"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _shortened(text: str, most: int) -> str:
    """Leave out what is inside of a long path, and the end of a long name."""
    first, _, last = text.rpartition("/")
    while first and len(text) > most:
        first = first.rpartition("/")[0]
        text = "/".join(filter(None, (first, "...", last)))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _remarks(s: Schedule) -> list[str]:
    """Return lines about what the counts of a schedule leave out, or leave uncertain."""
    lines = []
    if s.unknown_loops:
        lines.append(f"counted as one turn, their trips are not known: {s.unknown_loops} loops")
    skipped = [each for each in s.regions if each[1].known and each[1].passes < each[1].reached]
    lines += [f"skipped, by a constant of the program: {each}" for each in _largest(skipped)]
    if s.uncertain_cycles:
        share = s.uncertain_cycles / s.cycles
        lines.append(f"counted, but a branch may skip them: {s.uncertain_cycles:,} cycles ({share:.1%}), of these")
        lines += [f"    {each}" for each in _largest([each for each in s.regions if not each[1].known])]
    if s.conditionals:
        lines.append(f"counted with all of their branches: {s.conditionals} conditionals")
    if s.without_schedule:
        lines.append(f"not counted, without a schedule: {_some(s.without_schedule)}")
    if s.unmatched:
        lines.append(f"not counted, schedules of no operation of the program: {_some(s.unmatched)}")
    for kind, found in collectives.by_kind(s.collectives).items():
        lines.append(f"not timed: {found.count} {kind} of {_size(found.bytes)}, {_size(found.sent)} to others")
    return lines


def _largest(regions: Sequence[tuple[Operation, Region]], most: int = 4) -> list[str]:
    """Describe the regions that take most cycles if nothing is skipped."""
    largest = sorted(regions, key=lambda each: -each[0].times * each[1].cycles * each[1].reached)[:most]
    return [
        f"{o.name}: "
        + (f"{r.reached - r.passes} of {r.reached}" if r.known else f"{r.passes}")
        + f" passes of {r.cycles:,} cycles"
        + f", in each of {o.times} runs" * (o.times > 1)
        for o, r in largest
    ]


def _operation(o: Scheduled) -> dict[str, Any]:
    return {
        "name": o.operation.name,
        "opcode": o.operation.opcode,
        "op_name": o.operation.op_name,
        "place": place_of(o.operation.op_name),
        "pass": pass_of(o.operation.op_name),
        "times": o.operation.times,
        "cycles": o.cycles,
        "hbm_bytes": o.hbm_bytes,
        "compute_seconds": o.compute_seconds,
        "memory_seconds": o.memory_seconds,
        "seconds": o.seconds,
        "vmem_bytes": o.operation.vmem_bytes,
        "uncertain_cycles": o.operation.times * o.counts.uncertain if o.counts else 0,
        "unknown_loops": o.counts.unknown_loops if o.counts else 0,
        "utilization": {unit: o.utilization(unit) for unit in o.counts.slots} if o.counts else {},
    }


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{len(names)} ({shown}{', ...' if len(names) > 5 else ''})"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _console() -> Console:
    return console_lib.literal(file=io.StringIO(), width=165)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
