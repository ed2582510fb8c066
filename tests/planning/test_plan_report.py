"""Print plans as text; no number of a small run is rounded to zero."""

import dataclasses
import re

import pytest

from ttt_jax.distributed import chips
from ttt_jax.planning import report
from ttt_jax.planning.estimate import StepTime
from ttt_jax.planning.plan import Memory, Plan


def a_plan(scale: float) -> Plan:
    """Return the plan of a run whose numbers are ``scale`` times those of one of the paper's."""
    chip = next(chip for chip in chips.CHIPS if chip.name == "v5e")
    return Plan(
        model="TTT-Linear",
        parameters=round(1285.6e6 * scale),
        topology="v5e:1x1",
        chips=256 if scale == 1 else 1,
        chip=chip,
        mesh={"data": 1},
        sequences=256 if scale == 1 else 1,
        sequence_length=2048 if scale == 1 else 64,
        accumulation=1,
        steps=50000 if scale == 1 else 20,
        operations=4.065e15 * scale**2,
        compile_seconds=1.0,
        memory=Memory(*[2**20] * len(dataclasses.fields(Memory))),
        available=2**34,
        fits=True,
        collectives={},
        step_time=StepTime(0.2278 * scale, 0.006 * scale, 0.0584 * scale, ()),
    )


def lines(scale: float) -> dict[str, str]:
    found = (re.match(r"  (\S.*?)  +(.*)", line) for line in report.text(a_plan(scale), 1.2).splitlines())
    return {match[1]: match[2] for match in found if match}


def test_report_of_a_large_run():
    assert report.text(a_plan(1)).startswith("TTT-Linear, 1,285.6 M parameters, on v5e:1x1: 256 chips\n")
    shown = lines(1)
    assert shown["run"] == "50,000 steps, 26.21 G tokens"
    assert shown["step time"] == "0.2862 s = max(compute 0.2278 s, memory 0.0060 s) + communication 0.0584 s"
    assert shown["model FLOP utilization"] == "28.2%"
    assert shown["duration"] == "3.98 hours, 1,018 chip-hours, 1,221 USD at 1.2 per chip-hour"


def test_report_of_a_small_run():
    assert report.text(a_plan(1e-5)).startswith("TTT-Linear, 12.9 k parameters, on v5e:1x1: 1 chip\n")
    shown = lines(1e-5)
    assert shown["run"] == "20 steps, 1.28 k tokens"
    assert shown["step time"] == "2.86 us = max(compute 2.28 us, memory 0.06 us) + communication 0.584 us"
    assert shown["model FLOP utilization"] == "0.072%"
    assert shown["duration"] == "0.0572 ms, under 0.001 chip-hours, under 0.001 USD at 1.2 per chip-hour"


def test_report_of_a_run_that_does_not_fit():
    needed = Memory(*[2**30] * len(dataclasses.fields(Memory)))
    plan = dataclasses.replace(a_plan(1), memory=needed, available=5 * 2**29, fits=False, step_time=None)
    too_much = needed.total / 2**30 - 2.5
    assert f"{too_much + 2.5:.2f} GiB of 2.50 GiB: does not fit, {too_much:.2f} GiB too much" in report.text(plan)
    assert "no estimate: the step does not fit" in report.text(plan)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (report._time(0.00099), "0.99 ms"),
        (report._time(0), "0.0000 s"),
        (report._duration(0.05), "3.00 minutes"),
        (report._duration(0.001), "3.6000 s"),
        (report._amount(0), "0"),
        (report._amount(12.4), "12"),
        (report._amount(1.26), "1.3"),
        (report._count(999, 1, "Mk"), "999"),
    ],
)
def test_units_of_numbers(shown, expected):
    assert shown == expected
