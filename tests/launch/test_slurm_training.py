"""A real run of two processes that Slurm starts, warns, starts again and ends; only Slurm is a stand-in."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from stand_ins import ROOT, StandIns

from ttt_jax.terminal.stopping import INTERRUPTED
from ttt_jax.training import metrics

TINY = {
    "model.width": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.mlp_width": 16,
    "model.vocab_size": 258,
    "data.sequence_length": 32,
    "data.batch_size": 2,
    "mesh.data": 2,
    "training.duration": "1000000 steps",
    "checkpoint.every": "1000000 steps",
    "log.every": "1 step",
}


@pytest.fixture(autouse=True)
def no_jobs_left(tmp_path):
    """End the jobs that a failed test leaves behind."""
    yield
    for job in (json.loads(path.read_text()) for path in (tmp_path / "jobs").glob("*.json")):
        if job["state"] == "RUNNING":
            os.killpg(job["batch"], signal.SIGKILL)


@pytest.mark.slow
def test_training_is_saved_before_the_time_limit_goes_on_and_is_saved_by_ctrl_c(tmp_path):
    cluster = StandIns(tmp_path, "stand_in_slurm.py", "sbatch slurmd squeue scontrol sacct scancel srun limit".split())
    cluster.environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    values = [f"--config.{key}={value}" for key, value in TINY.items()]
    command = ["train", "--config", ROOT / "configs/quickstart.py", "--workdir", "run", *values]
    launch = cluster.start(
        "launch", "slurm", "--gpus-per-node", "2", "--", *command, cwd=tmp_path, set={"slurm._POLL": 0.2}
    )

    def until(ready):
        """What ``ready()`` returns, once that is true."""
        deadline = time.monotonic() + 240
        while not (found := ready()):
            assert launch.poll() is None, launch.communicate()
            assert time.monotonic() < deadline, text()
            time.sleep(0.05)
        return found

    def text():
        return "".join(path.read_text() for path in (tmp_path / "run" / "slurm").glob("*.log"))

    def log(pattern):
        return re.findall(pattern, text(), re.DOTALL)

    def recorded_after(step):
        return any(record["step"] > step for record in metrics.read(tmp_path / "run"))

    until(lambda: recorded_after(0))
    subprocess.run([tmp_path / "bin" / "limit", "101"], env=cluster.environment, check=True)
    (going_on,) = map(int, until(lambda: log("going on at step ([0-9]+)")))
    until(lambda: recorded_after(going_on))
    launch.send_signal(signal.SIGINT)
    _, err = launch.communicate(timeout=240)
    assert launch.returncode == INTERRUPTED, err
    (first, second) = map(int, log("saved at step ([0-9]+) of"))
    assert 0 < first < second
    assert going_on == first
    assert (tmp_path / "run" / "checkpoints" / str(second)).is_dir()
    assert log("on 2 x cpu of 2 processes")
