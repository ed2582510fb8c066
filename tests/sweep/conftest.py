"""Provide sweeps whose points are quick stand-ins for ``ttt``, and sweeps that have run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ttt_jax import cli
from ttt_jax import config as config_lib
from ttt_jax.sweep import files, runner
from ttt_jax.sweep.points import Point

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROGRAM = (sys.executable, "-S", str(HERE / "stand_in.py"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sweep"


@pytest.fixture
def sweep(monkeypatch, folder):
    """Return ``sweep(arguments, do={point: actions})``, which runs ``ttt sweep`` and returns its exit status."""

    def run(arguments, do=None):
        with monkeypatch.context() as patch:
            patch.setattr(runner, "PROGRAM", PROGRAM)
            patch.setenv("STAND_IN", json.dumps(do or {}))
            line = ["sweep", "--config", str(ROOT / "configs/quickstart.py"), "--workdir", str(folder)]
            return cli.main([*line, *arguments.split()])

    return run


@pytest.fixture
def start_sweep(folder):
    """Return ``start_sweep(arguments, do=actions)``, which starts a process that does the same, and returns it."""
    code = f"from ttt_jax import cli; from ttt_jax.sweep import runner; runner.PROGRAM = {PROGRAM!r}; exit(cli.main())"
    line = [sys.executable, "-c", code, "sweep", "--config", "configs/quickstart.py", "--workdir", str(folder)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    started = []

    def start(arguments, do=None, **environment):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "STAND_IN": json.dumps(do or {}), **environment}
        started.append(subprocess.Popen([*line, *arguments.split()], env=environment, cwd=ROOT, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def add_point(folder):
    """Return ``add_point(name, values, losses, state)``, which adds a point with losses at steps 1, 2, ..."""
    points = []

    def add(name, values, losses=(), state=None, recipe="r.py", steps=None, **more):
        workdir = folder / name
        workdir.mkdir(parents=True)
        steps = steps or len(losses)
        points.append(Point(name, recipe, values, steps))
        if losses:
            lines = [{"step": i, "loss": x, "tokens_per_second": 10.0 * i} for i, x in enumerate(losses, 1)]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            config = {"seed": 0, "optimizer": {"peak_lr": 0.1, "warmup": "10%"}}
            for key, value in values.items():
                config_lib.set_value(config, key, value)
            (workdir / "config.json").write_text(json.dumps(config))
        if state:
            files.write_record(workdir, files.Record(state, steps, **more))
        files.write_sweep(folder, files.Sweep({}, points))
        return points[-1]

    return add
