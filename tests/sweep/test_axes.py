"""Products and groups of keys."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax.config import ConfigError
from ttt_jax.sweep import axes
from ttt_jax.sweep.axes import Axis


def test_grids_are_multiplied_and_groups_advance_together():
    found = axes.from_options(["seed=0,1"], [["model.width=8,16", "model.num_heads=1,2"]], {})
    assert found == [
        Axis(("seed",), (("0",), ("1",))),
        Axis(("model.width", "model.num_heads"), (("8", "1"), ("16", "2"))),
    ]
    assert axes.product(found) == [
        {"seed": "0", "model.width": "8", "model.num_heads": "1"},
        {"seed": "0", "model.width": "16", "model.num_heads": "2"},
        {"seed": "1", "model.width": "8", "model.num_heads": "1"},
        {"seed": "1", "model.width": "16", "model.num_heads": "2"},
    ]
    assert axes.product([]) == [{}]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), max_size=4))
def test_sizes(groups):
    """Of a group of so many keys with so many values."""
    zips = [[f"k{i}.n{j}={','.join(map(str, range(size)))}" for j in range(n)] for i, (n, size) in enumerate(groups)]
    points = axes.product(axes.from_options([], zips, {}))
    assert len(points) == math.prod(size for _, size in groups)
    assert len({tuple(point.values()) for point in points}) == len(points)
    for point in points:
        assert len(point) == sum(n for n, _ in groups)
        for i, (n, _) in enumerate(groups):
            assert len({point[f"k{i}.n{j}"] for j in range(n)}) == 1  # together


@pytest.mark.parametrize(
    ("grids", "zips", "message"),
    [
        (["seed=0", "seed=1"], [], "--grid seed: is set by --grid already; expected each key in one place"),
        (["seed=0"], [["seed=1"]], "--zip seed: is set by --grid already; expected each key in one place"),
        ([], [["seed=1", "seed=2"]], "--zip seed: is set by --zip already; expected each key in one place"),
        (["a.b=1"], [], "--grid a.b: is set by --config.a.b already; expected each key in one place"),
        ([], [["x=1,2", "y=1,2,3"]], "--zip: 2 of x, 3 of y; expected as many values of each key"),
        (["seed"], [], "--grid seed: expected KEY=VALUE,VALUE,... such as optimizer.peak_lr=1e-3,3e-3"),
        (["=1"], [], "--grid =1: expected KEY=VALUE,VALUE,... such as optimizer.peak_lr=1e-3,3e-3"),
        (["seed="], [], '--grid seed=: an empty value; expected VALUE,VALUE,... (in quotes, "", for an empty text)'),
        (["x=linear:0:1:1000", "y=linear:0:1:11"], [], "--grid, --zip: 11,000 points; expected at most 10,000"),
    ],
)
def test_refused(grids, zips, message):
    with pytest.raises(ConfigError) as caught:
        axes.from_options(grids, zips, {"a.b": "1"})
    assert str(caught.value) == message
