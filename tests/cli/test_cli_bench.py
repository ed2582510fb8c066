"""Check what ``ttt bench tpu-schedule`` compiles."""

import argparse
from pathlib import Path

from ttt_jax.cli import bench

CONFIG = f"--config {Path(__file__).resolve().parents[2] / 'configs' / 'quickstart.py'}"


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
