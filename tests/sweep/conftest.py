"""Provide sweeps whose points are quick stand-ins for ``ttt``, and sweeps that have run."""

import json
import math
import os
import subprocess
import sys
import time
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
def calls(folder):
    """Return ``calls(point)``: the arguments, process and GPUs of each start of a point."""

    def read(point):
        path = folder / point / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return read


@pytest.fixture
def wait_for():
    """Return ``wait_for(condition)``, which returns once the condition holds."""

    def wait(condition, seconds=20):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.02)

    return wait


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
        files.write_sweep(folder, files.Sweep({}, [], points))
        return points[-1]

    return add


@pytest.fixture
def five_points(add_point):
    """Add two points that are done, one that runs, one that failed, one that waits."""
    for lr, losses, state in (
        (0.1, [3.0] * 95 + [2.0] * 5, "done"),
        (0.01, [1.0] * 95 + [1.9, 1.5, 1.7, 1.6, 1.8], "done"),
        (1.0, [1.0] * 40, "running"),
    ):
        add_point(f"lr={lr}", {"optimizer.peak_lr": lr}, losses, state, steps=100)
    failed = {"status": 1, "said": "loss is nan"}
    add_point("lr=10.0", {"optimizer.peak_lr": 10.0}, [5.0, math.nan], "failed", steps=100, **failed)
    add_point("lr=0.001", {"optimizer.peak_lr": 0.001}, steps=100)


@pytest.fixture
def diverged(add_point):
    """Add points that are done: losses NaN, infinite and null in JSON, and two finite ones."""
    for lr, loss in {0.5: math.nan, 0.1: 2.0, 0.2: math.inf, 0.4: None, 0.05: 1.5}.items():
        add_point(f"lr={lr}", {"optimizer.peak_lr": lr}, [1.0, loss], "done")
