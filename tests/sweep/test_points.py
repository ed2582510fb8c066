"""Test points, what is swept, names, and the file of a sweep."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.sweep import files, points
from ttt_jax.sweep.files import Sweep
from ttt_jax.sweep.points import Point

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")
LINEAR, MLP = f"{QUICKSTART}:ttt_linear", f"{QUICKSTART}:ttt_mlp"


def names(recipes, overrides, existing=()):
    return [point.name for point, _ in points.make(recipes, {}, overrides, existing)]


def test_values_have_the_types_of_their_keys():
    ((point, config),) = points.make([LINEAR], {"training.duration": "7"}, [{"optimizer.peak_lr": "1", "seed": "3"}])
    assert point == Point("peak_lr=1,seed=3", LINEAR, {"optimizer.peak_lr": 1.0, "seed": 3}, 7)
    assert isinstance(point.values["optimizer.peak_lr"], float)
    assert (config.optimizer.peak_lr, config.seed, config.training.duration) == (1.0, 3, "7")


def test_recipes_are_the_outermost_axis():
    mixers = ["ttt_linear", "ttt_linear", "ttt_mlp", "ttt_mlp"]
    expected = [f"quickstart.{mixer},seed={seed}" for mixer, seed in zip(mixers, (0, 1, 0, 1), strict=True)]
    made = points.make([LINEAR, MLP], {}, [{"seed": "0"}, {"seed": "1"}])
    assert [(point.name, config.model.mixer) for point, config in made] == list(zip(expected, mixers, strict=True))
    assert names([LINEAR], [{}]) == ["quickstart.ttt_linear"]


def test_names_stay_when_recipes_are_added():
    first = [point for point, _ in points.make([LINEAR], {}, [{"seed": "0"}])]
    assert names([MLP, LINEAR], [{"seed": "0"}], first) == ["quickstart.ttt_mlp,seed=0", "seed=0"]
    assert names([MLP], [{"seed": "0"}], first) == ["quickstart.ttt_mlp,seed=0"]


def test_recipes_of_one_name_are_refused():
    expected = f"--config {LINEAR}: has the name of --config {LINEAR}; expected different names"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        points.make([LINEAR, LINEAR], {}, [{}])


# ---- What is swept


def test_grids_are_multiplied_and_groups_advance_together():
    rows = [("0", "8", "1"), ("0", "16", "2"), ("1", "8", "1"), ("1", "16", "2")]
    expected = [dict(zip(("seed", "model.width", "model.num_heads"), row, strict=True)) for row in rows]
    assert points.combinations(["seed=0,1"], [["model.width=8,16", "model.num_heads=1,2"]], {}) == expected
    assert points.combinations([], [], {}) == [{}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("1e-3,3e-3", ["1e-3", "3e-3"]), (" 1 , 2 ", ["1", "2"]), ("10:13", ["10:13"])),
        ("2.5e9 tokens,300 steps", ["2.5e9 tokens", "300 steps"]),
        *(('"a, b",c', ["a, b", "c"]), ('\'say "hi"\',"it\'s"', ['say "hi"', "it's"])),
        *(('"",10%', ["", "10%"]), ("'log:1:2:3'", ["log:1:2:3"])),
        ("log:1e-4:1e-2:5", ["0.0001", "0.000316228", "0.001", "0.00316228", "0.01"]),
        *(("log:64:1024:5", ["64", "128", "256", "512", "1024"]), ("log:1e-2:1e-3:2", ["0.01", "0.001"])),
        *(("linear:0:1:5", ["0", "0.25", "0.5", "0.75", "1"]), ("linear:-0.1:0.2:4", ["-0.1", "0", "0.1", "0.2"])),
        *(("pow2:1:2048", [str(2**n) for n in range(12)]), ("pow2:0.25:1", ["0.25", "0.5", "1"])),
        ("0,pow2:4:8,x", ["0", "4", "8", "x"]),
    ],
)
def test_values(text, expected):
    assert points.parse_values(text, "--grid k") == expected


REFUSED = {
    "an empty value; expected VALUE,VALUE,... (in quotes": ["", "1,,2", "1,"],
    "cannot be read from ": ['"open', '"a"b', "log:__import__('os'):2:3"],
    "expected log:LOW:HIGH:N, two different positive": ["log:1:2", "log:nan:2:3", "log:0:1:3", "log:1:2:"],
    "expected linear:LOW:HIGH:N, two different numbers and N": [
        f"linear:{numbers}" for numbers in "1:1:3 0:1:1 0:1:2.5 0:1:99999999 0:1e999:3 0:1:3:4".split()
    ],
    "expected pow2:LOW:HIGH, powers of two, LOW not above HIGH": ["pow2:3:8", "pow2:8:4", "pow2:1:2:3"],
}


@pytest.mark.parametrize(("message", "text"), [(message, text) for message, texts in REFUSED.items() for text in texts])
def test_refused_values(message, text):
    with pytest.raises(ConfigError, match=f"^--grid k: [^\n]*{re.escape(message)}[^\n]*$"):
        points.parse_values(text, "--grid k")


def test_too_many_points_are_refused():
    with pytest.raises(ConfigError, match=r"^--config, --grid, --zip: 12,000 points; expected at most 10,000$"):
        points.combinations(["x=linear:0:1:1000", "y=linear:0:1:6"], [], {}, recipes=2)


@given(st.lists(st.text(st.characters(exclude_characters="\"'"), max_size=8), min_size=1, max_size=5))
def test_any_text_can_be_quoted(texts):
    for quote in ("'", '"'):
        assert points.parse_values(",".join(f"{quote}{text}{quote}" for text in texts), "o") == texts


@given(st.text(max_size=30))
def test_any_text_is_values_or_refused_and_is_never_run(text):
    try:
        found, said = points.parse_values(text, "--grid k"), "--grid k: "
    except ConfigError as error:
        found, said = [], str(error)
    assert said.startswith("--grid k: ")
    ranged = any(kind in text for kind in ("log:", "linear:", "pow2:"))
    assert all(value in text or (ranged and math.isfinite(float(value))) for value in found)


@given(st.floats(1e-12, 1e12), st.floats(1.001, 1e6), st.integers(2, 50))
def test_ranges_are_spaced_evenly_between_exact_ends(low, ratio, count):
    high = low * ratio
    logarithmic, linear = (
        [float(value) for value in points.parse_values(f"{kind}:{low!r}:{high!r}:{count}", "o")]
        for kind in ("log", "linear")
    )
    for found in (logarithmic, linear):
        assert (found[0], found[-1], len(found)) == (low, high, count)
    for i in range(count):
        part = i / (count - 1)
        assert math.log(logarithmic[i] / low) == pytest.approx(math.log(high / low) * part, abs=1e-5)
        assert linear[i] == pytest.approx(low + (high - low) * part, rel=1e-9)


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
SWEEP = Sweep({"training.duration": "7"}, [POINT])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "sweep.json: damaged: it is not JSON: "),
        ("{}", "sweep.json: version None; expected version 1, of a sweep"),
        ('{"version": 1, "base": {}, "axes": [], "points": [{}]}', "sweep.json: not a sweep: TypeError"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path, text, expected):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        files.find_sweep(tmp_path)
    assert (tmp_path / "sweep.json").read_text() == text


def test_points_are_added_and_another_base_is_refused_unless_it_may_change(tmp_path):
    two = files.merged(tmp_path, SWEEP, SWEEP._replace(points=[OTHER]))
    assert two.points == [POINT, OTHER]
    logged = Sweep({**SWEEP.base, "log.every": "5"}, [OTHER])  # changes no number
    assert files.merged(tmp_path, SWEEP, logged).points == [POINT, OTHER]
    with pytest.raises(ConfigError) as caught:
        files.merged(tmp_path, two, Sweep({"training.duration": "9", "model.width": 64}, [POINT]))
    assert str(caught.value) == (
        f"--workdir {tmp_path}: holds a sweep with another base (model.width not set there, 64 here, training.duration "
        "7 there, 9 here); expected the same --config.KEY=VALUE for all points, or a new folder"
    )
