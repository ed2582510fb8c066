"""Test what is special about Slurm, GKE and SkyPilot: their options, logs and states, and a real run on Slurm."""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml
from stand_ins import OPTIONS, ROOT

from ttt_jax.launch import sky as sky_lib
from ttt_jax.launch import slurm as slurm_lib
from ttt_jax.launch import sources
from ttt_jax.launch.commands import Commands
from ttt_jax.launch.job import Job
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, REFUSED, RESTART
from ttt_jax.training import metrics

TINY = """model.width=16 model.num_layers=1 model.num_heads=2 model.mlp_width=16 model.vocab_size=258 data.batch_size=2
    data.sequence_length=32 mesh.data=2 training.duration=1000000steps checkpoint.every=1000000steps log.every=1step"""


# ---- Slurm


def test_slurm_gets_all_options(slurm):
    workdir = slurm.folder / "100% mine" / "a'b"
    options = "--nodes 2 --partition gpu --time 8:00:00 --cpus-per-task 7 --sbatch=--exclusive".split()
    out, _ = slurm.launch(*options, "--restarts", "3", workdir=workdir)
    (sbatch,) = slurm.calls("sbatch")
    prefix = str(workdir / "slurm" / "mine")
    assert sbatch[3].startswith("--comment=ttt_jax:")
    assert sbatch[:3] + sbatch[4:] == [
        *("sbatch", "--parsable", "--job-name=mine", f"--output={prefix.replace('%', '%%')}-%j.log"),
        *("--ntasks-per-node=2", "--nodes=2", "--gpus-per-node=2"),
        *("--partition=gpu", "--time=8:00:00", "--cpus-per-task=7", "--exclusive"),
        *(str(ROOT / "launch/slurm.sbatch"), prefix, "3", "", slurm.executable, "-m", "ttt_jax", "train"),
        *("--config", str(ROOT / "configs/quickstart.py"), "--workdir", str(workdir), "--config.data.batch_size=8"),
    ]
    assert out.count(": 0\n") == 4
    submitted = slurm.kept("jobs")["101"]["options"]
    # The warning goes to the steps; with B: only the shell would hear it.
    assert {"requeue": "", "open-mode": "append", "signal": "TERM@120"}.items() <= submitted.items()


def test_slurm_sources_a_setup_file(slurm):
    setup = slurm.folder / "my setup"
    setup.write_text("SECRET=of-the-setup\nexport SECRET\n")
    slurm.launch("--setup", setup)
    assert [each["environment"]["SECRET"] for each in slurm.started()] == ["of-the-setup"] * 2
    setup.write_text("module load nothing\n")
    out, _ = slurm.launch("--setup", setup, ends=REFUSED)
    assert "module: command not found" in out
    assert len(slurm.started()) == 2


@pytest.mark.parametrize(
    ("past", "code", "expected"),
    [
        ("FAILED", 2, REFUSED),
        ("FAILED", 127, FAILED),
        ("TIMEOUT", 0, RESTART),
        ("CANCELLED by 1000", 0, INTERRUPTED),
        ("OUT_OF_MEMORY", 0, FAILED),
        ("NODE_FAIL", 1, RESTART),
    ],
)
def test_slurm_accounting_knows_how_a_job_ended(stand_ins, monkeypatch, past, code, expected):
    cluster = stand_ins("slurm")
    cluster.kept("jobs", **{"7": {"state": "FORGOTTEN", "past": past, "code": code}})
    for name in ("PATH", "STAND_IN"):
        monkeypatch.setenv(name, cluster.environment[name])
    assert slurm_lib.Slurm(argparse.Namespace(), Job("a", (), ROOT), Commands()).state("7").status == expected


def test_slurm_training_is_saved_before_the_time_limit_goes_on_and_is_saved_by_ctrl_c(slurm):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    slurm.environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    slurm.executable, slurm.patience = sys.executable, 240
    run = slurm.folder / "run"
    values = [f"--config.{value}".replace("step", " step") for value in TINY.split()]
    command = ["train", "--config", ROOT / "configs/quickstart.py", "--workdir", "run", *values]

    def log(pattern):
        text = "".join(path.read_text() for path in (run / "slurm").glob("*.log"))
        return re.findall(pattern, text, re.DOTALL)

    def goes_on():
        going_on = log("continuing at step ([0-9]+)")
        return going_on and recorded_after(int(going_on[0]))

    def recorded_after(step):
        return any(record["step"] > step for record in metrics.read(run))

    def limit():
        for process in slurm.kept("jobs")["101"]["processes"]:
            os.kill(process, signal.SIGTERM)

    with slurm.meanwhile((lambda: recorded_after(0), limit), (goes_on, signal.SIGINT)):
        status, _, err = slurm.ttt("launch", "slurm", "--gpus-per-node=2", "--", *command, cwd=slurm.folder)
    assert status == INTERRUPTED, err
    first, second = map(int, log("saved at step ([0-9]+) of"))
    assert 0 < first < second
    assert log("continuing at step ([0-9]+)") == [str(first)]
    assert (run / "checkpoints" / str(second)).is_dir()
    assert log("on 2 x cpu of 2 processes")


# ---- GKE


def test_gke_gets_all_options(gke):
    where = ("--project", "p", "--zone", "us-west4-a")
    out, err = gke.launch("--slices", "2", *where, "--spot", "--priority", "high", "--restarts", "3")
    (create,) = gke.calls("create")
    assert create[:-2] == [
        *("xpk", "workload", "create", "--workload=mine", "--cluster=c", "--zone=us-west4-a", "--project=p"),
        *("--tpu-type=v5litepod-8", "--num-slices=2", "--docker-image=us-docker.pkg.dev/p/r/ttt_jax:1"),
        *("--max-restarts=3", "--restart-on-exit-codes=75", "--termination-grace-period-seconds=120"),
        *("--spot", "--priority=high"),
    ]
    assert not Path(create[-2].removeprefix("--env-file=")).exists()
    assert (out.count("of host 0: 0"), "host 1" in out) == (1, False)
    assert "Completed" in err


def test_gke_starts_a_workload_anew_that_has_ended(gke):
    gke.plan(1)
    gke.launch(ends=FAILED)
    gke.plan(0)
    gke.launch()
    assert [call[2] for call in gke.calls("xpk")] == ["list", "create", "list", "delete", "create"]


def test_gke_takes_up_a_log_that_breaks_off_and_leaves_one_without_an_end(gke):
    gke.plan("wait")
    gke.has("break-log", "endless-log")
    taken_up = (lambda: "--since=" in str(gke.calls("logs")), lambda: gke.has("finish"))
    out, _ = gke.launch(meanwhile=[taken_up])
    assert (out.count("start 0"), out.count("finished")) == (1, 1)


def test_gke_builds_an_image_of_the_source_tree_with_the_versions_of_this_machine(gke):
    machines = (*OPTIONS["gke"][:4], "--build", "us-docker.pkg.dev/p/r/ttt_jax")
    gke.launch(machines=machines, command=["--config.log.wandb_project=x"])
    build, push = gke.calls("docker")
    image, context = push[2], build[-1]
    assert push == ["docker", "push", image]
    assert image.startswith("us-docker.pkg.dev/p/r/ttt_jax:tpu-")
    assert build == [
        *("docker", "build", f"--file={context}/launch/Dockerfile", "--target=tpu", "--platform=linux/amd64"),
        *(f"--build-arg=PYTHON={sources.PYTHON}", "--build-arg=EXTRAS=gcs,wandb", f"--tag={image}", context),
    ]
    assert f"--docker-image={image}" in gke.calls("create")[0]
    assert (gke.folder / "constraints").read_text() == sources.constraints(("tpu", "gcs", "wandb"))
    files = set((gke.folder / "context-files").read_text().splitlines())
    assert {"launch/Dockerfile", "setup.py", "configs/quickstart.py"} <= files
    assert not Path(context).exists()


# ---- SkyPilot


def test_sky_gets_all_options_and_installs_the_versions_of_this_machine(sky):
    sky.launch("--spot", "--infra", "gcp/us-west4", "--disk-size", "200", "--env", "SECRET=s")
    ((*launch, file),) = sky.calls("launch")
    name = Path(file).stem
    assert launch == ["sky", "jobs", "launch", f"--name={name}", "--yes", "--detach-run", "--secret=SECRET"]
    task = yaml.safe_load(Path(file).read_text())
    assert task["resources"] == {
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 134, 143]},
        "infra": "gcp/us-west4",
        "disk_size": 200,
        "accelerators": "tpu-v5litepod-8",
        "use_spot": True,
        "accelerator_args": {"runtime_version": "v2-alpha-tpuv5-lite"},
    }
    assert (task["name"], task["num_nodes"]) == (name, 1)
    source = sky.folder / "home/ttt-launch/source"
    (started,) = sky.started()
    assert started["cwd"] == str(source)
    assert (source / "launch/install.sh").read_text() == (ROOT / "launch/install.sh").read_text()
    venv, install = sky.uv()
    assert venv == ["venv", "--quiet", "--allow-existing", "--python", sources.PYTHON, f"{source.parent}/venv"]
    assert install[-2:] == ["--editable", f"{source}[tpu,gcs]"]
    assert (sky.folder / "constraints").read_text() == sources.constraints(("tpu", "gcs"))


def test_sky_nodes_with_gpus_find_each_other(sky):
    sky.launch("--nodes", "2", machines=("--accelerator", "H100:8"))
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    found = sorted([each["environment"][name] for name in names] for each in sky.started())
    assert found == [["10.0.0.1:8476", "2", "0"], ["10.0.0.1:8476", "2", "1"]]
    resources = sky.kept("jobs")["1"]["task"]["resources"]
    assert resources["accelerators"] == "H100:8"
    assert "accelerator_args" not in resources
    assert sky.uv()[1][-1].endswith("[cuda,gcs]")


def test_sky_takes_machines_without_accelerators(sky):
    out, _ = sky.launch("--dry-run", machines=("--cpus", "32+"))
    resources = yaml.safe_load(out.partition("<<'END'\n")[2].partition("\nEND\n")[0])["resources"]
    assert (resources["cpus"], "accelerators" in resources) == ("32+", False)


@pytest.mark.parametrize(
    ("how", "said"), [pytest.param("quick", "of host 0: 1", marks=pytest.mark.slow), ("no-packages", "FAILED_SETUP")]
)
def test_sky_shows_how_a_job_has_failed(sky, how, said):
    sky.has(how)
    sky.plan(1)
    out, err = sky.launch(ends=FAILED)
    assert (out + err).count(said) == 1


def test_sky_without_any_job(sky):
    sky.has("never")
    assert sky.act("--status")[:2] == (DONE, "mine: no such job waits or runs\n")


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("FAILED", "Job exited with exit codes [0, 2, 137, 1] (user program failure). See 2", FAILED),
        ("FAILED", "Job exited with exit codes [75, 137, 2]", REFUSED),
        ("FAILED", "Job exited with exit codes [75, 130]", INTERRUPTED),
        ("FAILED", "Job exited with exit codes [137, 75]", RESTART),
        ("FAILED", "Job exited with exit code 127", 127),
        ("FAILED", "Job failed (FAILED). To see the details, run: sky jobs logs --controller 75", FAILED),
        ("FAILED_PRECHECKS", "no such accelerator", REFUSED),
        ("FAILED_NO_RESOURCE", "", RESTART),
        ("CANCELLED", "", INTERRUPTED),
        ("RECOVERING", "", None),
    ],
)
def test_sky_statuses(state, reason, expected):
    assert sky_lib._status(state, reason) == expected
