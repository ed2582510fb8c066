"""Run scripts/kill_test.py: kills at random moments leave the result unchanged."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_kills_leave_no_trace(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # With this seed, both processes get both signals: one while it starts, the others after some steps.
    moments = ["--kills", "4", "--steps", "60", "--seed", "386"]
    command = [sys.executable, ROOT / "scripts/kill_test.py", *moments, "--ttt", ROOT / "tests/ttt_process.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = [f"{signal} to process {process}" for signal in ("SIGKILL", "SIGTERM") for process in (0, 1)]
    assert [done.stdout.count(kill) for kill in expected] == [1, 1, 1, 1]
    assert done.stdout.endswith("4 kills of 2 processes: the same bits as an undisturbed run\n")
