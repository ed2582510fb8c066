"""Sweeps whose points are quick stand-ins for ``ttt``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ttt_jax import cli
from ttt_jax.sweep import runner

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
PROGRAM = (sys.executable, "-S", str(HERE / "stand_in.py"))


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """``sweep(*arguments, **{point: actions})``: the exit status of ``ttt sweep --workdir tmp_path/sweep``."""

    def run(*arguments, do=None):
        with monkeypatch.context() as patch:
            patch.setattr(runner, "PROGRAM", PROGRAM)
            patch.setenv("STAND_IN", json.dumps(do or {}))
            own, _, launcher = " ".join(map(str, arguments)).partition(" -- ")
            line = ["sweep", "--config", QUICKSTART, "--workdir", str(tmp_path / "sweep"), *own.split()]
            return cli.main([*line, "--", *launcher.split()] if launcher else line)

    return run


@pytest.fixture
def start_sweep(tmp_path):
    """``start_sweep(*arguments, do=actions)``: the same in a process of its own."""
    program = f"from ttt_jax import cli; from ttt_jax.sweep import runner; runner.PROGRAM = {PROGRAM!r}; "
    program += "exit(cli.main())"
    started = []

    def start(*arguments, do=None, environment=None):
        line = [sys.executable, "-c", program, "sweep", "--config", QUICKSTART, "--workdir", str(tmp_path / "sweep")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "STAND_IN": json.dumps(do or {}), **(environment or {})}
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(
                [*line, *arguments],
                env=environment,
                cwd=ROOT,
                stdout=pipe,
                stderr=pipe,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def calls(tmp_path):
    """``calls(point)``: how it was started, each time."""

    def read(point):
        path = tmp_path / "sweep" / point / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return read


@pytest.fixture
def wait_for():
    """``wait_for(condition)``: returns once it holds."""

    def wait(condition, seconds=20):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never came about"
            time.sleep(0.02)

    return wait
