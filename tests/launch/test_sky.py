"""``ttt launch sky``, with a small SkyPilot that does setup and run of a task; uv and ttt there are stand-ins."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stand_ins import ROOT, StandIns

from ttt_jax.launch import versions
from ttt_jax.launch.sky import Record
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, REFUSED, RESTART

NASTY = 'it\'s "$(touch pwned)" `id`; !! \\ $HOME *\nsecond line é😀\x7f'
WAITS = {"sky._POLL": 0.05, "stream.LAST_WORDS": 0.5, "commands.FIRST_WAIT": 0.05}

# Tells what it got, and does what $STAND_IN/plan says, a list with a word for each start: a status to end with, or
# "wait" for a file.
COMMAND = """
import json, os, sys, time
here = os.environ["STAND_IN"]
names = ["SECRET", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
with open(f"{here}/started", "a") as started:
    started.write(json.dumps([sys.argv[1:], [os.environ.get(name) for name in names], os.getcwd()]) + "\\n")
plan = json.load(open(f"{here}/plan"))[int(os.environ["RECOVERIES"])]
print("started with", plan, flush=True)
deadline = time.monotonic() + 20
while plan == "wait" and not os.path.exists(f"{here}/finish") and time.monotonic() < deadline:
    time.sleep(0.01)
sys.exit(0 if plan == "wait" else plan)
"""
UV = """
import json, os, shutil, sys
here = os.environ["STAND_IN"]
with open(f"{here}/uv", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "venv":
    os.makedirs(f"{sys.argv[-1]}/bin", exist_ok=True)
else:
    shutil.copy(f"{here}/ttt", os.path.dirname(sys.argv[sys.argv.index("--python") + 1]))
    constraints = open(sys.argv[sys.argv.index("--constraint") + 1]).read()
    open(f"{here}/constraints", "w").write(constraints)
sys.exit(os.path.exists(f"{here}/no-packages"))
"""


class Sky(StandIns):
    def __init__(self, folder):
        super().__init__(folder, "stand_in_sky.py", ["sky", "controller"])
        program = folder / "bin" / "sky"
        program.write_text(program.read_text().replace(" -IS\n", "\n", 1))  # it reads YAML
        (folder / "remote").mkdir()
        for path, text in ((folder / "ttt", COMMAND), (folder / "remote" / "uv", UV)):
            path.write_text(f"#!{sys.executable} -IS\n{text}")
            path.chmod(0o755)
        self.environment["XDG_CACHE_HOME"] = str(folder / "cache")
        self.plan(0)

    def launch(self, *options, machines=("--accelerator", "tpu-v5litepod-8"), command=(), wait=True):
        start = self.ttt if wait else self.start
        command = ("train", "--config", ROOT / "configs/quickstart.py", "--workdir", "gs://bucket/runs/a", *command)
        return start("launch", "sky", *machines, *options, "--", *command, cwd=self.folder, set=WAITS)

    def jobs(self):
        path = self.folder / "jobs.json"
        return json.loads(path.read_text()) if path.exists() else []

    def of(self, verb):
        return [call for call in self.calls("sky") if call[2] == verb]


@pytest.fixture
def sky(tmp_path):
    return Sky(tmp_path / "sky")


def test_a_job_is_submitted_installed_followed_and_its_arguments_arrive_as_they_are(sky):
    status, out, err = sky.launch(
        *("--spot", "--infra", "gcp/us-west4", "--disk-size", "200", "--env", f"SECRET={NASTY}"),
        command=[f"--config.data.tokenizer={NASTY}"],
    )
    assert status == DONE, err
    ((*launch, file),) = sky.of("launch")
    name = launch[3].removeprefix("--name=")
    assert re.fullmatch("ttt-a-[0-9a-f]{6}-[0-9a-f]{12}", name)
    assert launch == ["sky", "jobs", "launch", f"--name={name}", "--yes", "--detach-run", "--secret=SECRET"]
    task = yaml.safe_load(Path(file).read_text())
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert task["resources"] == {
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 134, 143]},
        "infra": "gcp/us-west4",
        "disk_size": 200,
        "accelerators": "tpu-v5litepod-8",
        "use_spot": True,
        "accelerator_args": {"runtime_version": "v2-alpha-tpuv5-lite"},
    }
    assert (task["name"], task["num_nodes"]) == (name, 1)
    command = ["train", "--config", "configs/quickstart.py", "--workdir", "gs://bucket/runs/a"]
    command += [f"--config.data.tokenizer={NASTY}"]
    source = sky.folder / "home/ttt-launch/source"
    assert sky.started() == [[command, [NASTY, None, None, None], str(source)]]
    assert "SECRET" not in Path(file).read_text()
    venv, install = map(json.loads, (sky.folder / "uv").read_text().splitlines())
    assert venv == ["venv", "--quiet", "--allow-existing", "--python", python, f"{source.parent}/venv"]
    assert install[-2:] == ["--editable", f"{source}[tpu,gcs]"]
    assert (sky.folder / "constraints").read_text() == versions.constraints(("tpu", "gcs"))
    assert (source / "ttt_jax" / "errors.py").read_text() == (ROOT / "ttt_jax" / "errors.py").read_text()
    assert out.count("started with 0") == 1
    assert "SUCCEEDED" in err


@pytest.mark.slow
def test_the_log_of_a_job_that_ends_at_once_is_shown(sky):
    (sky.folder / "quick").touch()
    sky.plan(3)
    status, out, _ = sky.launch()
    assert status == 1
    assert out.count("started with 3") == 1


@pytest.mark.slow
def test_nodes_with_gpus_find_each_other(sky):
    status, _, err = sky.launch("--nodes", "2", machines=("--accelerator", "H100:8"))
    assert status == DONE, err
    found = sorted(environment for _, environment, _ in sky.started())
    assert found == [[None, "10.0.0.1:8476", "2", "0"], [None, "10.0.0.1:8476", "2", "1"]]
    resources = sky.jobs()[0]["task"]["resources"]
    assert resources["accelerators"] == "H100:8"
    assert "accelerator_args" not in resources
    assert "[cuda,gcs]" in (sky.folder / "uv").read_text()


def test_machines_without_accelerators(sky):
    assert sky.launch(machines=("--cpus", "32+"))[0] == DONE
    assert sky.jobs()[0]["task"]["resources"]["cpus"] == "32+"
    assert "accelerators" not in sky.jobs()[0]["task"]["resources"]


@pytest.mark.slow
def test_a_run_that_is_preempted_is_recovered_and_ends_well(sky):
    sky.plan(75, 143, 0)
    status, out, err = sky.launch()
    assert status == DONE, err
    assert re.findall("started with (.*)", out) == ["75", "143", "0"]
    assert len(sky.of("launch")) == 1


@pytest.mark.slow
def test_more_preemptions_than_restarts_cancel_it_and_end_with_75(sky):
    sky.plan(75, "wait")
    status, _, err = sky.launch("--restarts", "0")
    assert status == RESTART, err
    assert sky.of("cancel") == [["sky", "jobs", "cancel", "--yes", "1"]]
    assert "more than --restarts" in err


@pytest.mark.slow
@pytest.mark.parametrize("code", [FAILED, REFUSED, INTERRUPTED])
def test_what_would_fail_again_is_not_started_again(sky, code):
    sky.plan(code)
    status, _, err = sky.launch()
    assert status == code
    assert f"Job exited with exit code {code}" in err
    assert len(sky.started()) == 1


def test_an_installation_that_fails(sky):
    (sky.folder / "no-packages").touch()
    status, _, err = sky.launch()
    assert status == FAILED
    assert "FAILED_SETUP" in err
    assert sky.started() == []


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("FAILED", "Job exited with exit codes [0, 137, 1] (user program failure). See 2", FAILED),
        ("FAILED", "Job exited with exit codes [137, 2]. See 1", REFUSED),
        ("FAILED", "Job exited with exit code 137", RESTART),
        ("FAILED", "Job exited with exit code 127", FAILED),
        ("FAILED", "Job failed (FAILED). To see the details, run: sky jobs logs --controller 75", FAILED),
        ("FAILED_PRECHECKS", "no such accelerator", REFUSED),
        ("FAILED_NO_RESOURCE", "", RESTART),
        ("FAILED_CONTROLLER", "", RESTART),
        ("CANCELLED", "", INTERRUPTED),
        ("RECOVERING", "", None),
    ],
)
def test_statuses(state, reason, expected):
    assert Record(1, state, 0, reason).status == expected


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, RESTART)])
def test_ctrl_c_cancels_the_job(sky, number, expected):
    sky.plan("wait")
    launch = sky.launch(wait=False)
    sky.wait_until(sky.started)
    launch.send_signal(number)
    _, err = launch.communicate(timeout=30)
    assert launch.returncode == expected, err
    assert sky.of("cancel") == [["sky", "jobs", "cancel", "--yes", "1"]]
    assert sky.jobs()[0]["status"] == "CANCELLED"


@pytest.mark.slow
def test_the_same_command_follows_the_job_that_it_submitted(sky):
    sky.plan("wait")
    assert sky.launch("--detach")[0] == DONE
    sky.wait_until(sky.started)
    again = sky.launch(wait=False)
    sky.wait_until(lambda: sky.of("logs"))
    (sky.folder / "finish").touch()
    out, err = again.communicate(timeout=30)
    assert again.returncode == DONE, err
    assert "is there already and followed: 1" in err
    assert "started with wait" in out
    assert len(sky.of("launch")) == 1


def test_another_command_of_the_same_name_is_refused_and_jobs_of_others_are_left_alone(sky):
    sky.plan("wait")
    sky.launch("--detach", "--name", "mine")
    status, _, err = sky.launch("--name", "mine", command=["--config.seed=1"])
    assert status == REFUSED
    assert "runs another command; expected another --name" in err
    path = sky.folder / "jobs.json"
    theirs = json.loads(path.read_text())[0] | {"job_id": 2, "job_name": "mine"}
    path.write_text(json.dumps([*json.loads(path.read_text()), theirs]))

    def ask(action):
        return sky.ttt("launch", "sky", "--name", "mine", action, set=WAITS)

    assert ask("--status")[1].startswith("mine: managed job 1, ")
    assert ask("--stop")[0] == DONE
    assert ask("--stop")[1] == "mine: no such job waits or runs\n"
    assert sky.of("cancel") == [["sky", "jobs", "cancel", "--yes", "1"]]


@pytest.mark.slow
def test_faults_that_pass_are_waited_out_and_nothing_is_submitted_twice(sky):
    fault = "requests.exceptions.ReadTimeout: Read timed out."
    sky.fail("launch", ("before", fault), ("after", fault))
    sky.fail("queue", ("before", "Could not connect to SkyPilot API server at http://127.0.0.1:46580."))
    (sky.folder / "hold").touch()  # until it was looked for among the jobs
    launch = sky.launch(wait=False)
    sky.wait_until(lambda: sky.of("logs"))
    (sky.folder / "hold").unlink()
    _, err = launch.communicate(timeout=60)
    assert launch.returncode == DONE, err
    assert len(sky.of("launch")) == 2
    assert len(sky.jobs()) == 1


def test_a_fault_that_stays_is_told_with_all_that_sky_said(sky):
    sky.fail("launch", ("before", "No cloud is enabled.\nRun: sky check"))
    status, _, err = sky.launch()
    assert status == FAILED
    assert "No cloud is enabled." in err
    assert len(sky.of("launch")) == 1


def test_before_there_has_ever_been_a_job(sky):
    (sky.folder / "never").touch()
    status, out, _ = sky.ttt("launch", "sky", "--name", "mine", "--status", set=WAITS)
    assert (status, out) == (DONE, "mine: no such job waits or runs\n")


def test_dry_run_prints_what_bash_takes_and_does_nothing(sky):
    (sky.folder / "hold").touch()
    status, out, _ = sky.launch("--dry-run", "--env", "SECRET=s3cret", command=[f"--config.data.tokenizer={NASTY}"])
    assert status == DONE
    assert (sky.calls(), sky.jobs()) == ([], [])
    assert not (sky.folder / "cache").exists()
    assert "s3cret" not in out
    cache = sky.folder / "cache/ttt_jax/launch"
    cache.mkdir(parents=True)
    packed = re.search(r"# (\S+\.tar\.gz): the source tree", out)[1]
    Path(packed).touch()
    subprocess.run(["bash", "-c", out], env={**sky.environment, "SECRET": "s3cret"}, check=True, capture_output=True)
    (job,) = sky.jobs()
    there = subprocess.run(
        ["bash", "-c", job["task"]["run"].replace("exec bash", "printf '%s\\0'")], capture_output=True
    )
    assert there.stdout.decode().split("\0")[-2] == f"--config.data.tokenizer={NASTY}"
    (sky.folder / "hold").unlink()


def test_refusals(sky):
    def refused(*options, workdir="gs://bucket/a", verb="train", config=()):
        command = [verb, "--workdir", workdir, *config]
        if verb == "train":
            command += ["--config", ROOT / "configs/quickstart.py"]
        status, out, err = sky.ttt("launch", "sky", *options, "--", *command, set=WAITS)
        assert (status, out) == (REFUSED, "")
        assert sky.of("launch") == []
        return err.splitlines()[-1]

    assert "--accelerator: missing; expected one" in refused()
    assert "--accelerator: expected one" in refused("--accelerator=H100:8", "--cpus=2")
    assert "runs/a: the machines are deleted" in refused("--accelerator=H100:8", workdir="runs/a")
    assert "expected an accelerator type" in refused("--accelerator=tpu-v99-1")
    assert "--nodes: of GPUs only" in refused("--accelerator=tpu-v5litepod-8", "--nodes=2")
    assert "runs on one host" in refused("--accelerator=tpu-v5litepod-16", verb="eval")
    (sky.folder / "bin" / "sky").unlink()
    assert refused("--accelerator=H100:8").startswith("ttt launch: sky: is not installed; pip install 'skypilot[")
