"""A plan for people, and as JSON."""

import dataclasses
from typing import Any

from ttt_jax.planning.plan import Plan
from ttt_jax.planning.search import Tried


def text(plan: Plan, price: float | None = None) -> str:
    """The whole report; ``price`` in USD per chip-hour."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    parts = f", in {plan.accumulation} micro-batches" if plan.accumulation > 1 else ""
    lines = [
        f"{plan.model}, {plan.parameters / 1e6:,.1f} M parameters, on {plan.topology}: {plan.chips} chips",
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
    """Whether it fits, and by how much or how much not."""
    if plan.available is None:
        return f"{_size(plan.memory.total)}; how much there is is not known"
    room = plan.available - plan.memory.total
    if plan.fits:
        return f"{_size(plan.memory.total)} of {_size(plan.available)}: fits, {_size(max(room, 0))} to spare"
    return f"{_size(plan.memory.total)} of {_size(plan.available)}: does not fit, {_size(-room)} too much"


def search_header() -> str:
    """Above the lines of :func:`search_line`."""
    return "  data  fsdp tensor  remat accumulation   compile       memory      step time"


def search_line(tried: Tried) -> str:
    """One choice of a search and what came of it."""
    c, p = tried.choice, tried.plan
    choice = f"{c.data:6} {c.fsdp:5} {c.tensor:6} {c.remat:>6} {c.accumulation:12}"
    if p is None:
        return f"{choice}   the compiler fails"
    time = f"{p.step_time.total:.4f} s" if p.step_time else ("does not fit" if p.fits is False else "")
    return f"{choice} {p.compile_seconds:7.1f} s {_size(p.memory.total):>12} {time:>14}"


def as_dict(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """For JSON; sizes in bytes, times in seconds."""
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
    lines.append(f"  {'run':<23} {plan.steps:,} steps, {plan.steps * plan.tokens / 1e9:,.2f} G tokens")
    t, hours = plan.step_time, plan.hours
    if t is None or hours is None or plan.utilization is None:
        unknown = "the step does not fit" if plan.fits is False else f"nothing is known of the speed of {plan.topology}"
        return [*lines, f"  {'step time':<23} no estimate: {unknown}"]
    cost = "" if price is None else f", {plan.price(price):,.0f} USD at {price:g} per chip-hour"
    return [
        *lines,
        f"  {'step time':<23} {t.total:.4f} s = max(compute {t.compute:.4f}, memory {t.memory:.4f})"
        f" + communication {t.communication:.4f}",
        f"  {'tokens/s':<23} {plan.tokens / t.total:,.0f}, {plan.tokens / t.total / plan.chips:,.0f} per chip",
        f"  {'model FLOP utilization':<23} {plan.utilization:.1%}",
        f"  {'duration':<23} {hours:,.2f} hours, {hours * plan.chips:,.0f} chip-hours{cost}",
        "assumptions",
        *(f"  - {assumption}" for assumption in t.assumptions),
    ]


def _size(size: float) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if size >= 1024 ** "BKMG".index(unit[0]):
            return f"{size / 1024 ** 'BKMG'.index(unit[0]):,.2f} {unit}"
    return f"{size:.0f} B  "
