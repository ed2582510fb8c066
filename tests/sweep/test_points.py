"""Points with their configs, and the file of a sweep."""

import json
from pathlib import Path

import pytest

from ttt_jax.config import ConfigError
from ttt_jax.sweep import files, points
from ttt_jax.sweep.axes import Axis
from ttt_jax.sweep.files import Sweep
from ttt_jax.sweep.points import Point

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")
LINEAR, MLP = f"{QUICKSTART}:ttt_linear", f"{QUICKSTART}:ttt_mlp"


def message(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_have_the_types_of_their_keys():
    made = points.make([LINEAR], {"training.duration": "7"}, [{"optimizer.peak_lr": "1", "seed": "3"}])
    assert made.points == [Point("peak_lr=1,seed=3", LINEAR, {"optimizer.peak_lr": 1.0, "seed": 3}, 7)]
    assert isinstance(made.points[0].values["optimizer.peak_lr"], float)
    assert made.base == {"training.duration": "7"}
    assert (made.configs[0].optimizer.peak_lr, made.configs[0].seed) == (1.0, 3)


def test_recipes_are_the_outermost_axis():
    made = points.make([LINEAR, MLP], {}, [{"seed": "0"}, {"seed": "1"}])
    assert [point.name for point in made.points] == [
        f"quickstart.{mixer},seed={seed}" for mixer in ("ttt_linear", "ttt_mlp") for seed in (0, 1)
    ]
    assert [config.model.mixer for config in made.configs] == ["ttt_linear"] * 2 + ["ttt_mlp"] * 2
    assert [point.name for point in points.make([LINEAR], {}, [{}]).points] == ["quickstart.ttt_linear"]


def test_names_outlive_what_is_added():
    first = points.make([LINEAR], {}, [{"seed": "0"}]).points
    both = points.make([MLP, LINEAR], {}, [{"seed": "0"}], first).points
    assert [point.name for point in both] == ["quickstart.ttt_mlp,seed=0", "seed=0"]
    other = points.make([MLP], {}, [{"seed": "0"}], first).points
    assert [point.name for point in other] == ["quickstart.ttt_mlp,seed=0"]


def test_what_cannot_be_run_is_told_before_anything_starts():
    make = points.make
    assert message(make, [LINEAR], {}, [{"seed": "0"}, {"seed": "x"}]) == (
        f"point {LINEAR}, seed=x: seed=x: expected an integer"
    )
    assert message(make, [LINEAR], {"model.width": "12"}, [{"model.num_heads": "2"}, {"model.num_heads": "5"}]) == (
        f"point {LINEAR}, model.num_heads=5: model.num_heads=5: does not divide model.width=12; "
        "expected a divisor, such as 4"
    )
    assert message(make, [LINEAR], {}, [{"model.widht": "8"}]) == (
        f"point {LINEAR}, model.widht=8: model.widht: unknown key; did you mean model.width?"
    )
    assert message(make, [LINEAR], {}, [{"optimizer.peak_lr": "1e-3"}, {"optimizer.peak_lr": "0.001"}]) == (
        "points peak_lr=0.001 and peak_lr=0.001: are the same run; expected different ones"
    )
    assert "are the same run" in message(make, [QUICKSTART, LINEAR], {}, [{}])  # which is the default
    assert message(make, [LINEAR, LINEAR], {}, [{}]) == (
        f"--config {LINEAR}: has the name of --config {LINEAR}; expected different names"
    )
    many = [{"seed": str(seed)} for seed in range(5001)]
    assert message(make, [LINEAR, MLP], {}, many) == "10,002 points; expected at most 10,000"


# ---- sweep.json


POINT = Point("seed=0", LINEAR, {"seed": 0}, 7)
OTHER = Point("seed=1", LINEAR, {"seed": 1}, 7)
SWEEP = Sweep({"training.duration": "7"}, [Axis(("seed",), (("0",),))], [POINT])


def test_a_sweep_can_be_read_back(tmp_path):
    assert files.find_sweep(tmp_path / "nothing") is None
    files.write_sweep(tmp_path, SWEEP)
    assert files.find_sweep(tmp_path) == SWEEP
    assert json.loads((tmp_path / "sweep.json").read_text())["version"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "sweep.json: damaged: it is not JSON: "),
        ('{"version": 2}', "sweep.json: version 2; expected version 1, of a sweep"),
        ("[]", "sweep.json: damaged: it holds no JSON object"),
        ("{}", "sweep.json: version None; expected version 1, of a sweep"),
        ('{"version": 1, "base": {}, "axes": [], "points": [{}]}', "sweep.json: not a sweep: TypeError"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path, text, expected):
    (tmp_path / "sweep.json").write_text(text)
    assert expected in message(files.find_sweep, tmp_path)
    assert (tmp_path / "sweep.json").read_text() == text


def test_points_are_added_and_kept(tmp_path):
    assert files.merged(tmp_path, None, SWEEP) == SWEEP
    added = files.merged(tmp_path, SWEEP, SWEEP._replace(points=[OTHER]))
    assert added.points == [POINT, OTHER]
    assert files.merged(tmp_path, added, SWEEP._replace(points=[OTHER, POINT])).points == [POINT, OTHER]


def test_another_base_is_refused(tmp_path):
    wider = SWEEP._replace(base={**SWEEP.base, "model.width": 64})
    assert message(files.merged, tmp_path, SWEEP, wider) == (
        f"--workdir {tmp_path}: holds a sweep with another base (model.width not set there, 64 here); expected the "
        "same --config.KEY=VALUE for all points, or a new folder"
    )
    logged = SWEEP._replace(base={**SWEEP.base, "log.every": "5"}, points=[OTHER])
    assert files.merged(tmp_path, SWEEP, logged).points == [POINT, OTHER]  # changes no number


def test_all_points_can_be_made_longer_but_not_some(tmp_path):
    longer = SWEEP._replace(base={"training.duration": "9"}, points=[POINT._replace(steps=9)])
    assert files.merged(tmp_path, SWEEP, longer).points == [POINT._replace(steps=9)]
    two = SWEEP._replace(points=[POINT, OTHER])
    assert "training.duration 7 there, 9 here" in message(files.merged, tmp_path, two, longer)


def test_runs_of_another_config_are_found_before_anything_starts(sweep, calls, tmp_path, capsys):
    config = points.make([QUICKSTART], {}, [{"seed": "1"}]).configs[0].copy_and_resolve_references()
    folder = tmp_path / "sweep" / "seed=1"
    assert sweep("--grid seed=0") == 0
    folder.mkdir()
    config.model.width = 64
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    assert sweep("--grid seed=1,2") == 2
    said = f"ttt sweep: --workdir {folder}: holds a run of another config (model.width 64 there, 128 here)"
    assert said in capsys.readouterr().err
    assert not calls("seed=2")
