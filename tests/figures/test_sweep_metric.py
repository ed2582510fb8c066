"""Test figures of a metric of a sweep against a swept key."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import image

from ttt_jax.config import ConfigError
from ttt_jax.figures import sweep_metric
from ttt_jax.sweep.points import Point
from ttt_jax.sweep.results import Result, Results
from ttt_jax.sweep.status import Standing

PEAK_LR = "optimizer.peak_lr"


def results_of(*points, keys=(PEAK_LR,)):
    """Return results of points, each the values of the keys, the loss, and the state where it is not done."""
    found = []
    for index, (*values, loss, state) in enumerate(
        each if isinstance(each[-1], str) else (*each, "done") for each in points
    ):
        values = dict(zip(keys, values, strict=True))
        config = {"seed": 0, PEAK_LR: 0.1, "optimizer.warmup": "10%"} | values
        found.append(Result(None, Standing(Point(f"p{index}", "r.py", values, 9), state, step=9), config, loss, 9))
    return Results(list(keys), found)


FIVE_STATES = results_of(
    (0.1, 2.0), (0.01, 1.7), (1.0, 1.0, "running"), (10.0, math.nan, "failed"), (0.001, None, "waiting")
)


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Return ``draw(results, x, lines)``, which saves a figure of the loss and returns its axes."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)

    def drawn(results, x, lines=None):
        sweep_metric.against(results, "loss", tmp_path / "a.png", x=x, lines=lines)
        assert image.imread(tmp_path / "a.png").std() > 0.02
        return kept[-1].axes[0]

    yield drawn
    monkeypatch.undo()
    plt.close("all")


def curves(axes):
    """Return the points that each line joins, by its label."""
    found = {line.get_label(): line.get_xydata() for line in axes.lines if line.get_linestyle() != "None"}
    return {label: [tuple(point) for point in points] for label, points in found.items()}


def texts(labels):
    return [label.get_text() for label in labels]


def test_done_points_are_joined_and_others_are_hollow(draw):
    axes = draw(FIVE_STATES, PEAK_LR)
    (joined,) = curves(axes).values()
    assert joined == [(0.01, pytest.approx(1.7)), (0.1, 2.0)]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [tuple(line.get_xydata()[0]) for line in hollow] == [(1.0, 1.0)]
    assert axes.get_xscale() == "log"
    assert texts(axes.get_xticklabels()) == ["0.001", "0.01", "0.1", "1", "10"]
    assert axes.get_title() == "loss, 5 points; hollow: not finished; crosses: 1 not finite; 1 without a value yet"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer.peak_lr (log scale)", "loss")


def test_values_that_are_not_finite_are_crosses_and_leave_a_gap(draw):
    points = zip((0.5, 0.1, 0.2, 0.4, 0.05), (math.nan, 2.0, math.inf, math.nan, 1.5), strict=True)
    axes = draw(results_of(*points), PEAK_LR)
    assert axes.get_title() == "loss, 5 points; crosses: 3 not finite"
    assert sorted(line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x") == [0.2, 0.4, 0.5]
    (joined,) = curves(axes).values()
    assert joined[:2] == [(0.05, 1.5), (0.1, 2.0)]
    assert np.isnan([y for _, y in joined[2:]]).all()


def test_a_figure_without_finite_values(draw):
    results = results_of((0, math.nan), (1, math.nan), keys=["seed"])
    assert draw(results, "seed").get_title() == "loss, 2 points; crosses: 2 not finite"


def test_a_line_for_each_combination_of_what_else_is_swept(draw):
    points = [
        (lr, warmup, seed, lr + extra + 0.5 * seed)
        for seed in (0, 1)
        for warmup, extra in (("10%", 0.0), ("20%", 1.0))
        for lr in (1.0, 2.0, 4.0)
    ]
    results = results_of(*points, keys=[PEAK_LR, "optimizer.warmup", "seed"])
    axes = draw(results, PEAK_LR)
    assert curves(axes)["warmup 20%"] == [(1.0, 2.25), (2.0, 3.25), (4.0, 5.25)]  # means of the seeds
    assert len([label for label in curves(axes) if label.startswith("warmup")]) == 2
    assert axes.get_title() == "loss, 12 points; lines: means +- standard deviation over seeds"
    bars = [bar.get_segments()[0] for container in axes.containers for bar in container.lines[2]]
    assert sorted(round(top - bottom, 9) for (_, bottom), (_, top) in bars) == [round(0.5 * 2**0.5, 9)] * 6
    axes = draw(results, "seed", "optimizer.warmup")  # means over learning rates
    assert (len(axes.containers), axes.get_title()) == (0, "loss, 12 points; lines: means")
    axes = draw(results, PEAK_LR, "optimizer.warmup")
    assert curves(axes)["warmup 10%"] == [(1.0, 1.25), (2.0, 2.25), (4.0, 4.25)]  # means of the seeds
    assert "mean" in axes.get_title()
    axes = draw(results, "optimizer.warmup", "seed")
    assert texts(axes.get_xticklabels()) == ["10%", "20%"]
    assert (axes.get_xscale(), axes.get_xlabel()) == ("linear", "optimizer.warmup")


@pytest.mark.parametrize(
    ("base", "several"),
    [
        (2, [[1.0, 2.0, 4.0]]),
        (10, [[1e-3, 3e-3], [1e-4, 1e-3, 3e-3, 1e-2]]),
        (None, [[0.0, 1.0, 10.0], [0.8, 0.9, 1.0], [1.0, 2.0, 3.0, 4.0], [5.0]]),
    ],
)
def test_axes_are_logarithmic_where_values_are_spaced_like_that(base, several):
    assert [sweep_metric._log_base(numbers) for numbers in several] == [base] * len(several)


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("a.png", "optimizer.lr", f"--x optimizer.lr: no such key; expected one that is swept: {PEAK_LR}"),
        ("a.txt", PEAK_LR, "--plot a.txt: expected a name that ends in .png, .pdf or .svg"),
    ],
)
def test_refused_figures(tmp_path, monkeypatch, name, x, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        sweep_metric.against(FIVE_STATES, "loss", Path(name), x=x)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())
