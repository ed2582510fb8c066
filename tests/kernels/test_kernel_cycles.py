"""Test the schedules of the kernels by the TPU compiler, as ratios to the structure of the authors' code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ttt_jax.benchmark.tpu_schedule.compile import Function
from ttt_jax.benchmark.tpu_schedule.schedule import measure

BUILD = "ttt_jax.benchmark.inner_loop:build"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("for_libtpu"),
    pytest.mark.tpu_compiler,
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
def test_fused_kernels_keep_their_speedup(settings, at_least):
    """Measure 12 or 32 heads of 64, b = 16, bfloat16, 512 tokens; up to a quarter of the time is outside of them."""
    assert seconds(**settings, path="official") / seconds(**settings, path="pallas") > at_least


def compiled(chip, *settings, build=BUILD):
    """Return the compiled text of each inner loop, without its schedule."""
    program = [sys.executable, str(Path(__file__).with_name("compiles.py")), chip, build]
    done = subprocess.run([*program, json.dumps(settings)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("chip", "settings"),
    [
        ("v6e:1x1", [{"head_dim": 128, "heads": 3}]),
        (
            "v5e:1x1",
            [
                {"mini_batch": 64, "heads": 5, "remat_group": 8, "restarts": True},
                {"kind": "mlp", "heads": 2, "restarts": True},
            ],
        ),
        (
            "v5p:2x2x1",
            [
                {"head_dim": 96, "heads": 2, "dtype": "f32", "restarts": True},
                {"heads": 16, "head_dim": 128, "mini_batch": 64, "remat_group": 16},
            ],
        ),
    ],
)
def test_kernels_compile_for_other_chips_and_shapes(chip, settings):
    texts = compiled(chip, *({"tokens": 256, "backward": True, "path": "pallas", **each} for each in settings))
    for text, each in zip(texts, settings, strict=True):
        assert f"ttt_{each.get('kind', 'linear')}_forward" in text
        assert f"ttt_{each.get('kind', 'linear')}_backward" in text


def test_programs_of_the_self_check_compile():
    """Compile programs in float32, whose matrix products have a higher precision than those of a model by default."""
    parts = [
        {"kind": "linear", "heads": 2, "dtype": "f32", "part": part, "remat_group": group}
        for part, group in (("scan", 4), ("kernel", 4), ("kernel", 8), ("inference", 4))
    ]
    texts = compiled("v5e:1x1", *parts, build="ttt_jax.benchmark.inner_loop:build_self_check")
    kernels = [[name for name in ("ttt_linear_forward", "ttt_linear_backward") if name in text] for text in texts]
    assert [len(each) for each in kernels] == [0, 2, 2, 1]


def test_largest_kernels_fit_into_fast_memory():
    """Compile the largest kernels with a batch of which the compiler keeps nothing in fast memory, as in training.

    The compiler refuses a program that takes too much. With restarts a program takes more.
    """
    large = {"mini_batch": 8, "heads": 32, "tokens": 2048, "batch": 32, "backward": True, "path": "pallas"}
    mlp, linear = compiled("v5p:2x2x1", {"kind": "mlp", **large}, {"kind": "linear", "restarts": True, **large})
    assert "ttt_mlp_backward" in mlp
    assert "ttt_linear_backward" in linear
