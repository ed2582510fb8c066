"""Provide a sweep whose points are quick stand-ins for ``ttt``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ttt_jax import cli
from ttt_jax.sweep import runner, status

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-S", str(Path(__file__).with_name("stand_in.py")))
CODE = f"from ttt_jax import cli; from ttt_jax.sweep import runner; runner.PROGRAM = {PROGRAM!r}; exit(cli.main())"


class StandInSweep:
    """A sweep of the quick start; ``do`` are the actions of each point, by name, at its starts."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self._line = ["sweep", "--config", str(ROOT / "configs/quickstart.py"), "--workdir", str(folder)]

    def run(self, arguments, do=None):
        """Run ``ttt sweep`` and return its exit status."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "PROGRAM", PROGRAM)
            patch.setenv("STAND_IN", json.dumps(do or {}))
            return cli.main([*self._line, *arguments.split()])

    def start(self, arguments, do=None, **environment):
        """Start ``ttt sweep`` and return its process."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "STAND_IN": json.dumps(do or {}), **environment}
        line = [sys.executable, "-c", CODE, *self._line, *arguments.split()]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        self.processes.append(subprocess.Popen(line, env=environment, cwd=ROOT, **options))
        return self.processes[-1]

    def start_hanging(self, seeds, arguments="", action="hang", **environment):
        """Start a sweep of seeds whose points hang, and return its process once they do."""
        do = {f"seed={seed}": [action] for seed in range(seeds)}
        process = self.start(f"--grid seed={','.join(map(str, range(seeds)))} {arguments}", do, **environment)
        self.wait_for(lambda: all((self.folder / point / "ready").exists() for point in do))
        return process

    def wait_for(self, condition, seconds=20):
        """Return once a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.02)

    def calls(self, point):
        """Return the arguments, process and GPUs of each start of a point."""
        path = self.folder / point / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def starts(self, seeds):
        """Return how often the point of each seed was started."""
        return [len(self.calls(f"seed={seed}")) for seed in range(seeds)]

    def states(self):
        """Return the states of the points, in order."""
        return [each.state for each in status.of_sweep(self.folder)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sweep"


@pytest.fixture
def sweep(folder):
    made = StandInSweep(folder)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()
