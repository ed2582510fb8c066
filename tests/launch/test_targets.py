"""Test what all targets have in common, with stand-ins for the programs that they call."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
from stand_ins import NASTY, OPTIONS, PROGRAMS, ROOT

from ttt_jax.launch import sources
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, REFUSED, RESTART

SUBMIT = {"slurm": "sbatch", "gke": "create", "sky": "launch", "tpu": "create"}  # a word of the call that submits
END = {"slurm": "scancel", "gke": "delete", "sky": "cancel", "tpu": "delete"}  # and of the call that ends the job
slow = pytest.mark.slow


@pytest.fixture(params=[*(pytest.param(name, marks=slow) for name in ("slurm", "gke", "tpu")), "sky"])
def target(request, stand_ins):
    return stand_ins(request.param)


@pytest.fixture
def running(target):
    target.plan("wait")
    target.launch("--detach")
    target.wait_until(target.runs)
    return target


def logs(target) -> str:
    return "".join(path.read_text() for path in target.folder.rglob("*log") if path.is_file())


def test_a_job_is_submitted_and_followed_and_its_arguments_arrive_as_they_are(target):
    secret = f"s3cret{NASTY}"
    out, _ = target.launch("--env", f"SECRET={secret}", command=[f"--config.data.tokenizer={NASTY}"])
    config = str(ROOT / "configs/quickstart.py") if target.target == "slurm" else "configs/quickstart.py"
    command = ["train", "--config", config, "--workdir", target.workdir, "--config.data.batch_size=8"]
    started = target.started()
    assert len(started) == target.processes
    for each in started:
        assert each["argv"][-7:] == [*command, f"--config.data.tokenizer={NASTY}"]
        assert each["environment"]["SECRET"] == secret
    # The secret is in no call, and in no file of this machine.
    files = [path for path in target.folder.glob("cache/**/*") if path.is_file()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
    assert "s3cret" not in json.dumps(target.calls())
    assert "start 0 of host 0" in out
    assert len(target.calls(SUBMIT[target.target])) == 1
    assert not list(target.folder.rglob("pwned"))


@pytest.mark.parametrize(
    ("plan", "restarts", "status", "starts"),
    [([75, 143, 0], 2, DONE, 3), ([FAILED], 2, FAILED, 1), pytest.param([REFUSED], 2, REFUSED, 1, marks=slow)],
)
def test_a_run_is_started_again_after_a_preemption_and_not_after_a_failure(target, plan, restarts, status, starts):
    target.plan(*plan)
    out, _ = target.launch("--restarts", restarts, ends=status)
    shown = re.findall("start . of host 0: (.*)", out)
    assert shown == [*map(str, plan)] or (target.target == "gke" and shown[-1] == str(plan[-1]))  # the newest pod
    assert len(target.started()) == starts * target.processes
    assert len(target.calls(SUBMIT[target.target])) == 1


def test_more_preemptions_than_restarts_end_with_75(target):
    target.plan(75, "wait")
    out, err = target.launch("--restarts", "0", ends=RESTART)
    said = {"slurm": "was started again 0 times", "gke": "reached max number of", "tpu": "no more restarts"}
    assert said.get(target.target, "more than --restarts") in out + err


@pytest.mark.parametrize(
    ("number", "status", "waits"),
    [
        (signal.SIGINT, INTERRUPTED, False),
        pytest.param(signal.SIGTERM, RESTART, False, marks=slow),
        (signal.SIGINT, INTERRUPTED, True),
    ],
)
def test_an_interrupt_ends_the_job_which_saves_if_it_runs(target, number, status, waits):
    target.plan("wait")
    if waits:  # in the queue; the interrupt comes while xpk creates the workload
        target.kept("cloud", lives=[["WAITING_FOR_RESOURCES"]])
        target.has("hold", "slow")

    def is_there():
        return target.calls(SUBMIT[target.target]) and target.kept("jobs")

    target.launch(meanwhile=[(is_there if waits else target.runs, number)], ends=status)
    assert logs(target).count("saved") == (0 if target.target == "sky" or waits else target.processes)
    assert len(target.calls(END[target.target])) == 1
    assert target.act("--status")[1].startswith("mine: no such job waits or runs")
    assert len(target.started()) == (0 if waits else target.processes)  # not started again


@slow
@pytest.mark.parametrize("target", ["slurm", "tpu"], indirect=True)
def test_a_second_interrupt_does_not_wait_for_a_command_that_does_not_end(target):
    target.plan("hang")

    def stops():
        return re.search("--signal| stop ", str(target.calls()))

    _, err = target.launch(meanwhile=[(target.runs, signal.SIGINT), (stops, signal.SIGINT)], ends=INTERRUPTED)
    if target.target == "slurm":
        assert [call[1] for call in target.calls("scancel")] == ["--signal=TERM", "101"]
        assert target.kept("jobs")["101"]["state"] == "CANCELLED"
    else:
        *_, said, command = err.splitlines()
        assert said == "mine: may still exist, and cost; to delete it:"
        deletion = "gcloud compute tpus queued-resources delete mine --zone=us-west4-a --force --quiet"
        assert (command.strip(), target.calls("delete")) == (deletion, [])


@slow
def test_the_same_command_follows_the_job_that_runs(running, target):
    shows = {"slurm": "show", "gke": "logs", "sky": "logs", "tpu": "ssh"}[target.target]
    before = len(target.calls(shows)) + (target.target == "tpu")
    followed = (lambda: len(target.calls(shows)) > before, lambda: target.has("finish"))
    out, err = target.launch(meanwhile=[followed])
    assert "is there already and followed" in err or "runs already" in err
    assert "finished" in out
    assert len(target.calls(SUBMIT[target.target])) == 1


def test_another_command_of_the_same_name_is_refused_and_left_alone(running, target):
    _, err = target.launch(command=["--config.seed=1"], ends=REFUSED)
    assert "runs another command; expected another --name" in err
    if target.target == "tpu":  # nor is the same command on other machines
        target.launch("--accelerator", "v5litepod-4", ends=REFUSED)
    assert target.calls(END[target.target]) == []
    assert len(target.calls(SUBMIT[target.target])) == 1


def test_a_job_that_ttt_launch_did_not_submit_is_left_alone(running, target):
    marks = [("ttt_jax:", "theirs:"), ("TTT_JAX_COMMAND", "SOMETHING"), ('"mine-', '"theirs-'), ("ttt-launch", "x")]
    path = target.folder / "jobs.json"
    for ours, theirs in marks:
        path.write_text(path.read_text().replace(ours, theirs))
    status, out, err = target.act("--stop")
    if target.target == "sky":  # its names are not unique
        assert (status, out) == (DONE, "mine: no such job waits or runs\n")
    else:
        assert status == REFUSED
        assert re.search("mine.* is there already, and not of ttt launch; it is left alone; expected another --na", err)
        target.launch(ends=REFUSED)
    assert target.calls(END[target.target]) == []


def test_status_and_stop_by_name(running, target):
    shown = {"slurm": "job 101, RUNNING, its log is .*/runs/a/slurm/mine-101.log", "gke": "runs, attempt 1"}
    shown |= {"sky": "managed job 1, RUNNING", "tpu": "ACTIVE\n  worker 0 of mine: running\nstart 0 of host 0: wait"}
    status, out, _ = target.act("--status")
    assert status == DONE
    assert re.fullmatch(f"mine: {shown[target.target]}\n", out)
    assert target.act("--stop")[0] == DONE
    assert logs(target).count("saved") == (0 if target.target == "sky" else target.processes)
    assert target.act("--status")[1].startswith("mine: no such job waits or runs")


@slow
def test_transient_faults_do_not_submit_a_job_twice(target):
    submit, ask, passes = {
        "slurm": ("sbatch", ("squeue", "scontrol"), "sbatch: error: Socket timed out on send/recv operation"),
        "gke": ("xpk create", ("kubectl get", "xpk list"), "terminated with ERROR `1`: dial tcp: i/o timeout"),
        "sky": ("sky launch", ("sky queue",), "requests.exceptions.ReadTimeout: Read timed out."),
        "tpu": ("gcloud create", ("gcloud describe", "gcloud scp", "gcloud ssh"), "host: port 22: Connection refused"),
    }[target.target]
    target.fail("gcloud delete", ("before", "FAILED_PRECONDITION: is not supported when state is PROVISIONING"))
    target.has("hold")  # until it was looked for in the queue
    target.fail(submit, ("before", passes), ("after", passes))
    for call in ask:
        target.fail(call, ("before", passes))
    shows = {"slurm": ["show"], "sky": ["logs"]}.get(target.target, [])
    submitted = (
        lambda: len(target.calls(SUBMIT[target.target])) > 1 and target.kept("jobs") and target.calls(*shows),
        (target.folder / "hold").unlink,
    )
    target.launch(meanwhile=[submitted])
    assert len(target.calls(SUBMIT[target.target])) == 2
    assert len(target.started()) == target.processes


def test_a_final_fault_is_reported_with_all_output_of_the_program(target):
    call = {"slurm": "sbatch", "gke": "xpk create", "sky": "sky launch", "tpu": "gcloud create"}[target.target]
    target.fail(call, ("before", "Permission denied by me.\nERROR: nothing goes"))
    _, err = target.launch(ends=FAILED)
    assert "ERROR: nothing goes" in err.splitlines()[-1]
    assert target.target == "tpu" or "Permission denied by me." in err
    assert len(target.calls(SUBMIT[target.target])) == 1


def test_dry_run_prints_what_bash_takes_and_does_nothing(target):
    target.has("hold")
    target.kept("cloud", lives=[["ACTIVE"]])
    out, _ = target.launch("--dry-run", "--env", "SECRET=s3cret", command=[f"--config.data.tokenizer={NASTY}"])
    assert (target.calls(), target.started(), "s3cret" in out) == ([], [], False)
    assert not (target.folder / "cache").exists() or target.target == "tpu"
    cache = target.folder / "cache/ttt_jax/launch"
    for folder in (cache, target.folder / "runs/a/slurm"):
        folder.mkdir(parents=True, exist_ok=True)
    (cache / "mine.env").touch(0o600)
    for packed in re.findall(r"# (\S+\.tar\.gz): the source tree", out):
        sources.archive(ROOT, {"launch-constraints.txt": ""}, Path(packed))
    environment = {**target.environment, "SECRET": "s3cret"}
    done = subprocess.run(["bash", "-c", out], env=environment, cwd=target.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(target.calls(SUBMIT[target.target])) == 1
    (target.folder / "hold").unlink()
    target.wait_until(target.started)
    assert target.started()[0]["argv"][-1] == f"--config.data.tokenizer={NASTY}"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slurm", ("--gpus-per-node=1", "--setup=no"), "--setup no: no such file"),
        ("gke", (*OPTIONS["gke"][:4], "--image=a;id"), "--image a;id: expected an image"),
        ("gke", (*OPTIONS["gke"], "--zone=$(id)"), "--zone $(id): expected letters"),
        ("gke", (*OPTIONS["gke"][:4], "--build=gcr.io/a:b"), "--build gcr.io/a:b: expected no tag"),
        ("sky", ("--accelerator=H100:8", "--cpus=2"), "--accelerator: expected one"),
        ("sky", ("--accelerator=tpu-v99-1",), "expected an accelerator type"),
        ("sky", ("--accelerator=tpu-v5litepod-8", "--nodes=2"), "--nodes: of GPUs only"),
    ],
)
def test_refusals(stand_ins, name, options, message):
    target = stand_ins(name)
    out, err = target.launch(machines=options, ends=REFUSED)
    assert (out, message in err.splitlines()[-1]) == ("", True)
    assert target.calls(SUBMIT[name]) == []


def test_a_program_that_is_not_installed_is_named(target):
    target.environment["PATH"] = str(target.folder)
    _, err = target.launch(ends=REFUSED)
    program = {"slurm": "squeue"}.get(target.target, PROGRAMS[target.target][0].split()[0])
    assert err.splitlines()[-1].startswith(f"ttt launch: {program}: is not installed; ")
    assert not (target.folder / "runs").exists()
