"""The schedules of the kernels by the compiler of TPUs, as ratios to the structure of the authors' code."""

import importlib.util

import pytest

from ttt_jax.benchmark.tpu_schedule.compile import Function
from ttt_jax.benchmark.tpu_schedule.schedule import measure

BUILD = "ttt_jax.benchmark.inner_loop:build"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("for_libtpu"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


def seconds(**settings):
    return measure(Function(BUILD, {"tokens": 512, **settings}), "v5e:1x1").seconds


@pytest.mark.parametrize(
    ("settings", "at_least"),
    [
        ({"kind": "linear", "backward": True}, 7.9),
        ({"kind": "linear", "heads": 32}, 4.7),
        ({"kind": "mlp", "backward": True}, 5.8),
    ],
)
def test_fused_kernels_are_as_much_faster_as_they_were(settings, at_least):
    """12 heads of 64 or 32, b = 16, bfloat16; 512 tokens, to which what is around them is a tenth, or a quarter."""
    assert seconds(**settings, path="official") / seconds(**settings, path="pallas") > at_least


@pytest.mark.parametrize(
    ("chip", "settings"),
    [
        ("v6e:1x1", {"head_dim": 128, "heads": 3}),
        ("v5p:2x2x1", {"head_dim": 96, "heads": 2, "dtype": "f32"}),
        ("v5e:1x1", {"mini_batch": 64, "heads": 5, "remat_group": 8}),
        ("v5p:2x2x1", {"heads": 16, "head_dim": 128, "mini_batch": 64, "remat_group": 16}),
    ],
)
def test_they_compile_for_other_chips_and_shapes(chip, settings):
    found = measure(Function(BUILD, {"tokens": 256, "backward": True, "path": "pallas", **settings}), chip)
    names = " ".join(o.operation.op_name for o in found.operations if o.cycles > 2000)
    assert "ttt_linear_forward" in names
    assert "ttt_linear_backward" in names


@pytest.mark.parametrize("settings", [{"kind": "mlp", "mini_batch": 8}, {"kind": "linear", "mini_batch": 8}])
def test_the_largest_fit_into_fast_memory(settings):
    """Where a batch is too large for the compiler to keep any of it there, so that all passes through: what it does
    with a whole training step. It refuses a program that takes more than it may."""
    measure(
        Function(BUILD, {**settings, "heads": 32, "tokens": 2048, "batch": 32, "backward": True, "path": "pallas"}),
        "v5p:2x2x1",
    )
