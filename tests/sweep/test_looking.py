"""What can be seen of a sweep: where points stand, how they rank, and pictures."""

import csv
import io
import json
import math
import os
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import image

from ttt_jax import cli
from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.figures import sweep_metric
from ttt_jax.sweep import files, metric, results, status
from ttt_jax.sweep.files import Record, Sweep
from ttt_jax.sweep.points import Point

STEPS = 100


def add(folder, name, values, losses=(), state=None, recipe="r.py", steps=STEPS, **more):
    """A point with these losses, at steps 1, 2, ...; returns it."""
    workdir = folder / name
    workdir.mkdir(parents=True)
    if losses:
        lines = [{"step": i, "loss": x, "tokens_per_second": 10.0 * i} for i, x in enumerate(losses, 1)]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = {"seed": 0, "optimizer": {"peak_lr": 0.1, "warmup": "10%"}}
        for key, value in values.items():
            config_lib.set_value(config, key, value)
        (workdir / "config.json").write_text(json.dumps(config))
    if state:
        files.write_record(workdir, Record(state, steps, **more))
    return Point(name, recipe, values, steps)


@pytest.fixture
def sweep(tmp_path):
    """Five points: two that are done, one that runs, one that failed, one that waits."""
    points = [
        add(tmp_path, "lr=0.1", {"optimizer.peak_lr": 0.1}, [3.0] * 95 + [2.0] * 5, "done"),
        add(tmp_path, "lr=0.01", {"optimizer.peak_lr": 0.01}, [1.0] * 95 + [1.9, 1.5, 1.7, 1.6, 1.8], "done"),
        add(tmp_path, "lr=1.0", {"optimizer.peak_lr": 1.0}, [1.0] * 40, "running"),
        add(tmp_path, "lr=10.0", {"optimizer.peak_lr": 10.0}, [5.0, math.nan], "failed", status=1, said="loss is nan"),
        add(tmp_path, "lr=0.001", {"optimizer.peak_lr": 0.001}),
    ]
    files.write_sweep(tmp_path, Sweep({}, [], points))
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "is_one"),
    [
        ({"began": 5, "ended": 6, "status": -9, "new": []}, True),
        ({"status": "x"}, False),
        ({"steps": "3"}, False),
        ({"steps": True}, False),
        ({"state": None}, False),
        ({"said": 4}, False),
        ({"began": []}, False),
    ],
)
def test_a_point_json_of_something_else_is_passed_over(tmp_path, capsys, changed, is_one):
    (tmp_path / "point.json").write_text(json.dumps({"state": "failed", "steps": 3, **changed}))
    assert (files.read_record(tmp_path) is not None) == is_one
    said = f"{tmp_path}/point.json: is no record of a point of a sweep; passed over\n"
    assert capsys.readouterr().err == ("" if is_one else said)


def test_records_that_cannot_be_read_are_named_and_cost_no_other_point(sweep, capsys):
    path = sweep / "lr=0.1" / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    assert [each.loss for each in status.of_sweep(sweep)][:3] == [None, 1.8, 1.0]
    assert capsys.readouterr().err == f"{path}: cannot be read: Is a directory; passed over\n"
    found = {each.standing.point.name: each for each in results.of_sweep(sweep, "loss").results}
    assert found["lr=0.1"].value is None
    assert found["lr=0.01"].rank == 1


# ---- Status


def sign(folder, age):
    (folder / "running.json").write_text(json.dumps({"host": "h", "pid": 1, "time": time.time() - age, "every": 5}))


def test_states(sweep):
    sign(sweep, age=1)
    found = {each.point.name: each for each in status.of_sweep(sweep)}
    assert {name: each.state for name, each in found.items()} == {
        "lr=0.1": "done",
        "lr=0.01": "done",
        "lr=1.0": "running",
        "lr=10.0": "failed",
        "lr=0.001": "waiting",
    }
    running = found["lr=1.0"]
    assert (running.step, running.loss, running.tokens_per_second) == (40, 1.0, 305.0)  # median of steps 21 to 40
    assert 0 <= running.age < 60
    assert found["lr=10.0"].note == "loss is nan"
    assert math.isnan(found["lr=10.0"].loss)
    assert (found["lr=0.001"].step, found["lr=0.001"].loss, found["lr=0.001"].age) == (0, None, None)
    sign(sweep, age=60)
    assert {each.state for each in status.of_sweep(sweep)} == {"done", "stopped", "failed", "waiting"}


def test_a_longer_run_is_not_done(tmp_path):
    point = add(tmp_path, "p", {}, [1.0], "done", steps=50)
    assert status.of_point(tmp_path / "p", point, False).state == "done"
    assert status.of_point(tmp_path / "p", point, False).step == 50  # records may be some steps apart
    assert status.of_point(tmp_path / "p", point._replace(steps=60), False).state == "stopped"


def test_records_that_are_cut_short_or_many(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.records(tmp_path) == []
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"st\n\n[]\n{"step": 3, "lo')
    assert [each["step"] for each in files.records(tmp_path)] == [1, 2]
    path.write_text("".join(json.dumps({"step": i, "text": "é" * 50}) + "\n" for i in range(1, 2001)))
    newest = [each["step"] for each in files.records(tmp_path, newest=True)]
    assert newest == list(range(newest[0], 2001))
    assert 1 < newest[0] < 1900
    assert len(files.records(tmp_path)) == 2000


def test_status_as_a_table(sweep, capsys):
    sign(sweep, age=1)
    assert cli.main(["sweep", "status", str(sweep)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "5 points: 2 done, 1 running, 1 failed, 1 waiting"
    assert "point state step loss tokens/s last record why" in lines
    assert "lr=1.0 running 40/100 1.0000 305 0:00 ago" in lines
    assert "lr=10.0 failed 2/100 not finite 15 0:00 ago loss is nan" in lines
    assert "lr=0.001 waiting 0/100" in lines


def test_a_terminal_shows_first_what_runs(sweep):
    sign(sweep, age=1)
    table = status.table(status.of_sweep(sweep), active_first=True)
    assert list(table.columns[0].cells) == ["lr=1.0", "lr=10.0", "lr=0.001", "lr=0.1", "lr=0.01"]


def test_watching_ends_when_all_have_ended(tmp_path, capsys):
    files.write_sweep(tmp_path, Sweep({}, [], [add(tmp_path, "p", {}, [1.0], "done", steps=1)]))
    assert cli.main(["sweep", "status", str(tmp_path), "--watch"]) == 0
    assert "1 points: 1 done" in capsys.readouterr().out


# ---- Metrics


def test_the_mean_of_the_last_twentieth_of_the_steps():
    records = [{"step": i, "loss": float(i)} for i in range(1, 201)]
    assert metric.of_records(records, "loss") == metric.Measured(195.5, 200)  # 191 to 200
    assert metric.of_records(records[:3], "loss") == metric.Measured(3.0, 3)
    assert metric.of_records(records[9::10], "loss") == metric.Measured(200.0, 200)  # every tenth step
    assert metric.of_records([], "loss") == metric.Measured(None, 0)
    assert metric.of_records(records, "nothing") == metric.Measured(None, 200)


def test_speeds_are_medians_of_all():
    records = [{"step": i, "tokens_per_second": x} for i, x in enumerate([1.0, 90.0, 100.0, 110.0, 5.0], 1)]
    assert metric.of_records(records, "tokens_per_second").number == 90.0


# ---- Results


def ranked(folder, *arguments):
    found = results.of_sweep(folder, *arguments)
    return [(each.rank, each.standing.point.name) for each in found.results]


def test_only_what_is_done_is_ranked_and_nothing_is_left_out(sweep):
    expected = [(1, "lr=0.01"), (2, "lr=0.1"), (None, "lr=1.0"), (None, "lr=10.0"), (None, "lr=0.001")]
    assert ranked(sweep, "loss") == expected
    found = {each.standing.point.name: each for each in results.of_sweep(sweep, "loss").results}
    assert found["lr=0.01"].value == pytest.approx(1.7)
    assert found["lr=0.1"].value == 2.0
    assert (found["lr=1.0"].value, found["lr=1.0"].step) == (1.0, 40)
    assert ranked(sweep, "tokens_per_second")[:2] == [(1, "lr=0.1"), (2, "lr=0.01")]  # equal: as in the sweep
    worst_first = results.of_sweep(sweep, "loss", highest=True).results
    assert [each.standing.point.name for each in worst_first][:2] == ["lr=0.1", "lr=0.01"]


def test_evaluations_count_where_they_are_of_the_end(sweep):
    for name, step, loss in (("lr=0.1", 100, 2.5), ("lr=0.01", 50, 1.5)):
        (sweep / name / "eval").mkdir()
        about = {"step": step, "loss": loss, "perplexity": math.exp(loss)}
        (sweep / name / "eval" / "validation-2048.json").write_text(json.dumps(about))
    found = results.of_sweep(sweep, "validation-2048/perplexity")
    shown = [(each.rank, each.standing.point.name, each.value, each.step) for each in found.results]
    assert shown[0] == (1, "lr=0.1", math.exp(2.5), 100)
    assert (None, "lr=0.01", math.exp(1.5), 50) in shown
    assert results.of_sweep(sweep, "validation-2048").results[0].value == 2.5
    with pytest.raises(ConfigError) as caught:
        results.of_sweep(sweep, "test-64")
    assert str(caught.value) == (
        "--metric test-64: no point has it; expected one of loss, tokens_per_second, validation-2048"
    )


def test_evaluations_of_other_tokens_are_not_ranked(sweep):
    for name, tokens in (("lr=0.1", {"fingerprint": "f", "windows": 64}), ("lr=0.01", {"fingerprint": "f"})):
        (sweep / name / "eval").mkdir()
        about = {"step": 100, "loss": 2.5, **tokens}
        (sweep / name / "eval" / "validation-2048.json").write_text(json.dumps(about))
    assert results.of_sweep(sweep, "validation-2048").results[0].value == 2.5  # as far as is known, the same
    (sweep / "lr=0.01" / "eval" / "validation-2048.json").write_text(json.dumps({**about, "windows": 8}))
    with pytest.raises(ConfigError, match=r"is of other tokens in lr=0.1 \(windows 64\) than in lr=0.01 \(windows 8\)"):
        results.of_sweep(sweep, "validation-2048")


def test_tables_for_programs(sweep, capsys, tmp_path):
    output = tmp_path / "out" / "table.csv"
    assert cli.main(["sweep", "results", str(sweep), "--json", "--csv", str(output)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {
        "rank": 1,
        "point": "lr=0.01",
        "state": "done",
        "step": 100,
        "steps": 100,
        "optimizer.peak_lr": 0.01,
        "loss": pytest.approx(1.7),
    }
    assert [row["state"] for row in rows] == ["done", "done", "stopped", "failed", "waiting"]
    assert (rows[3]["loss"], rows[3]["not_finite"]) == (None, True)  # NaN, which JSON does not have
    assert "not_finite" not in rows[0]
    table = list(csv.DictReader(io.StringIO(output.read_text())))
    assert [row["point"] for row in table] == [row["point"] for row in rows]
    assert [float(row["loss"]) for row in table[:2]] == [rows[0]["loss"], rows[1]["loss"]]
    assert [row["rank"] for row in table] == ["1", "2", "", "", ""]
    assert [row["loss"] for row in table[2:]] == ["1.0", "nan", ""]


def test_recipes_are_a_column(tmp_path):
    points = [
        add(tmp_path, recipe, {}, [loss], "done", f"x/{recipe}.py:a") for recipe, loss in (("b", 2.0), ("a", 1.0))
    ]
    points = [point._replace(steps=1) for point in points]
    files.write_sweep(tmp_path, Sweep({}, [], points))
    found = results.of_sweep(tmp_path, "loss")
    assert found.keys == ["config"]
    assert [each.values for each in found.results] == [{"config": "a:a"}, {"config": "b:a"}]


# ---- Values that are not finite


@pytest.fixture
def diverged(tmp_path):
    """Points that are done: losses NaN, infinite and null in JSON, and two finite ones."""
    losses = {0.5: math.nan, 0.1: 2.0, 0.2: math.inf, 0.4: None, 0.05: 1.5}
    points = [add(tmp_path, f"lr={lr}", {"optimizer.peak_lr": lr}, [1.0, loss], "done") for lr, loss in losses.items()]
    files.write_sweep(tmp_path, Sweep({}, [], [point._replace(steps=2) for point in points]))
    return tmp_path


@pytest.mark.parametrize("highest", [False, True])
def test_what_is_not_finite_has_no_rank(diverged, highest):
    found = results.of_sweep(diverged, "loss", highest=highest)
    best = ["lr=0.1", "lr=0.05"] if highest else ["lr=0.05", "lr=0.1"]
    assert [each.standing.point.name for each in found.results] == [*best, "lr=0.5", "lr=0.2", "lr=0.4"]
    assert [each.rank for each in found.results] == [1, 2, None, None, None]
    assert str([each.value for each in found.results[2:]]) == "[nan, inf, nan]"


def test_what_is_not_finite_is_said(diverged, capsys, drawn):
    assert cli.main(["sweep", "results", str(diverged)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "lr=0.5 0.5 not finite 2/2 done" in lines
    assert lines[-1] == "3 of 5 points: loss is NaN or infinite; they have no rank"
    axes = drawn(results.of_sweep(diverged, "loss"), "loss", diverged / "a.png", x="optimizer.peak_lr")
    assert axes.get_title() == "loss, 5 points; crosses: 3 not finite"
    crosses = sorted(line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x")
    assert crosses == [0.2, 0.4, 0.5]
    (joined,) = curves(axes).values()
    assert joined[:2] == [(0.05, 1.5), (0.1, 2.0)]
    assert np.isnan([y for _, y in joined[2:]]).all()  # a gap


def test_a_picture_of_nothing_finite(tmp_path, drawn):
    points = [add(tmp_path, f"seed={i}", {"seed": i}, [math.nan], "done")._replace(steps=1) for i in range(2)]
    files.write_sweep(tmp_path, Sweep({}, [], points))
    axes = drawn(results.of_sweep(tmp_path, "loss"), "loss", tmp_path / "a.png", x="seed")
    assert axes.get_title() == "loss, 2 points; crosses: 2 not finite"


def test_evaluations_whose_loss_is_null(tmp_path):
    (tmp_path / "eval").mkdir()
    about = {"step": 1, "loss": None, "perplexity": None, "loss_low": None, "not_finite": 3, "tokens": 9}
    (tmp_path / "eval" / "validation-8.json").write_text(json.dumps(about))
    for name in ("", "/perplexity"):
        assert math.isnan(metric.of_run(tmp_path, f"validation-8{name}").number)
    assert metric.of_run(tmp_path, "validation-8/loss_low").number is None
    assert metric.of_run(tmp_path, "validation-8/not_finite").number == 3


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("loss", 3, (4, 1 / 4)),
        ("loss", 4, (4, 1 / 4)),
        ("loss", 7, None),
        ("x", 3, (4, None)),
        ("loss", 5, (6, math.inf)),
    ],
)
def test_a_metric_at_a_step_is_that_of_the_next_record_and_nothing_is_worse_than_nan(name, step, expected):
    records = [{"step": 2, "loss": 1 / 2}, {"step": 4, "loss": 1 / 4}, {"step": 6, "loss": math.nan, "goodput": None}]
    assert metric.at_step(records, name, step) == expected
    assert metric.at_step(records, "goodput", 6) == (6, -math.inf)


# ---- Pictures


@pytest.fixture
def drawn(monkeypatch):
    """``drawn(results, metric, ...)``: the axes of a picture; the picture is saved too."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)

    def draw(found, metric, output, **options):
        sweep_metric.against(found, metric, output, **options)
        assert image.imread(output).std() > 0.02
        return kept[-1].axes[0]

    yield draw
    monkeypatch.undo()
    plt.close("all")


def curves(axes):
    """Of each line that joins points: its label, and where they are."""
    found = {line.get_label(): line.get_xydata() for line in axes.lines if line.get_linestyle() != "None"}
    return {label: [tuple(point) for point in points] for label, points in found.items()}


def test_done_points_are_joined_and_others_are_hollow(sweep, drawn):
    axes = drawn(results.of_sweep(sweep, "loss"), "loss", sweep / "a.png", x="optimizer.peak_lr")
    (joined,) = curves(axes).values()
    assert joined == [(0.01, pytest.approx(1.7)), (0.1, 2.0)]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [tuple(line.get_xydata()[0]) for line in hollow] == [(1.0, 1.0)]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01", "0.1", "1", "10"]
    assert axes.get_title() == "loss, 5 points; hollow: not finished; crosses: 1 not finite; 1 without a value yet"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer.peak_lr (log scale)", "loss")


def test_a_line_for_each_combination_of_what_else_is_swept(tmp_path, drawn):
    points = []
    for seed in (0, 1):
        for warmup, extra in (("10%", 0.0), ("20%", 1.0)):
            for lr in (1.0, 2.0, 4.0):
                values = {"optimizer.peak_lr": lr, "optimizer.warmup": warmup, "seed": seed}
                name = f"{lr},{warmup},{seed}"
                points.append(add(tmp_path, name, values, [lr + extra + 0.5 * seed], "done")._replace(steps=1))
    files.write_sweep(tmp_path, Sweep({}, [], points))
    found = results.of_sweep(tmp_path, "loss")
    axes = drawn(found, "loss", tmp_path / "a.png", x="optimizer.peak_lr")
    assert curves(axes)["warmup 20%"] == [(1.0, 2.25), (2.0, 3.25), (4.0, 5.25)]  # means of the seeds
    assert len([label for label in curves(axes) if label.startswith("warmup")]) == 2
    assert axes.get_title() == "loss, 12 points; lines: means +- standard deviation over seeds"
    bars = [bar.get_segments()[0] for container in axes.containers for bar in container.lines[2]]
    assert sorted(round(top - bottom, 9) for (_, bottom), (_, top) in bars) == [round(0.5 * 2**0.5, 9)] * 6
    axes = drawn(found, "loss", tmp_path / "d.png", x="seed", lines="optimizer.warmup")  # means over learning rates
    assert (len(axes.containers), axes.get_title()) == (0, "loss, 12 points; lines: means")
    axes = drawn(found, "loss", tmp_path / "b.png", x="optimizer.peak_lr", lines="optimizer.warmup")
    assert curves(axes)["warmup 10%"] == [(1.0, 1.25), (2.0, 2.25), (4.0, 4.25)]  # means of the seeds
    assert "mean" in axes.get_title()
    axes = drawn(found, "loss", tmp_path / "c.png", x="optimizer.warmup", lines="seed")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10%", "20%"]
    assert (axes.get_xscale(), axes.get_xlabel()) == ("linear", "optimizer.warmup")


@pytest.mark.parametrize(
    ("numbers", "base"),
    [
        ([1.0, 2.0, 4.0], 2),
        ([1e-3, 3e-3], 10),
        ([1e-4, 1e-3, 3e-3, 1e-2], 10),
        ([0.0, 1.0, 10.0], None),
        ([0.8, 0.9, 1.0], None),
        ([1.0, 2.0, 3.0, 4.0], None),
        ([5.0], None),
    ],
)
def test_log_axes_where_values_are_spaced_like_that(numbers, base):
    assert sweep_metric._log_base(numbers) == base


def test_pictures_that_cannot_be(sweep, capsys):
    def said(*arguments):
        assert cli.main(["sweep", "results", str(sweep), *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    picture = sweep / "a.png"
    assert said("--plot", picture, "--x", "optimizer.lr") == (
        "ttt sweep results: --x optimizer.lr: no such key; expected one that is swept: optimizer.peak_lr\n"
    )
    assert said("--plot", "a.txt") == (
        "ttt sweep results: --plot a.txt: expected a name that ends in .png, .pdf or .svg\n"
    )
    assert said("--x", "seed") == "ttt sweep results: --x, --lines: are of a picture; expected --plot FILE too\n"
    assert not picture.exists()
    assert np.all([os.path.exists(sweep / name) for name in ("sweep.json", "lr=0.1")])
