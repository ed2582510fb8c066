"""The failure test: kills at random moments, as a person would run it."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "kill_test.py"


@pytest.mark.slow
def test_ten_kills_leave_no_trace(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SIGKILL to process") + done.stdout.count("SIGTERM to process") == 10
    assert done.stdout.endswith("10 kills of 2 processes: the same bits as an undisturbed run\n")
