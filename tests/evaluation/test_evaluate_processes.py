"""Run ``ttt eval`` in real processes: on meshes of several devices and processes, and killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ttt_jax import cli
from ttt_jax import config as config_lib

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"width": 32, "num_layers": 1, "num_heads": 2, "mlp_width": 48, "vocab_size": 264}


def start(*arguments, devices=1):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, ROOT / "tests/ttt_process.py", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(*processes):
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def run(request, tmp_path_factory, save_run):
    """Return a workdir, and its evaluation on one device."""
    workdir, config = tmp_path_factory.mktemp(request.param) / "run", config_lib.default()
    config.model.update(mixer=request.param, **SMALL)
    config.data.update(sequence_length=64, batch_size=2)
    save_run(workdir, config)
    return workdir, evaluated(workdir)


def options(workdir):
    return ["eval", "--workdir", workdir, "--by-document", "--context", 150, "--max-windows", 7, "--batch-size", 2]


def result(workdir):
    stem = workdir / "eval" / "validation-documents-150"
    with np.load(stem.with_suffix(".npz"), allow_pickle=False) as file:
        return dict(file), json.loads(stem.with_suffix(".json").read_text())


def evaluated(workdir):
    assert cli.main(list(map(str, options(workdir)))) == 0
    return result(workdir)


def check_same(found, expected):
    assert expected[0]["count"].sum() == expected[1]["tokens"] > 700
    for name, array in expected[0].items():
        np.testing.assert_allclose(found[0][name], array, rtol=2e-5, atol=1e-6, err_msg=name)
    assert found[1]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-6)


@pytest.mark.parametrize("run", ["ttt_mlp", "attention"], indirect=True)
def test_meshes_give_the_numbers_of_one_device(run):
    """Evaluate seven documents, which the rows of the mesh do not divide."""
    workdir, expected = run
    finish(start(*options(workdir), "--fsdp", 2, "--tensor", 2, devices=8))
    check_same(result(workdir), expected)


@pytest.mark.parametrize("run", ["ttt_mlp"], indirect=True)
def test_processes_give_the_numbers_of_one_device(run):
    workdir, expected = run
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    several = ["--tensor", 2, "--coordinator", f"localhost:{port}", "--processes", 2, "--process"]
    both = [start(*options(workdir), *several, process, devices=4) for process in (1, 0)]
    said = finish(*both)
    check_same(result(workdir), expected)
    assert "7 documents of up to 150 tokens" in said


@pytest.mark.parametrize("run", ["ttt_mlp"], indirect=True)
def test_a_killed_evaluation_resumes(run):
    workdir, expected = run
    many = [*options(workdir)[:-4], "--max-windows", 40, "--batch-size", 1, "--context", 1500]
    stem = "validation-documents-1500"
    process = start(*many)
    parts = workdir / "eval" / f".{stem}.unfinished"
    deadline = time.monotonic() + 240
    while not list(parts.glob("*.npy")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "eval" / f"{stem}.json").exists()
    there = {path.name for path in parts.glob("*.npy")}
    assert cli.main(list(map(str, many))) == 0
    assert there
    assert not parts.exists()
    whole = json.loads((workdir / "eval" / f"{stem}.json").read_text())
    assert whole["documents"] == 40
    check_same(evaluated(workdir), expected)  # another evaluation of the same run is as it was
