"""Run ``ttt inspect``."""

import json
import re

import numpy as np
import pytest
from tiny_run import ttt

from ttt_jax import config as config_lib


def tiny(mixer):
    config = config_lib.default()
    config.model.update(mixer=mixer, width=8, num_layers=2, num_heads=2, mlp_width=8)
    config.model.ttt.mini_batch = 4
    config.data.update(sequence_length=16, batch_size=2)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, save_run):
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "learns", tiny("ttt_linear"), (3, 5))
    save_run(folder / "attends", tiny("attention"))
    return folder


def test_all_runs_are_checked_before_any_is_read(runs, capsys, tmp_path):
    learns, attends = runs / "learns", runs / "attends"
    for arguments, message in (
        (
            (learns, attends),
            f"--workdir {attends}: its Transformer has no inner loop; expected a run with model.mixer=",
        ),
        ((learns, tmp_path), f"{tmp_path}/config.json: not found"),
        ((learns, "--step", 4), f"--step 4: no such checkpoint in {learns}; expected "),
        ((learns, "--context", 10**8), "--context 100000000: embedded/validation has "),
    ):
        assert ttt("inspect", "--workdir", *arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"ttt inspect: {message}")
        assert printed.err.count("\n") == 1
    assert not (learns / "inspect").exists()


@pytest.mark.slow
def test_a_line_for_each_layer_and_three_files_for_each_step(runs, capsys):
    learns = runs / "learns"
    assert ttt("inspect", "--workdir", learns, "--context", 12, "--max-windows", 5, "--step", "all") == 0
    out = capsys.readouterr().out
    stems = {"validation-12-at-3", "validation-12-at-5"}
    assert {path.stem for path in (learns / "inspect").iterdir()} == stems
    assert len(list((learns / "inspect").iterdir())) == 6
    about = json.loads((learns / "inspect/validation-12-at-3.json").read_text())
    assert "learns: TTT-Linear (Mamba backbone), step 3, embedded/validation, 5 windows of 12 tokens" in out
    for i, layer in enumerate(about["layers"]):
        line = next(line for line in out.splitlines() if line.split()[:1] == [str(i)])
        shown = [float(re.sub("%", "", x)) for x in line.split()[1:]]
        expected = np.array([layer[name] for name in ("loss_at_w0", "loss_before", "loss_after", "explained")])
        np.testing.assert_allclose(shown[:4], expected * [1, 1, 1, 100], rtol=1e-3, atol=0.05)
        np.testing.assert_allclose(shown[4:], list(layer.values())[4:], rtol=0.05)
