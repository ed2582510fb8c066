"""Check help and refusals of ``ttt plan``, for which no slow library is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG = f"--config {CONFIGS / 'paper.py'}:ttt_linear-125m-pile-2k"
REFUSED = {
    "plan --topology v5e:4x4": "--config: missing; expected a config file",
    f"plan {CONFIG}": "the following arguments are required: --topology",
    f"plan {CONFIG} --topology v5e:5x5": "--topology v5e:5x5: expected v5e:AxB or v6e:AxB with AxB one of 1x1, 2x2,",
    f"plan {CONFIG} --topology v5e:4x4 --slices 0": "argument --slices: '0': expected 1 or more",
    f"plan {CONFIG} --topology v5e:4x4 --most 0": "argument --most: '0': expected 1 or more",
    f"plan {CONFIG} --topology v5e:4x4 --price -1": "--price -1.0: expected USD per chip-hour",
    f"plan {CONFIG[:-2]}3k --topology v5e:4x4": "; 125m, 350m, 760m, 1.3b; pile, books; 1k, 2k, 4k, 8k, 16k, 32k",
    f"plan {CONFIG} --topology v5e:4x4 --config.model.num_heads=7": "model.num_heads=7: does not divide",
}


@pytest.fixture(scope="module")
def printed(in_one_process):
    return in_one_process(["plan --help", *REFUSED], unwanted=("orbax", "grain", "tensorstore"))


def test_help_names_every_option(printed):
    status, out, _ = printed["plan --help"]
    assert status == 0
    for text in ("--topology TOPOLOGY", "--slices N", "--price USD", "--search", "--most N", "--json", "v5p:4x4x4"):
        assert text in out
    assert "--config.mesh.fsdp=1" in out
    assert "Exit status 1 means that the run does not fit." in out


@pytest.mark.parametrize("command", REFUSED)
def test_wrong_arguments_are_refused_in_one_line(printed, command):
    status, out, err = printed[command]
    assert (status, out) == (2, "")
    assert REFUSED[command] in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_mesh_that_does_not_fit_is_refused():
    """Check 16 devices, of which 5 would share parameters, before anything is compiled."""
    command = [sys.executable, "-m", "ttt_jax", "plan", *CONFIG.split(), "--config.mesh.fsdp=5", "--topology", "cpu:16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "ttt plan: mesh.data=-1, mesh.fsdp=5, mesh.tensor=1: does not fit 16 devices; "
        "expected sizes whose product is 16\n"
    )
