"""Run the benchmarks for GPUs on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_gpu.py"


def run(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[1])


@pytest.mark.slow
def test_tiny_measurements_run_on_a_cpu(tmp_path):
    output = tmp_path / "found.json"
    done = run("--tiny", "--output", output, "--only", "inner")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    (one,) = found["measurements"]
    assert one["tokens_per_second"] == pytest.approx(64 / one["seconds"])
    assert "| inner linear 1 scan,1,1 |" in done.stdout
    assert found["not_measured"] == []


@pytest.mark.slow
def test_a_time_limit_and_failures_are_reported(tmp_path):
    output = tmp_path / "found.json"
    done = run("--tiny", "--output", output, "--limit", 0)
    assert json.loads(output.read_text())["not_measured"] == ["inner linear 1 scan,1,1", "step ttt_linear smoke 2k"]
    assert "not measured, for lack of time: inner linear 1 scan,1,1" in done.stdout
    done = run("--one", "inner", "linear", "1", "nonsense")
    assert "path=nonsense: expected one of official, scan, pallas" in done.stderr
    done = run("--output", output)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("bench_gpu: the device of this machine is a cpu; expected a GPU, or --tiny")
