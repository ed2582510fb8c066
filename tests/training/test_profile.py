"""Traces: that they are of the steps that were asked for, with spans named after layers."""

import pytest

from ttt_jax.training import loop


@pytest.mark.slow
def test_a_trace_names_layers(tmp_path, tiny_config):
    loop.train(tiny_config({"training.duration": "6 steps", "profile.steps": "3:4"}), tmp_path)
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    for name in (b"layers/mixer", b"layers/mlp", b"train"):
        assert name in content
    assert content.count(b"step_num") > 0


@pytest.mark.slow
def test_no_trace_is_written_unless_asked_for(tmp_path, tiny_config):
    loop.train(tiny_config({"training.duration": "2 steps"}), tmp_path)
    assert not (tmp_path / "profile").exists()
