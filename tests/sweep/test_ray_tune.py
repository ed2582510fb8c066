"""Sweeps on Ray Tune: a real local Ray, with stand-ins for ``ttt train``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.tune")

from ttt_jax.sweep import files, status
from ttt_jax.sweep.ray_tune import Early

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def test_rungs():
    assert Early("loss", 10, 3.0, False).rungs(100) == [10.0, 30.0, 90.0]
    assert Early("loss", 10, 2.0, False).rungs(40) == [10.0, 20.0]  # at the end nothing is left to stop
    assert Early("loss", 50, 2.0, False).rungs(40) == []


def run(folder, *arguments):
    """A sweep of three points, one at a time, in a process of its own, as Ray takes signals and threads."""
    program = (sys.executable, "-S", str(HERE / "stand_in_of_steps.py"))
    code = f"from ttt_jax import cli; from ttt_jax.sweep import runner; runner.PROGRAM = {program!r}; "
    code += "exit(cli.main())"
    line = ["sweep", "--config", "configs/quickstart.py", "--workdir", str(folder), "--config.training.duration=40"]
    done = subprocess.run(
        [sys.executable, "-c", code, *line, "--grid", "seed=0,1,2", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def log(folder, seed):
    return (folder / f"seed={seed}" / "output.log").read_text()


@pytest.mark.slow
def test_bad_points_are_stopped_early_and_saved(tmp_path):
    folder = tmp_path / "sweep"
    asha = ["--asha", "loss", "--grace", "10", "--reduction", "2"]
    ray = ["--engine", "ray", "--jobs", "1"]
    code, out, err = run(folder, *ray, *asha)
    assert code == 0, err
    assert out == f"{folder}: 3 points: 1 done, 2 stopped early\n"
    assert "seed=1: to be stopped early, loss 5.9 at step 10\n" in err
    assert "Traceback" not in err
    assert log(folder, 0) == "going on at 0\n"
    for seed in (1, 2):
        assert log(folder, seed) == "going on at 0\nstopped by SIGTERM\n"
        steps = [json.loads(line)["step"] for line in (folder / f"seed={seed}/metrics.jsonl").read_text().splitlines()]
        assert 10 <= steps[-1] < 40
        assert files.read_record(folder / f"seed={seed}").state == "stopped early"

    before = {path: path.read_bytes() for path in folder.glob("*/*")}
    assert run(folder, *ray, *asha)[:2] == (0, out)
    assert before == {path: path.read_bytes() for path in folder.glob("*/*")}

    code, out, err = run(folder)  # elsewhere, and without comparisons: what was stopped goes on
    assert (code, out) == (0, f"{folder}: 3 points: 3 done\n")
    assert log(folder, 0) == "going on at 0\n"
    assert log(folder, 1).splitlines()[-1] == f"going on at {steps_of(before, folder, 1)}"
    assert {each.state for each in status.of_sweep(folder)} == {"done"}


def steps_of(files, folder, seed):
    return len(files[folder / f"seed={seed}" / "metrics.jsonl"].splitlines())


@pytest.mark.slow
def test_no_such_cluster_is_one_line(tmp_path):
    code, out, err = run(tmp_path / "sweep", "--engine", "ray", "--ray-address", "127.0.0.1:1")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("ttt sweep: --ray-address 127.0.0.1:1: no such cluster (")
    assert not list((tmp_path / "sweep").glob("seed*"))
