"""Check help and refusals of ``ttt bench tpu-schedule``, for which no slow library is loaded."""

import argparse
from pathlib import Path

import pytest

from ttt_jax.cli import bench

CONFIG = f"--config {Path(__file__).resolve().parents[2] / 'configs' / 'quickstart.py'}"
BUILD = "--function ttt_jax.benchmark.inner_loop:build"
REFUSED = {
    "": "--config, --function: missing; expected --config FILE or --function MODULE:NAME",
    f"{CONFIG} --set heads=3": "--set: expected --function too; keys of a config are set by --config.KEY=VALUE",
    f"{CONFIG} --compare seed=1 model.heads=2": "model.heads: unknown key; did you mean model.num_heads?",
    f"{BUILD} {CONFIG}": "'--config': unexpected argument; --function has no config, its settings are --set KEY=VALUE",
    "--function inner_loop": "--function inner_loop: expected MODULE:NAME or FILE.py:NAME",
    f"{BUILD} --set heads": "--set heads: expected KEY=VALUE",
    f"{BUILD} --compare path=scan": "--compare: expected two or more of KEY=VALUE[,KEY=VALUE...]",
    f"{BUILD} --compare path=scan,unroll path=official": "--compare unroll: expected KEY=VALUE",
    f"{BUILD} --top -1": "argument --top: '-1': expected 0 or more",
}


@pytest.fixture(scope="module")
def printed(in_one_process):
    return in_one_process(
        ["bench tpu-schedule --help", *(f"bench tpu-schedule {rest}".strip() for rest in REFUSED)],
        unwanted=("orbax", "grain", "tensorstore"),
    )


def test_help_names_every_option(printed):
    status, out, _ = printed["bench tpu-schedule --help"]
    assert status == 0
    for text in ("--function MODULE:NAME", "--set KEY=VALUE", "--topology", "--compare", "--top", "--json", "--keep"):
        assert text in out
    assert "--config.model.ttt.mini_batch=16" in out


@pytest.mark.parametrize("rest", REFUSED)
def test_wrong_arguments_are_refused_in_one_line(printed, rest):
    status, out, err = printed[f"bench tpu-schedule {rest}".strip()]
    assert (status, out) == (2, "")
    assert REFUSED[rest] in err.splitlines()[-1]
    assert "Traceback" not in err


def test_settings_have_types():
    options = argparse.Namespace(function="m:f", set=["a=1", "b=0.5", "c=true", "d=f32", "e=1e-3", "f=x=y", "g=old"])
    target = bench.target_of(options, [], "g=new,h=-2")
    assert target.settings == {
        "a": 1, "b": 0.5, "c": True, "d": "f32", "e": 1e-3, "f": "x=y", "g": "new", "h": -2,
    }  # fmt: skip
    assert [type(v) for v in target.settings.values()] == [int, float, bool, str, float, str, str, int]


def test_keys_of_a_config_are_compared():
    options = argparse.Namespace(function=None, set=[])
    target = bench.target_of(options, [*CONFIG.split(), "--config.seed=3"], "model.ttt.unroll=4,seed=5")
    assert (target.config.model.ttt.unroll, target.config.seed) == (4, 5)
    assert str(target) == f"training step of {CONFIG.split()[1]}"
