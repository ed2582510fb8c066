"""Test lists, ranges and groups of values: what they stand for, and what is refused."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax.config import ConfigError
from ttt_jax.sweep import axes


def test_grids_are_multiplied_and_groups_advance_together():
    rows = [("0", "8", "1"), ("0", "16", "2"), ("1", "8", "1"), ("1", "16", "2")]
    expected = [dict(zip(("seed", "model.width", "model.num_heads"), row, strict=True)) for row in rows]
    assert axes.combinations(["seed=0,1"], [["model.width=8,16", "model.num_heads=1,2"]], {}) == expected
    assert axes.combinations([], [], {}) == [{}]


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
    assert axes.values(text, "--grid k") == expected


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (["=1"], "--grid =1: expected KEY=VALUE,VALUE,... such as optimizer.peak_lr=1e-3,3e-3"),
        (["x=0", "x=1"], "--grid x: is set by --grid already; expected each key in one place"),
        (["x=linear:0:1:1000", "y=linear:0:1:6"], "--config, --grid, --zip: 12,000 points; expected at most 10,000"),
        *(([f"x={text}"], "an empty value; expected VALUE,VALUE,... (in quotes") for text in ("", "1,,2", "1,")),
        *(([f"x={text}"], "cannot be read from ") for text in ('"open', '"a"b', "log:__import__('os'):2:3")),
        *(
            ([f"x=log:{numbers}"], "expected log:LOW:HIGH:N, two different positive numbers and N from 2 to 10000")
            for numbers in ("1:2", "nan:2:3", "0:1:3", "1:2:")
        ),
        *(
            ([f"x=linear:{numbers}"], "expected linear:LOW:HIGH:N, two different numbers and N from 2 to 10000")
            for numbers in ("1:1:3", "0:1:1", "0:1:2.5", "0:1:99999999", "0:1e999:3", "0:1:3:4")
        ),
        *(
            ([f"x=pow2:{numbers}"], "expected pow2:LOW:HIGH, powers of two, LOW not above HIGH")
            for numbers in ("3:8", "8:4", "1:2:3")
        ),
    ],
)
def test_refused_axes(grids, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        axes.combinations(grids, [], {}, recipes=2)
    assert re.match(r"--(grid|config)\b.*: ", str(caught.value))
    assert "\n" not in str(caught.value)


@given(st.lists(st.text(st.characters(exclude_characters="\"'"), max_size=8), min_size=1, max_size=5))
def test_any_text_can_be_quoted(texts):
    for quote in ("'", '"'):
        assert axes.values(",".join(f"{quote}{text}{quote}" for text in texts), "o") == texts


@given(st.text(max_size=30))
def test_any_text_is_values_or_refused_and_is_never_run(text):
    try:
        found, said = axes.values(text, "--grid k"), "--grid k: "
    except ConfigError as error:
        found, said = [], str(error)
    assert said.startswith("--grid k: ")
    ranged = any(kind in text for kind in ("log:", "linear:", "pow2:"))
    assert all(value in text or (ranged and math.isfinite(float(value))) for value in found)


@given(st.floats(1e-12, 1e12), st.floats(1.001, 1e6), st.integers(2, 50))
def test_ranges_are_spaced_evenly_between_exact_ends(low, ratio, count):
    high = low * ratio
    logarithmic, linear = (
        [float(value) for value in axes.values(f"{kind}:{low!r}:{high!r}:{count}", "o")] for kind in ("log", "linear")
    )
    for found in (logarithmic, linear):
        assert (found[0], found[-1], len(found)) == (low, high, count)
    for i in range(count):
        part = i / (count - 1)
        assert math.log(logarithmic[i] / low) == pytest.approx(math.log(high / low) * part, abs=1e-5)
        assert linear[i] == pytest.approx(low + (high - low) * part, rel=1e-9)
