"""Names of points."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax import config as config_lib
from ttt_jax.sweep import points

KEYS = sorted(config_lib.settings())
TEXTS = st.text(max_size=12) | st.sampled_from(["300 steps", "10%", "300-steps", "10pct", "a/b", "..", "x,seed=1", "é"])
VALUES = st.booleans() | st.integers(-(10**6), 10**12) | st.floats(allow_nan=False) | TEXTS
POINTS = st.tuples(
    st.none() | st.sampled_from(["quickstart", "quickstart:a", "quickstart:a,b", "quickstart:a-b", "quick.start", "é"]),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5),
)


@pytest.mark.parametrize(
    ("recipe", "values", "expected"),
    [
        (None, {"optimizer.peak_lr": 1e-3, "model.width": 512}, "peak_lr=0.001,width=512"),
        (None, {"log.every": "5 steps", "seed": 3}, "log.every=5-steps,seed=3"),
        (None, {"optimizer.warmup": "10%", "model.tie_embeddings": True}, "tie_embeddings=true,warmup=10pct"),
        (None, {"model.ttt.mlp_width_factor": 4.0, "optimizer.end_lr": 1e-20}, "end_lr=1e-20,mlp_width_factor=4"),
        (None, {"training.duration": "2.5e9 tokens"}, "duration=2.5e9-tokens"),
        ("quickstart:ttt_mlp", {"seed": 1}, "quickstart.ttt_mlp,seed=1"),
        ("paper:ttt_linear-1.3b-pile-2k", {}, "paper.ttt_linear-1.3b-pile-2k"),
    ],
)
def test_readable(recipe, values, expected):
    assert points.name_of(recipe, values) == expected


def test_a_hash_where_a_name_cannot_tell():
    assert re.fullmatch(r"source=data-books-[0-9a-f]{8}", points.name_of(None, {"data.source": "data/books"}))
    many = dict.fromkeys(KEYS, 123456789)
    assert re.fullmatch(r"accumulation=123456789,.*-[0-9a-f]{8}", points.name_of(None, many))
    assert len(points.name_of(None, many)) == 100


@given(POINTS, st.randoms())
def test_safe_and_independent_of_order(point, random):
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
