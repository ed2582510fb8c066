"""Check ``ttt launch`` as a person types it: help, and what is refused before any other program is started."""

import subprocess
import sys
from pathlib import Path

import pytest

from ttt_jax import cli
from ttt_jax.launch.commands import Commands

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")
TRAIN = ["train", "--config", CONFIG, "--workdir", "gs://bucket/runs/a"]
TPU = ["tpu", "--accelerator", "v5litepod-4", "--zone", "z"]


def ttt(*arguments) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as end:  # argparse
        return end.code


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch):
    def start(*arguments, **options):
        raise AssertionError("a command was started")

    monkeypatch.setattr(Commands, "follow", start)


def test_help(capsys):
    assert ttt("launch", "--help") == 0
    assert "ttt launch tpu --accelerator v5litepod-256" in capsys.readouterr().out
    assert ttt("launch", "tpu", "--help") == 0
    printed = capsys.readouterr().out
    for option in "--accelerator --zone --spot --slices --keep --timeout --name --env --restarts --stop".split():
        assert f"  {option}" in printed


def test_help_does_not_load_jax():
    program = "import sys; from ttt_jax import cli; cli.parse(['launch', 'tpu']); print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpu"], "--accelerator, a command: missing; expected an accelerator type, such as v5litepod-16; one"),
        (["gke"], "--cluster, --tpu-type, --image, a command: missing; expected the name of a cluster"),
        (["gke", "--stop"], "--name: missing; expected the name of a job"),
        (["sky"], "--accelerator, a command: missing; expected one, such as tpu-v5litepod-8 or H100:8, or --cpus"),
        (["slurm"], "--gpus-per-node, a command: missing; expected how many GPUs each node has; one after --"),
        (["tpu", "--", *TRAIN], "--accelerator: missing; expected an accelerator type"),
        (["tpu", "--accelerator", "v5e-4", "--", *TRAIN], "--accelerator v5e-4: expected an accelerator type"),
        ([*TPU, "--", *TRAIN, "--config.mesh.tensor=3"], "does not fit 4 devices"),
        ([*TPU, "--", *TRAIN, "--config.data.batch_size=6"], "not divisible by the 4 devices"),
        ([*TPU, "--", *TRAIN, "--config.data.source=data/books"], "data.source='data/books': is on this machine only"),
        ([*TPU, "--", *TRAIN, "--config.training.start_from=runs/b"], "start_from='runs/b': is on this machine"),
        ([*TPU, "--", *TRAIN, "--config.data.tokenizer=/etc/passwd"], "is on this machine only; expected"),
        ([*TPU, "--", *"tokenize --tokenizer byte --train gs://b/t.txt --output data/a".split()], "data/a: the mach"),
        ([*TPU, "--", *TRAIN, "--config.log.tensorboard=true"], "log.tensorboard=true: needs a local workdir"),
        ([*TPU, "--", *TRAIN[:3], "--workdir", "runs/a"], "runs/a: the machines are deleted in the end"),
        ([*TPU, "--slices", "2", "--keep", "--", *TRAIN[:3], "--workdir", "runs/a"], "its hosts share no disk"),
        ([*TPU, "--slices", "2", "--", *TRAIN, "--config.mesh.data=1", "--config.mesh.fsdp=8",
          "--config.data.batch_size=8"], "mesh.data=1: expected a multiple of --slices 2"),
        (["tpu", "--accelerator", "v4-32", "--", "eval", "--workdir", "gs://b/a"], "ttt eval: runs on one host"),
        ([*TPU, "--stop"], "--name: missing"),
    ],
)  # fmt: skip
def test_refusals(capsys, arguments, message):
    assert ttt("launch", *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("ttt launch: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moon", "--", *TRAIN], "'moon'"),
        ([*TPU, "--", "trian"], "'trian'"),
        ([*TPU, "--", "train", "--config", CONFIG], "--workdir"),
        ([*TPU, "--slices", "0", "--", *TRAIN], "'0': expected 1 or more"),
        ([*TPU, "--timeout", "soon", "--", *TRAIN], "expected a time such as 90m"),
        ([*TPU, "--spot", "--reserved", "--", *TRAIN], "not allowed with"),
        ([*TPU, "--status", "--stop", "--name", "a"], "not allowed with"),
        ([*TPU, "extra", "--", *TRAIN], "extra"),
    ],
)
def test_usage(capsys, arguments, message):
    assert ttt("launch", *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_other_verbs_take_no_command(capsys):
    assert ttt("eval", "--workdir", "x", "--", "train") == 2
    assert capsys.readouterr().err.endswith("ttt eval: error: unexpected argument: --\n")
