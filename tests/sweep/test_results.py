"""Test what is read from a sweep: where points stand, metrics, ranks and tables."""

import csv
import io
import json
import math
import time

import pytest

from ttt_jax import cli
from ttt_jax.config import ConfigError
from ttt_jax.sweep import files, metric, results, status
from ttt_jax.sweep.points import Point


@pytest.fixture
def add_point(folder):
    """Return ``add_point(name, values, losses, state)``, which adds a point with losses at steps 1, 2, ..."""
    points = []

    def add(name, values, losses=(), state=None, recipe="r.py", steps=None, **more):
        workdir, steps = folder / name, steps or len(losses)
        workdir.mkdir(parents=True)
        points.append(Point(name, recipe, values, steps))
        if losses:
            lines = [{"step": i, "loss": x, "tokens_per_second": 10.0 * i} for i, x in enumerate(losses, 1)]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if state:
            files.write_record(workdir, files.Record(state, steps, **more))
        files.write_sweep(folder, files.Sweep({}, points))
        return points[-1]

    return add


@pytest.fixture
def five_points(add_point):
    """Add two points that are done, one that runs, one that failed, one that waits."""
    for lr, losses, state, more in (
        (0.1, [3.0] * 95 + [2.0] * 5, "done", {}),
        (0.01, [1.0] * 95 + [1.9, 1.5, 1.7, 1.6, 1.8], "done", {}),
        (1.0, [1.0] * 40, "running", {}),
        (10.0, [5.0, math.nan], "failed", {"status": 1, "said": "loss is nan"}),
        (0.001, [], None, {}),
    ):
        add_point(f"lr={lr}", {"optimizer.peak_lr": lr}, losses, state, steps=100, **more)


def ranked(folder, name, **options):
    """Return rank, point, value and step of each result."""
    found = results.of_sweep(folder, name, **options).results
    return [(each.rank, each.standing.point.name, each.value, each.step) for each in found]


@pytest.fixture
def printed(folder, capsys):
    """Return ``printed(command)``: what ``ttt sweep COMMAND`` prints of the sweep, each line without its spacing."""

    def lines(command, *options):
        assert cli.main(["sweep", command, str(folder), *options]) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return lines


# ---- Where points stand


def sign_of_life(folder, age):
    (folder / "running.json").write_text(json.dumps({"host": "h", "pid": 1, "time": time.time() - age, "every": 5}))


def test_states(five_points, folder, printed):
    sign_of_life(folder, age=1)
    done, _, running, failed, waiting = found = status.of_sweep(folder)
    assert [each.state for each in found] == ["done", "done", "running", "failed", "waiting"]
    assert (done.step, done.loss) == (100, 2.0)
    assert (running.step, running.loss, running.tokens_per_second) == (40, 1.0, 305.0)  # median of steps 21 to 40
    assert 0 <= running.age < 60
    assert (failed.note, str(failed.loss)) == ("loss is nan", "nan")
    assert (waiting.step, waiting.loss, waiting.age) == (0, None, None)
    lines = printed("status")
    assert lines[0] == "5 points: 2 done, 1 running, 1 failed, 1 waiting"
    assert "point state step loss tokens/s last record why" in lines
    assert "lr=1.0 running 40/100 1.0000 305 0:00 ago" in lines
    assert "lr=10.0 failed 2/100 not finite 15 0:00 ago loss is nan" in lines
    assert "lr=0.001 waiting 0/100" in lines
    table = status.table(status.of_sweep(folder), active_first=True)
    assert list(table.columns[0].cells) == ["lr=1.0", "lr=10.0", "lr=0.001", "lr=0.1", "lr=0.01"]
    sign_of_life(folder, age=60)
    assert [each.state for each in status.of_sweep(folder)] == ["done", "done", "stopped", "failed", "waiting"]


def test_a_run_that_is_made_longer_is_not_done(add_point, folder):
    point = add_point("p", {}, [1.0], "done", steps=50)
    [standing] = status.of_sweep(folder)
    assert (standing.state, standing.step) == ("done", 50)  # records may be some steps apart
    assert status.of_point(folder / "p", point._replace(steps=60), False).state == "stopped"


def test_watching_ends_when_all_have_ended(add_point, printed):
    add_point("p", {}, [1.0], "done")
    assert "1 points: 1 done" in printed("status", "--watch")


def test_a_point_json_of_something_else_is_passed_over(tmp_path, capsys):
    def read(**changed):
        (tmp_path / "point.json").write_text(json.dumps({"state": "failed", "steps": 3, **changed}))
        return files.read_record(tmp_path)

    assert read(began=5, ended=6, status=-9, new=[]).status == -9
    assert capsys.readouterr().err == ""
    for key, value in {"status": "x", "steps": "3", "state": None, "said": 4, "began": [], "ended": False}.items():
        assert read(**{key: value}) is None
    assert capsys.readouterr().err == f"{tmp_path}/point.json: is not a record of a point of a sweep; passed over\n"


def test_the_newest_of_many_records_are_read(tmp_path):
    assert files.records(tmp_path, newest=True) == []
    lines = [json.dumps({"step": i, "text": "é" * 50}) + "\n" for i in range(1, 2001)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    newest = [each["step"] for each in files.records(tmp_path, newest=True)]
    assert newest == list(range(newest[0], 2001))
    assert 1 < newest[0] < 1900


def test_records_that_cannot_be_read_are_named_and_cost_no_other_point(five_points, folder, capsys):
    path = folder / "lr=0.1" / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    assert [each.loss for each in status.of_sweep(folder)][:3] == [None, 1.8, 1.0]
    assert capsys.readouterr().err == f"{path}: is a folder; passed over\n"
    found = [each[:3] for each in ranked(folder, "loss")]
    assert (found[0][:2], (None, "lr=0.1", None) in found) == ((1, "lr=0.01"), True)


# ---- Metrics


def test_a_metric_is_the_mean_of_the_last_twentieth_and_a_speed_the_median_of_all():
    records = [{"step": i, "loss": float(i)} for i in range(1, 201)]
    assert metric.of_records(records, "loss") == (195.5, 200, {})  # 191 to 200
    assert metric.of_records(records[:3], "loss") == (3.0, 3, {})
    assert metric.of_records(records[9::10], "loss") == (200.0, 200, {})  # every tenth step
    assert metric.of_records([], "loss") == (None, 0, {})
    assert metric.of_records(records, "nothing") == (None, 200, {})
    records = [{"step": i, "tokens_per_second": x} for i, x in enumerate([1.0, 90.0, 100.0, 110.0, 5.0], 1)]
    assert metric.of_records(records, "tokens_per_second").number == 90.0


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("loss", 3, (4, 1 / 4)),
        ("loss", 4, (4, 1 / 4)),
        ("loss", 7, None),
        ("nothing", 3, (4, None)),
        ("loss", 5, (6, math.inf)),
        ("goodput", 6, (6, -math.inf)),
    ],
)
def test_a_metric_at_a_step_is_of_the_next_record_and_nothing_is_worse_than_nan(name, step, expected):
    records = [{"step": 2, "loss": 1 / 2}, {"step": 4, "loss": 1 / 4}, {"step": 6, "loss": math.nan, "goodput": None}]
    assert metric.at_step(records, name, step) == expected


def test_rungs():
    assert metric.Early("loss", 10, 3.0, False).rungs(100) == [10.0, 30.0, 90.0]
    assert metric.Early("loss", 10, 2.0, False).rungs(40) == [10.0, 20.0]  # at the end nothing is left to stop
    assert metric.Early("loss", 50, 2.0, False).rungs(40) == []


def test_evaluations_whose_loss_is_null(tmp_path):
    evaluate(tmp_path, step=1, loss=None, perplexity=None, loss_low=None, not_finite=3, tokens=9)
    found = [metric.of_run(tmp_path, f"validation-2048{name}").number for name in ("", "/perplexity", "/not_finite")]
    assert str(found) == "[nan, nan, 3.0]"
    assert metric.of_run(tmp_path, "validation-2048/loss_low").number is None


def evaluate(workdir, **about):
    (workdir / "eval").mkdir(exist_ok=True)
    (workdir / "eval" / "validation-2048.json").write_text(json.dumps(about))


# ---- Ranks


def test_only_done_points_are_ranked_and_none_is_left_out(five_points, folder):
    best, second, running, failed, waiting = ranked(folder, "loss")
    assert best == (1, "lr=0.01", pytest.approx(1.7), 100)
    assert second == (2, "lr=0.1", 2.0, 100)
    assert running == (None, "lr=1.0", 1.0, 40)
    assert (failed[:2], waiting[:2]) == ((None, "lr=10.0"), (None, "lr=0.001"))
    equal = ranked(folder, "tokens_per_second")[:2]  # in the order of the sweep
    assert [each[:2] for each in equal] == [(1, "lr=0.1"), (2, "lr=0.01")]
    assert [each[1] for each in ranked(folder, "loss", highest=True)][:2] == ["lr=0.1", "lr=0.01"]


def test_evaluations_count_where_they_are_of_the_end(five_points, folder):
    for name, step, loss in (("lr=0.1", 100, 2.5), ("lr=0.01", 50, 1.5)):
        evaluate(folder / name, step=step, loss=loss, perplexity=math.exp(loss))
    found = ranked(folder, "validation-2048/perplexity")
    assert found[0] == (1, "lr=0.1", math.exp(2.5), 100)
    assert (None, "lr=0.01", math.exp(1.5), 50) in found
    assert ranked(folder, "validation-2048")[0][2] == 2.5
    with pytest.raises(ConfigError) as caught:
        ranked(folder, "test-64")
    known = "loss, tokens_per_second, validation-2048"
    assert str(caught.value) == f"--metric test-64: no point has it; expected one of {known}"


def test_evaluations_of_other_tokens_are_not_ranked(five_points, folder):
    evaluate(folder / "lr=0.1", step=100, loss=2.5, fingerprint="f", windows=64)
    evaluate(folder / "lr=0.01", step=100, loss=2.5, fingerprint="f")
    assert ranked(folder, "validation-2048")[0][2] == 2.5  # as far as is known, the same
    evaluate(folder / "lr=0.01", step=100, loss=2.5, fingerprint="f", windows=8)
    with pytest.raises(ConfigError, match=r"is of other tokens in lr=0.1 \(windows 64\) than in lr=0.01 \(windows 8\)"):
        ranked(folder, "validation-2048")


def test_values_that_are_not_finite_have_no_rank(add_point, folder, printed):
    for lr, loss in {0.5: math.nan, 0.1: 2.0, 0.2: math.inf, 0.4: None, 0.05: 1.5}.items():
        add_point(f"lr={lr}", {"optimizer.peak_lr": lr}, [1.0, loss], "done")
    for highest, best in ((False, ["lr=0.05", "lr=0.1"]), (True, ["lr=0.1", "lr=0.05"])):
        found = ranked(folder, "loss", highest=highest)
        assert [each[1] for each in found] == [*best, "lr=0.5", "lr=0.2", "lr=0.4"]
        assert [each[0] for each in found] == [1, 2, None, None, None]
        assert str([each[2] for each in found[2:]]) == "[nan, inf, nan]"
    lines = printed("results")
    assert "lr=0.5 0.5 not finite 2/2 done" in lines
    assert lines[-1] == "3 of 5 points: loss is NaN or infinite; they have no rank"


def test_recipes_are_a_column(add_point, folder):
    for recipe, loss in (("b", 2.0), ("a", 1.0)):
        add_point(recipe, {}, [loss], "done", f"x/{recipe}.py:a")
    found = results.of_sweep(folder, "loss")
    assert found.keys == ["config"]
    assert [each.config["config"] for each in found.results] == ["a:a", "b:a"]


def test_results_for_programs(five_points, printed, tmp_path):
    output = tmp_path / "out" / "table.csv"
    rows = json.loads("".join(printed("results", "--json", "--csv", str(output))))
    expected = {"rank": 1, "point": "lr=0.01", "state": "done", "step": 100, "steps": 100, "optimizer.peak_lr": 0.01}
    assert rows[0] == {**expected, "loss": pytest.approx(1.7)}
    assert [row["state"] for row in rows] == ["done", "done", "stopped", "failed", "waiting"]
    assert (rows[3]["loss"], rows[3]["not_finite"]) == (None, True)  # NaN, which JSON does not have
    table = list(csv.DictReader(io.StringIO(output.read_text())))
    assert [row["point"] for row in table] == [row["point"] for row in rows]
    assert [float(row["loss"]) for row in table[:2]] == [rows[0]["loss"], rows[1]["loss"]]
    assert [row["rank"] for row in table] == ["1", "2", "", "", ""]
    assert [row["loss"] for row in table[2:]] == ["1.0", "nan", ""]
