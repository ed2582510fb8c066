"""Test numbers that may be NaN or infinite."""

import math

import pytest

from ttt_jax import finite


def test_exp_is_infinite_where_it_overflows():
    assert finite.exp(709.0) == math.exp(709.0)
    assert (finite.exp(710.0), finite.exp(math.inf), finite.exp(-math.inf)) == (math.inf, math.inf, 0.0)
    assert math.isnan(finite.exp(math.nan))
    assert math.isnan(finite.exp(None))


def test_means_of_values_that_are_not_finite_are_not_finite():
    assert finite.mean([1.0, 2.0, 6.0]) == 3.0
    assert finite.mean([1e308, 1e308]) == pytest.approx(1e308)
    assert finite.mean([1.0, math.inf]) == math.inf
    for values in ([1.0, math.nan], [math.inf, -math.inf], []):
        assert math.isnan(finite.mean(values))


def test_json_has_null_for_numbers_that_are_not_finite():
    found = finite.for_json({"a": [1.5, math.nan], "b": (math.inf, "x"), "c": True, "d": 2})
    assert found == ({"a": [1.5, None], "b": [None, "x"], "c": True, "d": 2}, 2)


def test_numbers_are_formatted_and_told_apart():
    assert [finite.format_number(x, ".2f") for x in (1.0, math.nan, -math.inf, None)] == ["1.00", *["not finite"] * 3]
    assert [finite.is_finite(x) for x in (1.0, math.nan, math.inf, None)] == [True, False, False, False]
