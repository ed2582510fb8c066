"""``ttt launch gke``, with a small cluster that runs the pods of workloads; the ttt in its image is a stand-in."""

import json
import signal
import sys
from pathlib import Path

import pytest
from stand_ins import ROOT, StandIns

from ttt_jax.launch import versions
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, REFUSED, RESTART

NASTY = 'it\'s "$(TTT_JAX_COMMAND)" $$ `id`; \\ $HOME *\nsecond line é'
WAITS = {"gke._POLL": 0.05, "stream.LAST_WORDS": 0.3, "commands.FIRST_WAIT": 0.05}
IMAGE = "us-docker.pkg.dev/p/r/ttt_jax:1"

# The ttt of the image: tells what it got, and does what $STAND_IN/plan says, a list with a word for each attempt: a
# status to end with, or "wait" for SIGTERM, and 75 then.
COMMAND = """
import json, os, signal, sys, time
here = os.environ["STAND_IN"]
term = []
signal.signal(signal.SIGTERM, lambda *_: term.append(1))
with open(f"{here}/started", "a") as started:
    started.write(json.dumps([sys.argv[1:], os.environ.get("SECRET")]) + "\\n")
plan = json.load(open(f"{here}/plan"))[int(os.environ["ATTEMPT"])]
print("host", os.environ["HOST"], "started with", plan, flush=True)
deadline = time.monotonic() + 20
while plan == "wait" and not term and time.monotonic() < deadline:
    if os.path.exists(f"{here}/finish"):
        print("finished", flush=True)
        sys.exit(0)
    time.sleep(0.01)
if term:
    open(f"{here}/saved", "a").write("x")
sys.exit(75 if plan == "wait" else plan)
"""


class Cluster(StandIns):
    def __init__(self, folder):
        super().__init__(folder, "stand_in_gke.py", ["xpk", "kubectl", "docker", "kubelet"])
        program = folder / "bin" / "xpk"
        program.write_text(program.read_text().replace(" -IS\n", "\n", 1))  # it reads YAML
        (folder / "image").mkdir()
        (folder / "image" / "ttt").write_text(f"#!{sys.executable} -IS\n{COMMAND}")
        (folder / "image" / "ttt").chmod(0o755)
        self.plan(0)

    def launch(self, *options, image=("--image", IMAGE), command=(), wait=True):
        start = self.ttt if wait else self.start
        command = ("train", "--config", ROOT / "configs/quickstart.py", "--workdir", "gs://bucket/runs/a", *command)
        options = ("--cluster", "c", "--tpu-type", "v5litepod-8", *image, *options)
        return start("launch", "gke", *options, "--", *command, cwd=self.folder, set=WAITS)

    def act(self, action, name="ttt-a-0b8b2f"):
        return self.ttt("launch", "gke", "--cluster", "c", "--name", name, action, set=WAITS)

    def jobsets(self):
        path = self.folder / "jobsets.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def created(self):
        return [call for call in self.calls("xpk") if call[2] == "create"]

    def deleted(self):
        return [call for call in self.calls("xpk") if call[2] == "delete"]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path / "cluster")


def test_a_workload_is_created_followed_and_its_arguments_arrive_as_they_are(cluster):
    status, out, err = cluster.launch(
        *("--slices", "2", "--project", "p", "--zone", "us-west4-a", "--spot", "--priority", "high"),
        *("--restarts", "3", "--env", f"SECRET={NASTY}"),
        command=[f"--config.data.tokenizer={NASTY}"],
    )
    assert status == DONE, err
    (create,) = cluster.created()
    name = create[3].removeprefix("--workload=")
    where = ["--cluster=c", "--project=p", "--zone=us-west4-a"]
    assert create[:-2] == [
        *("xpk", "workload", "create", f"--workload={name}", *where),
        *("--tpu-type=v5litepod-8", "--num-slices=2", f"--docker-image={IMAGE}"),
        *("--max-restarts=3", "--restart-on-exit-codes=75", "--termination-grace-period-seconds=120"),
        *("--spot", "--priority=high"),
    ]
    command = ["train", "--config", "configs/quickstart.py", "--workdir", "gs://bucket/runs/a"]
    command += [f"--config.data.tokenizer={NASTY}"]
    assert cluster.started() == [[command, NASTY]] * 2
    assert not Path(create[-2].removeprefix("--env-file=")).exists()
    assert NASTY not in json.dumps(create[:-1])
    # The log of the first host, and not of the second.
    assert out.count("host 0 started with 0") == 1
    assert "host 1" not in out
    assert "Completed" in err
    assert cluster.deleted() == []


def test_a_run_that_is_preempted_is_started_again_and_ends_well(cluster):
    cluster.plan(75, 143, 0)
    status, out, err = cluster.launch("--restarts", "2")
    assert status == DONE, err
    assert [line for line in out.splitlines() if line.startswith("host")][-1] == "host 0 started with 0"
    assert cluster.jobsets().popitem()[1]["status"]["restarts"] == 2
    assert len(cluster.created()) == 1


def test_more_preemptions_than_restarts_end_with_75(cluster):
    cluster.plan(75, 75)
    status, _, err = cluster.launch("--restarts", "1")
    assert status == RESTART
    assert "reached max number of restarts" in err


@pytest.mark.slow
@pytest.mark.parametrize("code", [FAILED, REFUSED])
def test_what_would_fail_again_is_not_started_again(cluster, code):
    cluster.plan(code)
    status, _, _ = cluster.launch()
    assert status == code
    assert cluster.jobsets().popitem()[1]["status"]["restarts"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, RESTART)])
def test_ctrl_c_lets_the_workload_save_and_deletes_it(cluster, number, expected):
    cluster.plan("wait")
    launch = cluster.launch(wait=False)
    cluster.wait_until(lambda: len(cluster.started()) == 2)
    launch.send_signal(number)
    _, err = launch.communicate(timeout=30)
    assert launch.returncode == expected, err
    (delete,) = cluster.deleted()
    name = cluster.created()[0][3]
    assert delete == ["xpk", "workload", "delete", name, "--cluster=c", "--force"]
    assert cluster.jobsets() == {}
    assert (cluster.folder / "saved").read_text() == "xx"


@pytest.mark.slow
def test_ctrl_c_while_the_workload_is_created_deletes_it_too(cluster):
    cluster.plan("wait")
    (cluster.folder / "suspend").touch()
    program = cluster.folder / "bin" / "xpk"
    source = program.read_text()
    slow = "if sys.argv[2:3] == ['create']:\n    main()\n    time.sleep(1)\n    sys.exit(0)\n"
    program.write_text(source.replace("if __name__", f"{slow}if __name__"))
    launch = cluster.launch(wait=False)
    cluster.wait_until(lambda: cluster.created())
    launch.send_signal(signal.SIGINT)
    _, err = launch.communicate(timeout=30)
    assert launch.returncode == INTERRUPTED, err
    assert len(cluster.deleted()) == 1
    assert cluster.jobsets() == {}


@pytest.mark.slow
def test_the_same_command_follows_the_workload_that_it_created(cluster):
    cluster.plan("wait")
    assert cluster.launch("--detach")[0] == DONE
    cluster.wait_until(lambda: len(cluster.started()) == 2)
    again = cluster.launch(wait=False)
    cluster.wait_until(lambda: any(call[3] == "logs" for call in cluster.calls("kubectl") if len(call) > 3))
    (cluster.folder / "finish").touch()
    out, err = again.communicate(timeout=30)
    assert again.returncode == DONE, err
    assert "is there already and followed" in err
    assert out.count("finished") == 1
    assert len(cluster.created()) == 1


@pytest.mark.slow
def test_after_its_end_the_same_command_starts_anew(cluster):
    cluster.plan(1)
    assert cluster.launch()[0] == FAILED
    cluster.plan(0)
    assert cluster.launch()[0] == DONE
    assert [call[2] for call in cluster.calls("xpk")] == ["list", "create", "list", "delete", "create"]


def test_another_command_of_the_same_name_is_refused_and_left_alone(cluster):
    cluster.plan("wait")
    cluster.launch("--detach")
    status, _, err = cluster.launch(command=["--config.seed=1"])
    assert status == REFUSED
    assert "runs another command; expected another --name" in err
    assert cluster.deleted() == []
    (cluster.folder / "finish").touch()


def test_a_workload_that_was_not_created_from_here_is_never_deleted(cluster):
    cluster.plan("wait")
    cluster.launch("--detach", "--name", "mine")
    path = cluster.folder / "jobsets.json"
    path.write_text(path.read_text().replace("TTT_JAX_COMMAND", "SOMETHING"))
    for status, _, err in (cluster.launch("--name", "mine"), cluster.act("--stop", "mine")):
        assert status == REFUSED
        assert "a workload mine is there already, and not of ttt launch; expected another --name" in err
    assert cluster.deleted() == []
    (cluster.folder / "finish").touch()


def test_status_and_stop_by_name(cluster):
    cluster.plan("wait")
    (cluster.folder / "suspend").touch()
    cluster.launch("--detach", "--name", "mine")
    assert cluster.act("--status", "mine")[:2] == (DONE, "mine: waits in the queue\n")
    assert cluster.act("--stop", "mine")[0] == DONE
    assert cluster.jobsets() == {}
    assert cluster.act("--status", "mine")[:2] == (DONE, "mine: no such job waits or runs\n")


@pytest.mark.slow
def test_a_log_that_breaks_off_is_taken_up_again_and_one_without_an_end_is_left(cluster):
    cluster.plan("wait")
    (cluster.folder / "break-log").touch()
    (cluster.folder / "endless-log").touch()
    launch = cluster.launch(wait=False)
    cluster.wait_until(lambda: any("--since=" in argument for call in cluster.calls("kubectl") for argument in call))
    (cluster.folder / "finish").touch()
    out, err = launch.communicate(timeout=30)
    assert launch.returncode == DONE, err
    assert out.count("host 0 started") == 1
    assert out.count("finished") == 1


def test_faults_that_pass_are_waited_out_and_nothing_is_created_twice(cluster):
    cluster.fail("kubectl get", ("before", "Unable to connect to the server: net/http: TLS handshake timeout"))
    timeout = "[XPK] Task: `Creating Workload` terminated with ERROR `1`: dial tcp: i/o timeout"
    cluster.fail("xpk list", ("before", timeout))
    cluster.fail("xpk create", ("before", timeout), ("after", timeout))
    status, _, err = cluster.launch()
    assert status == DONE, err
    assert "but the job is there" in err
    assert len(cluster.created()) == 2
    assert len(cluster.started()) == 2


def test_a_fault_that_stays_is_told_with_all_that_xpk_said(cluster):
    cluster.fail("xpk create", ("before", "[XPK] no quota for this type\n[XPK] XPK failed, error code 1"))
    status, _, err = cluster.launch()
    assert status == FAILED
    assert "[XPK] no quota for this type" in err
    assert err.splitlines()[-1].endswith("all that it said is above")
    assert len(cluster.created()) == 1


@pytest.mark.slow
def test_build_sends_the_source_tree_with_the_versions_of_this_machine(cluster):
    repository = "us-docker.pkg.dev/p/r/ttt_jax"
    status, _, err = cluster.launch(image=("--build", repository), command=["--config.log.wandb_project=x"])
    assert status == DONE, err
    build, push = cluster.calls("docker")
    image = push[2]
    assert push == ["docker", "push", image]
    assert image.startswith(f"{repository}:tpu-")
    context = build[-1]
    assert build == [
        *("docker", "build", f"--file={context}/launch/Dockerfile", "--target=tpu", "--platform=linux/amd64"),
        f"--build-arg=PYTHON={sys.version_info.major}.{sys.version_info.minor}",
        *("--build-arg=EXTRAS=gcs,wandb", f"--tag={image}", context),
    ]
    assert f"--docker-image={image}" in cluster.created()[0]
    assert (cluster.folder / "constraints").read_text() == versions.constraints(("tpu", "gcs", "wandb"))
    files = set((cluster.folder / "context-files").read_text().splitlines())
    assert {"launch/Dockerfile", "setup.py", "ttt_jax/cli/__init__.py", "configs/quickstart.py"} <= files
    assert not Path(context).exists()


def test_dry_run_does_nothing_and_hides_values_of_variables(cluster):
    status, out, _ = cluster.launch("--dry-run", "--env", "SECRET=s3cret", image=("--build", "gcr.io/p/ttt"))
    assert status == DONE
    assert cluster.calls() == []
    assert "s3cret" not in out
    commands = [line.split()[0] for line in out.splitlines() if not line.startswith("#")]
    assert commands == ["docker", "docker", "xpk"]


def test_refusals(cluster):
    def refused(*options, workdir="gs://bucket/a", config=()):
        command = ["train", "--config", ROOT / "configs/quickstart.py", "--workdir", workdir, *config]
        status, out, err = cluster.ttt("launch", "gke", *options, "--", *command, set=WAITS)
        assert (status, out) == (REFUSED, "")
        assert cluster.calls() == []
        return err.splitlines()[-1]

    assert "--cluster, --tpu-type, --image: missing" in refused()
    assert "--tpu-type, --image: missing" in refused("--cluster=c")
    there = ["--cluster=c", "--tpu-type=v5litepod-8"]
    assert "--image: missing" in refused(*there)
    assert "--image a;id: expected an image" in refused(*there, "--image=a;id")
    assert "--zone $(id): expected letters" in refused(*there, "--zone=$(id)")
    there.append(f"--image={IMAGE}")
    assert "runs/a: the machines are deleted" in refused(*there, workdir="runs/a")
    assert "a folder of this machine" in refused(*there, config=["--config.data.source=data/pile"])
    (cluster.folder / "bin" / "xpk").unlink()
    assert refused(*there) == "ttt launch: xpk: is not installed; pip install xpk"
