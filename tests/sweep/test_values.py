"""Lists and ranges of values: what they stand for, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax.config import ConfigError
from ttt_jax.sweep import axes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3,3e-3", ["1e-3", "3e-3"]),
        (" 1 , 2 ", ["1", "2"]),
        ("2.5e9 tokens,300 steps", ["2.5e9 tokens", "300 steps"]),
        ('"a, b",c', ["a, b", "c"]),
        ('\'say "hi"\',"it\'s"', ['say "hi"', "it's"]),
        ('"",10%', ["", "10%"]),
        ("'log:1:2:3'", ["log:1:2:3"]),
        ("10:13", ["10:13"]),
        ("log:1e-4:1e-2:5", ["0.0001", "0.000316228", "0.001", "0.00316228", "0.01"]),
        ("log:64:1024:5", ["64", "128", "256", "512", "1024"]),
        ("log:1e-2:1e-3:2", ["0.01", "0.001"]),
        ("linear:0:1:5", ["0", "0.25", "0.5", "0.75", "1"]),
        ("linear:-0.1:0.2:4", ["-0.1", "0", "0.1", "0.2"]),
        ("pow2:1:2048", [str(2**n) for n in range(12)]),
        ("pow2:0.25:1", ["0.25", "0.5", "1"]),
        ("0,pow2:4:8,x", ["0", "4", "8", "x"]),
    ],
)
def test_parse(text, expected):
    assert axes.values(text, "--grid k") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty value"),
        ("1,,2", "an empty value"),
        ("1,", "an empty value"),
        ('"open', "cannot be read from '\"open' on"),
        ('"a"b', "cannot be read from '\"a\"b' on"),
        ("log:1:2", "expected log:LOW:HIGH:N, linear:LOW:HIGH:N or pow2:LOW:HIGH"),
        ("log:0:1:3", "expected positive, finite LOW and HIGH"),
        ("linear:0:1e999:3", "expected finite LOW and HIGH"),
        ("linear:1:1:3", "expected two different ends and N from 2 to 10000"),
        ("linear:0:1:1", "expected two different ends and N from 2 to 10000"),
        ("linear:0:1:2.5", "expected two different ends and N from 2 to 10000"),
        ("linear:0:1:99999999", "expected two different ends and N from 2 to 10000"),
        ("pow2:3:8", "expected powers of two, LOW not above HIGH"),
        ("pow2:8:4", "expected powers of two, LOW not above HIGH"),
        ("log:__import__('os'):2:3", "cannot be read"),
        ("log:nan:2:3", "expected log:LOW:HIGH:N"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        axes.values(text, "--grid k")
    assert str(caught.value).startswith("--grid k: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(st.text(st.characters(exclude_characters="\"'"), max_size=8), min_size=1, max_size=5))
def test_any_text_can_be_quoted(texts):
    for quote in ("'", '"'):
        assert axes.values(",".join(f"{quote}{text}{quote}" for text in texts), "o") == texts


@given(st.text(max_size=30))
def test_any_text_is_values_or_one_line(text):
    """And nothing is run: what comes out stood in the text, or is a number of a range."""
    try:
        found = axes.values(text, "--grid k")
    except ConfigError as error:
        found, said = [], str(error)
    else:
        said = "--grid k: "
    assert said.startswith("--grid k: ")
    ranged = any(kind in text for kind in ("log:", "linear:", "pow2:"))
    assert all(value in text or (ranged and math.isfinite(float(value))) for value in found)


@given(st.floats(1e-12, 1e12), st.floats(1.001, 1e6), st.integers(2, 50))
def test_ranges_are_spaced_evenly_between_exact_ends(low, ratio, count):
    high = low * ratio
    found = [float(value) for value in axes.values(f"log:{low!r}:{high!r}:{count}", "o")]
    assert (found[0], found[-1], len(found)) == (low, high, count)
    for index, value in enumerate(found):
        assert math.log(value / low) == pytest.approx(math.log(high / low) * index / (count - 1), abs=1e-5)
    found = [float(value) for value in axes.values(f"linear:{low!r}:{high!r}:{count}", "o")]
    assert (found[0], found[-1], len(found)) == (low, high, count)
    for index, value in enumerate(found):
        assert value == pytest.approx(low + (high - low) * index / (count - 1), rel=1e-9)
