"""Test points, their names and configs, and the file of a sweep."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax import config as config_lib
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
    mixers = ["ttt_linear"] * 2 + ["ttt_mlp"] * 2
    expected = [f"quickstart.{mixer},seed={seed}" for mixer, seed in zip(mixers, (0, 1, 0, 1), strict=True)]
    assert [point.name for point in made.points] == expected
    assert [config.model.mixer for config in made.configs] == mixers
    assert [point.name for point in points.make([LINEAR], {}, [{}]).points] == ["quickstart.ttt_linear"]


def test_names_stay_when_recipes_are_added():
    first = points.make([LINEAR], {}, [{"seed": "0"}]).points
    both = points.make([MLP, LINEAR], {}, [{"seed": "0"}], first).points
    assert [point.name for point in both] == ["quickstart.ttt_mlp,seed=0", "seed=0"]
    other = points.make([MLP], {}, [{"seed": "0"}], first).points
    assert [point.name for point in other] == ["quickstart.ttt_mlp,seed=0"]


@pytest.mark.parametrize(
    ("recipes", "constant", "overrides", "expected"),
    [
        (
            *([LINEAR], {"model.width": "12"}, [{"model.num_heads": "2"}, {"model.num_heads": "5"}]),
            f"point {LINEAR}, model.num_heads=5: model.num_heads=5: does not divide model.width=12; expected a divisor",
        ),
        ([LINEAR], {}, [{"x": "8"}], f"point {LINEAR}, x=8: x: unknown key; did you mean "),
        ([LINEAR], {}, [{"seed": "1"}, {"seed": "01"}], "points seed=1 and seed=1: are the same run; expected differ"),
        ([QUICKSTART, LINEAR], {}, [{}], "points quickstart and quickstart.ttt_linear: are the same run"),
        ([LINEAR, LINEAR], {}, [{}], f"--config {LINEAR}: has the name of --config {LINEAR}; expected different names"),
        ([LINEAR, MLP], {}, [{"seed": str(i)} for i in range(5001)], "10,002 points; expected at most 10,000"),
    ],
)
def test_refused_points(recipes, constant, overrides, expected):
    assert message(points.make, recipes, constant, overrides).startswith(expected)


# ---- Names


KEYS = sorted(config_lib.settings())
TEXTS = st.text(max_size=12) | st.sampled_from(["300 steps", "10%", "300-steps", "10pct", "a/b", "..", "x,seed=1", "é"])
VALUES = st.booleans() | st.integers(-(10**6), 10**12) | st.floats(allow_nan=False) | TEXTS
POINTS = st.tuples(
    st.none() | st.sampled_from(["quickstart", "quickstart:a", "quickstart:a,b", "quickstart:a-b", "quick.start", "é"]),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5),
)


@pytest.mark.parametrize(
    ("recipe", "values", "pattern"),
    [
        (None, {"optimizer.peak_lr": 1e-3, "model.width": 512}, "peak_lr=0.001,width=512"),
        (None, {"log.every": "5 steps", "seed": 3}, "log.every=5-steps,seed=3"),
        (None, {"optimizer.warmup": "10%", "model.tie_embeddings": True}, "tie_embeddings=true,warmup=10pct"),
        (None, {"model.ttt.mlp_width_factor": 4.0, "optimizer.end_lr": 1e-20}, "end_lr=1e-20,mlp_width_factor=4"),
        (None, {"training.duration": "2.5e9 tokens"}, "duration=2.5e9-tokens"),
        ("quickstart:ttt_mlp", {"seed": 1}, "quickstart.ttt_mlp,seed=1"),
        ("paper:ttt_linear-1.3b-pile-2k", {}, "paper.ttt_linear-1.3b-pile-2k"),
        (None, {"data.source": "data/books"}, "source=data-books-[0-9a-f]{8}"),
        (None, dict.fromkeys(KEYS, 123456789), "(?=.{100}$)accumulation=123456789,.*-[0-9a-f]{8}"),
    ],
)
def test_names_are_readable_and_end_in_a_hash_where_they_cannot_tell(recipe, values, pattern):
    assert re.fullmatch(pattern, points.name_of(recipe, values))


@given(POINTS, st.randoms())
def test_names_are_safe_and_independent_of_order(point, random):
    recipe, values = point
    name = points.name_of(recipe, values)
    assert re.fullmatch(r"[A-Za-z0-9_.,=-]{0,100}", name)
    assert name not in (".", "..")
    items = list(values.items())
    random.shuffle(items)
    assert points.name_of(recipe, dict(items)) == name


@given(POINTS, POINTS)
def test_different_points_have_different_names(one, other):
    keys = list(one[1])
    for left, right in ((one, other), (one, (other[0], one[1])), (one, (one[0], dict.fromkeys(keys, "300-steps")))):
        same_types = all(type(left[1][key]) is type(right[1][key]) for key in left[1].keys() & right[1].keys())
        if left != right and same_types:  # a key has one type
            assert points.name_of(*left) != points.name_of(*right)


def test_short_keys_are_the_ends_of_one_key():
    short = [points.short_key(key) for key in KEYS]
    assert len(set(short)) == len(KEYS)
    for key, end in zip(KEYS, short, strict=True):
        assert [other for other in KEYS if f".{other}".endswith(f".{end}")] == [key]


@given(st.booleans() | st.integers() | st.floats(allow_nan=False))
def test_texts_of_numbers_can_be_read_back(value):
    text = points.value_text(value)
    assert {"true": True, "false": False}.get(text, None if isinstance(value, bool) else float(text)) == float(value)


# ---- sweep.json


POINT, OTHER = (Point(f"seed={seed}", LINEAR, {"seed": seed}, 7) for seed in (0, 1))
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


def test_another_base_is_refused_unless_it_may_change(tmp_path):
    wider = SWEEP._replace(base={**SWEEP.base, "model.width": 64})
    assert message(files.merged, tmp_path, SWEEP, wider) == (
        f"--workdir {tmp_path}: holds a sweep with another base (model.width not set there, 64 here); expected the "
        "same --config.KEY=VALUE for all points, or a new folder"
    )
    logged = SWEEP._replace(base={**SWEEP.base, "log.every": "5"}, points=[OTHER])
    assert files.merged(tmp_path, SWEEP, logged).points == [POINT, OTHER]  # changes no number
    longer = SWEEP._replace(base={"training.duration": "9"}, points=[POINT._replace(steps=9)])
    assert files.merged(tmp_path, SWEEP, longer).points == [POINT._replace(steps=9)]  # all points, not some
    two = SWEEP._replace(points=[POINT, OTHER])
    assert "training.duration 7 there, 9 here" in message(files.merged, tmp_path, two, longer)
