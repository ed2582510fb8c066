"""Print a plan as text or as JSON."""

import dataclasses
import math
from typing import Any

from ttt_jax.planning.plan import Plan
from ttt_jax.planning.search import Tried


def text(plan: Plan, price: float | None = None) -> str:
    """Return the whole report; ``price`` is in USD per chip-hour."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    parts = f", in {plan.accumulation} micro-batches" if plan.accumulation > 1 else ""
    plural = "" if plan.chips == 1 else "s"
    lines = [
        f"{plan.model}, {_count(plan.parameters, 1, 'Mk')} parameters, on {plan.topology}: {plan.chips} chip{plural}",
        f"  mesh     {mesh}",
        f"  batch    {plan.sequences:,} sequences of {plan.sequence_length:,} tokens{parts}",
        f"  compile  {plan.compile_seconds:.1f} s",
        "",
        *_memory(plan),
    ]
    if plan.fits is not False:
        lines += ["", *_collectives(plan)]
    lines += ["", *_step(plan, price)]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Return in words whether a plan fits, with the memory that is left or missing."""
    if plan.available is None:
        return f"{_size(plan.memory.total)}; the memory of a chip is not known"
    room = plan.available - plan.memory.total
    if plan.fits:
        return f"{_size(plan.memory.total)} of {_size(plan.available)}: fits, {_size(max(room, 0))} to spare"
    return f"{_size(plan.memory.total)} of {_size(plan.available)}: does not fit, {_size(-room)} too much"


def search_header() -> str:
    """Return the header of the lines of :func:`search_line`."""
    return "  data  fsdp tensor  remat accumulation   compile       memory      step time"


def search_line(tried: Tried) -> str:
    """Return a line about one choice of a search and its plan."""
    c, p = tried.choice, tried.plan
    choice = f"{c.data:6} {c.fsdp:5} {c.tensor:6} {c.remat:>6} {c.accumulation:12}"
    if p is None:
        return f"{choice}   the compiler fails"
    time = _time(p.step_time.total) if p.step_time else ("does not fit" if p.fits is False else "")
    return f"{choice} {p.compile_seconds:7.1f} s {_size(p.memory.total):>12} {time:>14}"


def as_dict(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """Return a plan for JSON; sizes in bytes, times in seconds."""
    t, hours = plan.step_time, plan.hours
    numbers = {
        **dataclasses.asdict(plan),
        "chip": None if plan.chip is None else plan.chip.name,
        "step_time": None if t is None else {**dataclasses.asdict(t), "total": t.total},
        "tokens_per_second": None if t is None else plan.tokens / t.total,
        "model_flop_utilization": plan.utilization,
        "hours": hours,
        "chip_hours": None if hours is None else hours * plan.chips,
        "price": None if price is None else plan.price(price),
    }
    numbers["memory"]["total"] = plan.memory.total
    return numbers


def _memory(plan: Plan) -> list[str]:
    lines, m = ["memory of a chip"], plan.memory
    for name, size in (
        ("parameters", m.parameters),
        ("optimizer moments", m.moments),
        ("batch", m.batch),
        ("padding of these", m.padding),
        ("activations, gradients", m.temporaries),
        ("outputs", m.outputs),
        ("program", m.code),
    ):
        if size:
            lines.append(f"  {name:<23} {_size(size):>12}")
    return [*lines, f"  {'total':<23} {verdict(plan)}"]


def _collectives(plan: Plan) -> list[str]:
    if not plan.collectives:
        return ["collectives of a step: none"]
    lines = [f"{'collectives of a step':<25} {'times':>8} {'of arrays':>14} {'sent by a chip':>18}"]
    for kind, traffic in plan.collectives.items():
        lines.append(f"  {kind:<23} {traffic.count:8,} {_size(traffic.bytes):>14} {_size(traffic.sent):>18}")
    return lines


def _step(plan: Plan, price: float | None) -> list[str]:
    lines = [f"step and run{'' if plan.step_time is None else ' (an estimate)'}"]
    lines.append(f"  {'model FLOPs of a step':<23} {plan.operations:.3e}")
    lines.append(f"  {'run':<23} {plan.steps:,} steps, {_count(plan.steps * plan.tokens, 2, 'GMk')} tokens")
    t, hours = plan.step_time, plan.hours
    if t is None or hours is None or plan.utilization is None:
        unknown = "the step does not fit" if plan.fits is False else f"nothing is known of the speed of {plan.topology}"
        return [*lines, f"  {'step time':<23} no estimate: {unknown}"]
    cost = "" if price is None else f", {_amount(hours * plan.chips * price)} USD at {price:g} per chip-hour"
    return [
        *lines,
        f"  {'step time':<23} {_time(t.total)} = max(compute {_time(t.compute)}, memory {_time(t.memory)})"
        f" + communication {_time(t.communication)}",
        f"  {'tokens/s':<23} {plan.tokens / t.total:,.0f}, {plan.tokens / t.total / plan.chips:,.0f} per chip",
        f"  {'model FLOP utilization':<23} {_amount(100 * plan.utilization, 1)}%",
        f"  {'duration':<23} {_duration(hours)}, {_amount(hours * plan.chips)} chip-hours{cost}",
        "assumptions",
        *(f"  - {assumption}" for assumption in t.assumptions),
    ]


def _count(count: float, digits: int, units: str) -> str:
    """Format a count in the largest of ``units`` of which it has at least one, so that nothing reads 0.0 M."""
    sizes = {"G": 1e9, "M": 1e6, "k": 1e3}
    unit = next((unit for unit in units if count >= sizes[unit]), None)
    return f"{count:,.0f}" if unit is None else f"{count / sizes[unit]:,.{digits}f} {unit}"


def _time(seconds: float) -> str:
    """Format a time in seconds, or in a smaller unit where it would round to nothing."""
    if seconds >= 1e-3 or not seconds:
        return f"{seconds:.4f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-5 else f"{seconds * 1e6:.3g} us"


def _duration(hours: float) -> str:
    for unit, size in (("hours", 1.0), ("minutes", 1 / 60)):
        if hours >= size:
            return f"{hours / size:,.2f} {unit}"
    return _time(hours * 3600)


def _amount(amount: float, digits: int = 0) -> str:
    """Format a number with ``digits`` decimals, or with two significant digits where that would leave fewer."""
    if 0 < amount < 1e-3:
        return "under 0.001"
    if amount == 0 or amount >= 10 ** (1 - digits):
        return f"{amount:,.{digits}f}"
    return f"{amount:.{1 - math.floor(math.log10(amount))}f}"


def _size(size: float) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if size >= 1024 ** "BKMG".index(unit[0]):
            return f"{size / 1024 ** 'BKMG'.index(unit[0]):,.2f} {unit}"
    return f"{size:.0f} B  "
