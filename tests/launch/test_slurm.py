"""``ttt launch slurm``, with a small Slurm that runs the batch script for real; what that runs is a stand-in too."""

import json
import signal
import subprocess
import sys

import pytest
from stand_ins import ROOT, StandIns

from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, REFUSED, RESTART

NASTY = 'it\'s "$(touch pwned)" `id`; \\ $HOME *\nsecond line é'
WAITS = {"slurm._POLL": 0.05, "commands.FIRST_WAIT": 0.05}

# In the place of Python with ttt_jax: tells what it got, and does what $STAND_IN/plan says, a list with a word for each
# start: a status to end with, or "wait" for SIGTERM, and 75 then.
COMMAND = """
import json, os, signal, sys, time
here = os.environ["STAND_IN"]
term = []
signal.signal(signal.SIGTERM, lambda *_: term.append(1))
with open(f"{here}/started", "a") as started:
    started.write(json.dumps([sys.argv[1:], os.environ.get("SLURM_PROCID"), os.environ.get("SECRET")]) + "\\n")
plan = json.load(open(f"{here}/plan"))[int(os.environ.get("SLURM_RESTART_COUNT", 0))]
print("started with", plan, flush=True)
deadline = time.monotonic() + 20
while plan == "wait" and not term and time.monotonic() < deadline:
    time.sleep(0.01)
if term:
    print("saved", flush=True)
sys.exit(75 if plan == "wait" else plan)
"""

pytestmark = pytest.mark.slow


class Cluster(StandIns):
    def __init__(self, folder):
        super().__init__(folder, "stand_in_slurm.py", "sbatch slurmd squeue scontrol sacct scancel srun limit".split())
        (folder / "python").write_text(f"#!{sys.executable} -IS\n{COMMAND}")
        (folder / "python").chmod(0o755)
        self.waits = {**WAITS, "sys.executable": str(folder / "python")}
        self.plan(0)

    def launch(self, *options, workdir="runs/a", command=(), wait=True):
        """``ttt launch slurm`` of a job of two processes."""
        start = self.ttt if wait else self.start
        command = ("train", "--config", ROOT / "configs/quickstart.py", "--workdir", workdir, *command)
        options = ("--gpus-per-node", "2", *options)
        return start("launch", "slurm", *options, "--", *command, cwd=self.folder, set=self.waits)

    def job(self, number="101"):
        return json.loads((self.folder / "jobs" / f"{number}.json").read_text())

    def reach_time_limit(self):
        subprocess.run([self.folder / "bin" / "limit", "101"], env=self.environment, check=True)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path / "cluster")


def test_a_job_is_submitted_followed_and_its_arguments_arrive_as_they_are(cluster):
    workdir = cluster.folder / "100% mine" / "a'b"
    status, out, err = cluster.launch(
        *("--nodes", "2", "--partition", "gpu", "--time", "8:00:00", "--cpus-per-task", "7", "--sbatch=--exclusive"),
        *("--restarts", "3", "--env", "SECRET=s3cret"),
        workdir=workdir,
        command=[f"--config.data.tokenizer={NASTY}"],
    )
    assert status == DONE, err
    (sbatch,) = cluster.calls("sbatch")
    name = sbatch[2].removeprefix("--job-name=")
    prefix = workdir / "slurm" / name
    command = ["train", "--config", str(ROOT / "configs/quickstart.py"), "--workdir", str(workdir)]
    command += [f"--config.data.tokenizer={NASTY}"]
    assert sbatch[3].startswith("--comment=ttt_jax:")
    assert sbatch[:3] + sbatch[4:] == [
        *("sbatch", "--parsable", f"--job-name={name}", f"--output={str(prefix).replace('%', '%%')}-%j.log"),
        *("--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2"),
        *("--partition=gpu", "--time=8:00:00", "--cpus-per-task=7", "--exclusive"),
        *(str(ROOT / "launch/slurm.sbatch"), str(prefix), "3", ""),
        *(str(cluster.folder / "python"), "-m", "ttt_jax", *command),
    ]
    assert "s3cret" not in json.dumps(cluster.calls())
    assert sorted(cluster.started()) == [[["-m", "ttt_jax", *command], str(i), "s3cret"] for i in range(4)]
    assert not (cluster.folder / "pwned").exists()
    assert out.count("started with 0") == 4
    assert "COMPLETED" in err


def test_what_is_submitted_is_requeued_appends_to_its_log_and_is_warned_before_its_limit(cluster):
    cluster.launch()
    options = cluster.job()["options"]
    assert options["requeue"] == ""
    assert options["open-mode"] == "append"
    assert options["signal"] == "TERM@120"  # to the steps; with B: only the shell would hear it


def test_a_run_that_is_preempted_is_started_again_and_ends_well(cluster):
    cluster.plan(75, 137, 0)
    status, out, err = cluster.launch("--restarts", "2")
    assert status == DONE, err
    assert cluster.calls("scontrol")[-1][1] == "show"
    assert [call[1:] for call in cluster.calls("scontrol") if call[1] == "requeue"] == [["requeue", "101"]] * 2
    assert out.count("started with") == 6  # two processes, three starts, in one log
    assert "ended with status 137; starts again, 2 of 2" in out


def test_more_preemptions_than_restarts_end_with_75(cluster):
    cluster.plan(75, 75)
    status, out, _ = cluster.launch("--restarts", "1")
    assert status == RESTART
    assert len(cluster.calls("sbatch")) == 1
    assert cluster.job()["restarts"] == 1
    assert "was started again 1 times already" in out


@pytest.mark.parametrize("code", [FAILED, REFUSED, INTERRUPTED])
def test_what_would_fail_again_is_not_started_again(cluster, code):
    cluster.plan(code)
    status, _, _ = cluster.launch()
    assert status == code
    assert cluster.job()["restarts"] == 0


def test_a_setup_file_is_sourced_by_the_job(cluster):
    setup = cluster.folder / "my setup"
    setup.write_text("SECRET=of-the-setup\nexport SECRET\n")
    assert cluster.launch("--setup", setup)[0] == DONE
    assert [secret for _, _, secret in cluster.started()] == ["of-the-setup"] * 2
    setup.write_text("module load nothing\n")
    status, out, _ = cluster.launch("--setup", setup)
    assert status == REFUSED
    assert "module: command not found" in out
    assert len(cluster.started()) == 2


def test_before_its_time_limit_a_job_saves_and_goes_on_later(cluster):
    cluster.plan("wait", 0)
    launch = cluster.launch(wait=False)
    cluster.wait_until(lambda: len(cluster.started()) == 2)
    cluster.reach_time_limit()
    out, err = launch.communicate(timeout=30)
    assert launch.returncode == DONE, err
    assert out.count("saved") == 2
    assert len(cluster.started()) == 4


def test_ctrl_c_lets_the_job_save_and_ends_it(cluster):
    cluster.plan("wait", 0)
    launch = cluster.launch(wait=False)
    cluster.wait_until(lambda: len(cluster.started()) == 2)
    launch.send_signal(signal.SIGINT)
    _, err = launch.communicate(timeout=30)
    assert launch.returncode == INTERRUPTED, err
    assert cluster.calls("scancel") == [["scancel", "--signal=TERM", "101"]]
    assert len(cluster.started()) == 2  # not started again
    assert cluster.job()["code"] == INTERRUPTED
    log = cluster.folder / "runs/a/slurm"
    assert next(log.glob("*.log")).read_text().count("saved") == 2
    assert not list(log.glob("*.stop"))


def test_ctrl_c_takes_a_job_that_waits_out_of_the_queue(cluster):
    (cluster.folder / "hold").touch()
    launch = cluster.launch(wait=False)
    cluster.wait_until(lambda: cluster.calls("scontrol"))
    launch.send_signal(signal.SIGINT)
    _, err = launch.communicate(timeout=30)
    assert launch.returncode == INTERRUPTED, err
    assert cluster.calls("scancel") == [["scancel", "101"]]
    assert cluster.job()["state"] == "CANCELLED"
    assert cluster.started() == []


def test_a_second_ctrl_c_does_not_wait_for_a_job_that_does_not_end(cluster):
    cluster.plan("wait")
    (cluster.folder / "deaf").touch()  # signals but SIGKILL are lost
    launch = cluster.launch(wait=False)
    cluster.wait_until(lambda: len(cluster.started()) == 2)
    launch.send_signal(signal.SIGINT)
    cluster.wait_until(lambda: cluster.calls("scancel"))
    launch.send_signal(signal.SIGINT)
    _, err = launch.communicate(timeout=30)
    assert launch.returncode == INTERRUPTED, err
    assert cluster.calls("scancel") == [["scancel", "--signal=TERM", "101"], ["scancel", "101"]]
    assert cluster.job()["state"] == "CANCELLED"


def test_the_same_command_follows_the_job_that_it_started(cluster):
    cluster.plan("wait", 0)
    assert cluster.launch("--detach")[0] == DONE
    cluster.wait_until(lambda: len(cluster.started()) == 2)
    again = cluster.launch(wait=False)
    cluster.wait_until(lambda: any(call[1] == "show" for call in cluster.calls("scontrol")))
    cluster.reach_time_limit()
    out, err = again.communicate(timeout=30)
    assert again.returncode == DONE, err
    assert "is there already and followed: 101" in err
    assert out.count("saved") == 2
    assert len(cluster.calls("sbatch")) == 1


def test_another_command_of_the_same_name_is_refused_and_left_alone(cluster):
    cluster.plan("wait")
    cluster.launch("--detach")
    status, _, err = cluster.launch(command=["--config.seed=1"])
    assert status == REFUSED
    assert "runs another command; expected another --name" in err
    assert cluster.calls("scancel") == []
    assert len(cluster.calls("sbatch")) == 1
    cluster.reach_time_limit()


def test_a_job_that_was_not_submitted_from_here_is_never_cancelled(cluster):
    cluster.plan("wait")
    cluster.launch("--detach", "--name", "mine")
    path = cluster.folder / "jobs/101.json"
    path.write_text(path.read_text().replace('"comment": "ttt_jax:', '"comment": "theirs:'))
    for options in (["--stop"], []):
        status, _, err = cluster.launch("--name", "mine", *options)
        assert status == REFUSED
        assert "job 101 has the name mine already; expected another --name" in err
    assert cluster.calls("scancel") == []
    cluster.reach_time_limit()


def test_status_and_stop_by_name(cluster):
    cluster.plan("wait")
    cluster.launch("--detach", "--name", "mine")
    cluster.wait_until(lambda: len(cluster.started()) == 2)

    def ask(action):
        return cluster.ttt("launch", "slurm", "--name", "mine", action, cwd=cluster.folder, set=cluster.waits)

    log = cluster.folder / "runs/a/slurm/mine-101.log"
    assert ask("--status")[:2] == (DONE, f"mine: job 101, RUNNING, its log is {log}\n")
    assert ask("--stop")[0] == DONE
    assert cluster.job()["code"] == INTERRUPTED
    assert ask("--status")[:2] == (DONE, "mine: no such job waits or runs\n")


def test_faults_that_pass_are_waited_out_and_nothing_is_submitted_twice(cluster):
    timeout = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    cluster.fail("sbatch", ("before", timeout), ("after", timeout))
    cluster.fail("squeue", ("before", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"))
    cluster.fail("scontrol", ("before", "slurm_load_jobs error: Zero Bytes were transmitted or received"))
    (cluster.folder / "hold").touch()  # until it was looked for in the queue
    launch = cluster.launch(wait=False)
    cluster.wait_until(lambda: cluster.calls("scontrol"))
    (cluster.folder / "hold").unlink()
    _, err = launch.communicate(timeout=30)
    assert launch.returncode == DONE, err
    assert len(cluster.calls("sbatch")) == 2
    assert len(list((cluster.folder / "jobs").glob("*.json"))) == 1


def test_a_fault_that_stays_is_told_at_once(cluster):
    cluster.fail("sbatch", ("before", "sbatch: error: invalid partition specified: gpus"))
    status, _, err = cluster.launch("--partition", "gpus")
    assert status == FAILED
    assert err.splitlines()[-1].startswith("ttt launch: sbatch: exit status 1: ")
    assert err.splitlines()[-1].endswith("invalid partition specified: gpus")
    assert len(cluster.calls("sbatch")) == 1


@pytest.mark.parametrize(
    ("past", "code", "expected"),
    [
        ("COMPLETED", 0, DONE),
        ("FAILED", 2, REFUSED),
        ("FAILED", 1, FAILED),
        ("FAILED", 127, FAILED),
        ("TIMEOUT", 0, RESTART),
        ("CANCELLED by 1000", 0, INTERRUPTED),
        ("OUT_OF_MEMORY", 0, FAILED),
        ("NODE_FAIL", 1, RESTART),
    ],
)
def test_how_a_job_ended_that_only_accounting_knows(cluster, past, code, expected, monkeypatch):
    from ttt_jax.launch import slurm
    from ttt_jax.launch.commands import Commands
    from ttt_jax.launch.job import Job

    (cluster.folder / "jobs").mkdir()
    known = {"state": "FORGOTTEN", "past": past, "code": code, "log": "x", "restarts": 0, "arguments": []}
    (cluster.folder / "jobs/7.json").write_text(json.dumps(known))
    monkeypatch.setattr(slurm, "_POLL", 0)
    for name in ("PATH", "STAND_IN"):
        monkeypatch.setenv(name, cluster.environment[name])
    assert slurm.Slurm(Job("a", (), ROOT), Commands(), ROOT, []).follow("7", True) == expected


def test_dry_run_prints_what_bash_takes_and_does_nothing(cluster):
    status, out, _ = cluster.launch("--dry-run", command=[f"--config.data.tokenizer={NASTY}"])
    assert status == DONE
    assert cluster.calls() == []
    assert not (cluster.folder / "runs").exists()
    subprocess.run(["bash", "-c", out.replace("runs/a/slurm", "")], env=cluster.environment, check=True)
    (sbatch,) = cluster.calls("sbatch")
    assert sbatch[-1] == f"--config.data.tokenizer={NASTY}"


def test_refusals(cluster):
    train = ["train", "--config", ROOT / "configs/quickstart.py", "--workdir", "runs/a"]

    def refused(*options, command=train):
        status, out, err = cluster.ttt("launch", "slurm", *options, "--", *command, cwd=cluster.folder)
        assert (status, out) == (REFUSED, "")
        return err.splitlines()[-1]

    assert refused() == "ttt launch: --gpus-per-node: missing; expected how many GPUs each node has"
    assert "--setup no: no such file" in refused("--gpus-per-node=1", "--setup=no")
    assert "unknown key" in refused("--gpus-per-node=1", command=[*train, "--config.model.widht=3"])
    for name in "sbatch squeue".split():
        (cluster.folder / "bin" / name).unlink()
    assert refused("--gpus-per-node=1").startswith("ttt launch: squeue: is not installed; it is part of Slurm")
    assert not (cluster.folder / "runs").exists()
