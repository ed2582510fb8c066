"""Test what is reported of steps: times, utilisation, goodput, and when a loss ends the run."""

import math

import numpy as np
import pytest

from ttt_jax.errors import NonFiniteLossError
from ttt_jax.storage import json_files
from ttt_jax.training import report


class Clock:
    """A clock in the place of the module time."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now


class Records(list):
    def write(self, step, values):
        self.append({"step": step, **values})

    def update(self, *values):
        pass

    def flush(self):
        pass

    def close(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(report, "time", clock)
    return clock


def numbers(loss=2.0, norm=1.0, **more):
    return {"loss": np.float32(loss), "grad_norm": np.float32(norm), **more}


def test_times_of_a_step_that_waited_for_data(tmp_path, clock):
    """Report a step of 1200 FLOPs and 600 tokens on 4 chips of 100 FLOP/s that takes 6 s, 2 of them for data."""
    lines = Records()
    output = report.Output(lines, lines, report.Goodput(tmp_path, useful=16.0), log_every=1)
    reporter = report.Reporter(output, tokens=600, flops=1200.0, chips=4, peak=100.0)
    clock.now += 10  # start-up
    reporter.waited("compile_seconds", 10, within_step=False)
    reporter.start()
    reporter.add_step(1, numbers())
    reporter.waited("data_wait_seconds", 2.0)
    clock.now += 6
    reporter.flush()
    (line,) = lines
    assert line["seconds_per_step"] == 6
    assert line["tokens_per_second"] == 100
    assert line["tokens_per_second_per_chip"] == 25
    assert line["model_flop_utilisation"] == 1200 / 6 / 400
    assert line["data_wait_seconds"] == 2
    assert line["compile_seconds"] == 10
    assert line["goodput"] == 1.0  # 4 s and the 16 before, in 16 s since the start: a clock that was set back
    clock.now += 24
    reporter.add_step(2, numbers())
    clock.now += 10
    reporter.flush()
    assert lines[1]["goodput"] == 1.0
    assert "compile_seconds" not in lines[1]


def test_goodput_over_restarts(tmp_path, clock):
    """Start at 1000 s, lose 10 of 40 useful seconds, and restart 100 s later."""
    first = report.Goodput(tmp_path)
    first.add(30.0)
    saved = first.useful
    first.add(10.0)
    assert json_files.read_object(tmp_path / "started.json") == {"unix_time": 1000.0}
    clock.now = 1100.0
    again = report.Goodput(tmp_path, saved)
    again.add(20.0)
    clock.now = 1125.0
    assert again.share() == pytest.approx((30 + 20) / 125)


def test_utilisation_is_left_out_where_the_peak_is_not_known(tmp_path, clock):
    lines = Records()
    output = report.Output(lines, lines, report.Goodput(tmp_path), log_every=1)
    reporter = report.Reporter(output, tokens=1, flops=1.0, chips=1, peak=None)
    reporter.start()
    reporter.add_step(1, numbers())
    clock.now += 1
    reporter.flush()
    assert "model_flop_utilisation" not in lines[0]


@pytest.mark.parametrize(
    ("values", "fatal"),
    [
        (numbers(loss=math.nan), "loss is nan at step 7"),
        (numbers(norm=math.inf), "grad_norm is inf at step 7"),
        (numbers(norm=math.inf, skipped_in_a_row=np.int32(1)), None),
        (numbers(norm=math.inf, skipped_in_a_row=np.int32(9)), None),
        (numbers(norm=math.inf, skipped_in_a_row=np.int32(10)), "grad_norm is inf at step 7"),
        (numbers(skipped_in_a_row=np.int32(0)), None),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_ends_a_run(clock, values, fatal):
    reporter = report.Reporter(None, tokens=1, flops=1.0, chips=1, peak=None)
    reporter.start()
    reporter.add_step(7, values)
    clock.now += 1
    if fatal is None:
        reporter.flush()
    else:
        with pytest.raises(NonFiniteLossError, match=fatal):
            reporter.flush()


def test_the_last_step_has_a_record_where_the_interval_does_not_divide_the_run(tmp_path, clock):
    lines = Records()
    output = report.Output(lines, lines, report.Goodput(tmp_path), log_every=4)
    reporter = report.Reporter(output, tokens=1, flops=1.0, chips=1, peak=None)
    reporter.start()
    for step in range(1, 7):
        clock.now += 1
        reporter.add_step(step, numbers(loss=step))
    clock.now += 1
    reporter.finish()
    assert [(line["step"], line["loss"]) for line in lines] == [(4, 4.0), (6, 6.0)]
