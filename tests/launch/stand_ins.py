"""Programs that stand for those of others, first on PATH, and a ttt launch in a process of its own."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from ttt_jax import cli

ROOT = Path(__file__).resolve().parents[2]
# The waits of a target are for real clusters; TTT_TEST_SET sets them: {"slurm._POLL": 0.05}.
_TTT = """
import importlib, json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, also when a test runs in the background
for name, value in json.loads(os.environ.pop("TTT_TEST_SET")).items():
    module, _, attribute = name.rpartition(".")
    target = sys if module == "sys" else importlib.import_module(f"ttt_jax.launch.{module}")
    assert hasattr(target, attribute)
    setattr(target, attribute, value)
from ttt_jax import cli
sys.exit(cli.main())
"""


class StandIns:
    """Programs in a folder, all with the same source, which goes by its name.

    Attributes:
      folder: where they keep what they know; ``$STAND_IN`` of theirs.
      environment: with the programs first on PATH.
    """

    def __init__(self, folder: Path, source: str, names: list[str]):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        text = (Path(__file__).parent / source).read_text()
        for name in names:
            program = folder / "bin" / name
            program.write_text(f"#!{sys.executable} -IS\n{text}")  # -IS: they start in 20 ms
            program.chmod(0o755)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "STAND_IN": str(folder), "PYTHONPATH": str(ROOT)}

    def calls(self, *names: str) -> list[list[str]]:
        """What was called so far, in order; only of these programs where some are named."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if not names or call[0] in names]

    def plan(self, *words) -> None:
        """What the command that is launched does, a word for each start."""
        (self.folder / "plan").write_text(json.dumps(words))

    def started(self) -> list:
        """What each process of the command has told of itself."""
        path = self.folder / "started"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_until(self, ready) -> None:
        """Returns once ``ready()`` is true; at most 20 seconds."""
        deadline = time.monotonic() + 20
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def fail(self, name: str, *faults: tuple[str, str]) -> None:
        """The next calls of a program fail: ("before" or "after" it has done its work, what it says)."""
        (self.folder / f"fail-{name}").write_text(json.dumps(faults))

    def start(self, *arguments: str, cwd: Path = ROOT, set=None) -> subprocess.Popen:
        """``ttt ARGUMENTS`` in a process of its own; ``set``: waits of the targets."""
        return subprocess.Popen(
            [sys.executable, "-c", _TTT, *map(str, arguments)],
            cwd=cwd,
            env={**self.environment, "TTT_TEST_SET": json.dumps(set or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ttt(self, *arguments: str, cwd: Path = ROOT, set=None) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of ``ttt ARGUMENTS``, in this process, which is quicker."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.chdir(cwd))
            stack.enter_context(mock.patch.dict(os.environ, self.environment))
            for name, value in (set or {}).items():
                stack.enter_context(mock.patch(name if name == "sys.executable" else f"ttt_jax.launch.{name}", value))
            out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            try:
                status = cli.main([str(argument) for argument in arguments])
            except SystemExit as end:  # argparse
                status = end.code
        return status, out.getvalue(), err.getvalue()
