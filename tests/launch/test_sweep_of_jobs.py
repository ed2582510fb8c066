"""A sweep whose points are jobs of Slurm, and train; only Slurm is a stand-in."""

import json
import re
import subprocess
import sys

import pytest
from stand_ins import ROOT, StandIns

from ttt_jax.training import metrics


@pytest.mark.slow
def test_points_are_jobs_that_are_found_done_again(tmp_path):
    cluster = StandIns(tmp_path, "stand_in_slurm.py", "sbatch slurmd squeue scontrol sacct scancel srun".split())
    environment = cluster.environment | {"JAX_PLATFORMS": "cpu"}
    recipe = str(ROOT / "configs/paper.py") + ":transformer-125m-pile-2k:smoke"
    sweep = ["--config", recipe, "--grid", "seed=0,1", "--config.training.duration=4 steps", "--workdir", "sweep"]
    command = [sys.executable, "-m", "ttt_jax", "sweep", *sweep, "--", "launch", "slurm", "--gpus-per-node", "1"]

    def run(command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(command) == "sweep: 2 points: 2 done\n"
    jobs = sorted(re.search("--job-name=(ttt-seed-[01])-", " ".join(call))[1] for call in cluster.calls("sbatch"))
    assert jobs == ["ttt-seed-0", "ttt-seed-1"]
    losses = [[record["loss"] for record in metrics.read(tmp_path / "sweep" / f"seed={seed}")] for seed in (0, 1)]
    assert [len(each) for each in losses] == [4, 4]
    assert losses[0] != losses[1]
    ranked = json.loads(run([*command[:4], "results", "sweep", "--json"]))
    by_loss = sorted((last, f"seed={seed}") for seed, (*_, last) in enumerate(losses))
    assert [(point["loss"], point["point"]) for point in ranked] == by_loss
    run(command)
    assert len(cluster.calls("sbatch")) == 2  # nothing was left to do
