"""Test a real run that Slurm starts, warns, starts again and ends; only Slurm is a stand-in."""

import os
import re
import signal
import subprocess
import sys

import pytest
from stand_ins import ROOT

from ttt_jax.terminal.stopping import INTERRUPTED
from ttt_jax.training import metrics

TINY = """model.width=16 model.num_layers=1 model.num_heads=2 model.mlp_width=16 model.vocab_size=258 data.batch_size=2
    data.sequence_length=32 mesh.data=2 training.duration=1000000steps checkpoint.every=1000000steps log.every=1step"""


@pytest.mark.slow
def test_training_is_saved_before_the_time_limit_goes_on_and_is_saved_by_ctrl_c(stand_ins):
    cluster = stand_ins("slurm")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    cluster.environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    cluster.executable, cluster.patience = sys.executable, 240
    run = cluster.folder / "run"
    values = [f"--config.{value}".replace("step", " step") for value in TINY.split()]
    command = ["train", "--config", ROOT / "configs/quickstart.py", "--workdir", "run", *values]

    def log(pattern):
        text = "".join(path.read_text() for path in (run / "slurm").glob("*.log"))
        return re.findall(pattern, text, re.DOTALL)

    def goes_on():
        going_on = log("going on at step ([0-9]+)")
        return going_on and recorded_after(int(going_on[0]))

    def recorded_after(step):
        return any(record["step"] > step for record in metrics.read(run))

    def limit():
        subprocess.run([cluster.folder / "bin" / "limit", "101"], env=cluster.environment, check=True)

    with cluster.meanwhile((lambda: recorded_after(0), limit), (goes_on, signal.SIGINT)):
        status, _, err = cluster.ttt("launch", "slurm", "--gpus-per-node=2", "--", *command, cwd=cluster.folder)
    assert status == INTERRUPTED, err
    first, second = map(int, log("saved at step ([0-9]+) of"))
    assert 0 < first < second
    assert log("going on at step ([0-9]+)") == [str(first)]
    assert (run / "checkpoints" / str(second)).is_dir()
    assert log("on 2 x cpu of 2 processes")
