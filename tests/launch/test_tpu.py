"""``ttt launch tpu`` against a stand-in of gcloud whose ssh runs the real worker.sh in folders of this machine."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile

import pytest
from clouds import JOB, TRAIN

from ttt_jax import cli
from ttt_jax.launch import tpu_run

pytestmark = pytest.mark.slow

THERE = ("train", "--config", "configs/quickstart.py", *TRAIN[3:])  # the config by its path in the tree that is sent


def after(call: list[str], *words: str) -> list[str]:
    assert call[: len(words) + 2] == ["compute", "tpus", *words]
    return call[len(words) + 2 :]


def test_a_run_that_succeeds(cloud, launch, capfd, tmp_path):
    cloud.write(hosts=2)
    assert launch("--spot", "--project", "p") == 0
    out, err = capfd.readouterr()
    assert out == "start 0 on host 0 in source-\nline of host 0: leaves with 0\n"
    assert f"{JOB}: ACCEPTED\n" in err
    assert cloud.verbs() == ["create", "scp", "install", "start", "delete"]
    assert cloud.resource is None

    calls = [c for c in cloud.calls() if "describe" not in c and not any("status" in a or " follow " in a for a in c)]
    create, scp, install, start, delete = calls
    where = ["--zone=us-west4-a", "--project=p"]
    request = ["--node-id=" + JOB, "--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    label = next(a for a in create if a.startswith("--labels="))
    assert re.fullmatch(rf"--labels=ttt-launch={JOB},ttt-command=[0-9a-f]{{12}}-1-v5litepod-8", label)
    assert after(create, "queued-resources", "create") == [JOB, *where, *request, label, "--async", "--quiet"]
    archive = tmp_path / "cache" / "ttt_jax" / "launch" / f"{JOB}.tar.gz"
    assert after(scp, "tpu-vm", "scp") == [str(archive), f"{JOB}:", "--worker=all", *where, "--quiet"]
    for ssh in (install, start):
        assert after(ssh, "tpu-vm", "ssh")[:-1] == [JOB, "--worker=all", *where, "--quiet"]
    assert after(delete, "queued-resources", "delete") == [JOB, *where, "--force", "--quiet"]

    python = ".".join(map(str, sys.version_info[:2]))
    for host in range(2):
        home = cloud.home(host)
        assert cloud.argv(host=host) == list(THERE)
        venv, packages = map(json.loads, (home / "uv.jsonl").read_text().splitlines())
        job = f"{home}/ttt-launch/{JOB}"
        assert venv == ["venv", "--quiet", "--allow-existing", "--python", python, f"{job}/venv"]
        (source,) = (home / "ttt-launch" / JOB).glob("source-*")
        assert packages[-1] == f"{source}[tpu,gcs]"
        assert packages[packages.index("--constraint") + 1] == f"{source}/launch-constraints.txt"
        sent = dict(line.split("==") for line in (source / "launch-constraints.txt").read_text().splitlines())
        for name in "jax jaxlib flax optax orbax-checkpoint grain tensorstore ml-collections numpy gcsfs".split():
            assert sent[name] == importlib.metadata.version(name)
        with tarfile.open(archive) as tar:
            assert set(tar.getnames()) == {
                "configs/quickstart.py",
                "launch/worker.sh",
                "launch-constraints.txt",
                "setup.py",
            }


# ---- The queue


def test_waits_through_all_states(cloud, launch, capfd):
    states = ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud.write(lives=[states])
    assert launch() == 0
    said = [line.removeprefix(f"{JOB}: ") for line in capfd.readouterr().err.splitlines()]
    assert [line for line in said if line.isupper()] == [*states[:3], "PROVISIONING"]
    assert cloud.verbs() == ["create", "scp", "install", "start", "delete"]


def test_gives_up_waiting(cloud, launch, capfd):
    cloud.write(lives=[["WAITING_FOR_RESOURCES"]])
    assert launch("--timeout", "0.3s") == 75
    assert re.search("WAITING_FOR_RESOURCES after 0:0., which is the --timeout", capfd.readouterr().err)
    assert cloud.verbs() == ["create", "delete"]
    assert cloud.resource is None


def test_a_request_that_fails(cloud, launch, capfd):
    cloud.write(lives=[["ACCEPTED", "FAILED:Quota limit 'TPUV5sLitepod' has been exceeded."]])
    assert launch() == 1
    assert "cannot be had: Quota limit 'TPUV5sLitepod' has been exceeded." in capfd.readouterr().err
    assert cloud.verbs() == ["create", "delete"]


def test_no_capacity_is_no_failure(cloud, launch):
    full = ["ACCEPTED", 'FAILED:There is no more capacity in the zone "us-west4-a"']
    cloud.write(lives=[full, full, ["ACTIVE"]])
    assert launch() == 0
    assert cloud.verbs() == [*["create", "delete"] * 2, "create", "scp", "install", "start", "delete"]


# ---- Faults that pass, and faults that do not


def test_transient_faults_are_tried_again(cloud, launch, capfd):
    refused = "ssh: connect to host 1.2.3.4 port 22: Connection refused"
    failures = {
        "create": ["ERROR: (gcloud) HTTPError 503: The service is currently unavailable.", ""],
        "describe": ["ERROR: (gcloud) UNAVAILABLE: try later", "ERROR: (gcloud) INTERNAL: oops"],
        "scp": [
            "",
            f"{refused}\nERROR: (gcloud.compute.tpus.tpu-vm.scp) [/usr/bin/scp] exited with return code [255].",
        ],
        "ssh": [refused],
        "delete": ["ERROR: FAILED_PRECONDITION: DeleteQueuedResource is not supported when state is PROVISIONING"],
    }
    cloud.write(failures=failures)
    assert launch() == 0
    assert cloud.verbs() == ["create", "create", "scp", "install", "install", "start", "delete", "delete"]
    assert "HTTPError 503: The service is currently unavailable.; again in 0 s (1 of 5)" in capfd.readouterr().err


@pytest.mark.parametrize(
    "fault",
    [
        "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
        "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 0",
        "ERROR: (gcloud) INVALID_ARGUMENT: Cloud TPU received a bad request.",
    ],
)
def test_others_are_not(cloud, launch, capfd, fault):
    cloud.write(failures={"create": [fault] * 9})
    assert launch() == 1
    assert cloud.verbs() == ["create"]
    assert fault in capfd.readouterr().err.splitlines()[-1]


def test_a_fault_that_does_not_pass(cloud, launch, capfd):
    cloud.write(failures={"scp": ["ERROR: Connection reset by peer"] * 99})
    assert launch() == 1
    assert cloud.verbs() == ["create", *["scp"] * 6, "delete"]


def test_created_though_gcloud_lost_the_answer(cloud, launch):
    """The second attempt is told that it exists already."""
    assert launch("--keep") == 0
    made = cloud.resource
    (cloud.folder / "calls.jsonl").unlink()
    cloud.write(failures={"describe": ["ERROR: NOT_FOUND: not there yet"], "create": ["HTTPError 504: deadline"]})
    assert launch() == 0
    assert cloud.verbs() == ["create", "create", "scp", "install", "start", "delete"]
    assert made is not None


# ---- Ends


def test_status_75_starts_again_on_the_same_machines(cloud, launch, capfd):
    cloud.write(runs=[75, {"0": 134, "1": 75}, 0], hosts=2)
    assert launch() == 0
    assert cloud.verbs() == ["create", "scp", "install", "start", "start", "start", "delete"]
    for start in range(3):
        for host in range(2):
            assert cloud.argv(start, host=host) == list(THERE)
    out, err = capfd.readouterr()
    assert re.findall("start . on host .", out) == [f"start {i} on host 0" for i in range(3)]
    assert "ended with status 75; restart 1 of 100" in err


@pytest.mark.parametrize("how", ["suspend", "preempt"])
def test_lost_machines_are_replaced(cloud, launch, capfd, how):
    cloud.write(runs=[{"0": "wait", "1": how}, 0], hosts=2)
    assert launch("--spot") == 0
    fresh = ["create", "scp", "install", "start", "delete"]
    assert cloud.verbs() == fresh * 2
    assert cloud.argv(0, life=1) == cloud.argv(1, life=2) == list(THERE)
    creations = [call for call in cloud.calls() if "create" in call]
    assert creations[0] == creations[1]
    said = {"suspend": "the machines are SUSPENDING", "preempt": f"{JOB} is PREEMPTED"}[how]
    assert f"{JOB}: {said}; restart 1 of 100" in capfd.readouterr().err


def test_lost_while_installing(cloud, launch):
    cloud.write(lives=[["ACTIVE", "SUSPENDED"], ["ACTIVE"]])
    assert launch() == 0
    assert cloud.verbs() == ["create", "scp", "delete", "create", "scp", "install", "start", "delete"]


def test_restarts_are_limited(cloud, launch, capfd):
    cloud.write(runs=[75])
    assert launch("--restarts", "1") == 75
    assert cloud.verbs() == ["create", "scp", "install", "start", "start", "delete"]
    assert "no more restarts" in capfd.readouterr().err


def test_a_run_that_dies_at_once_again_and_again(cloud, launch, capfd, monkeypatch):
    monkeypatch.setattr(tpu_run, "MOST_SHORT_RUNS", 3)
    cloud.write(runs=[137])
    assert launch() == 75
    assert cloud.verbs().count("start") == 3
    assert "was ended by SIGKILL; so it ended 3 times in a row in less than 180 s each" in capfd.readouterr().err


@pytest.mark.parametrize("status", [1, 2])
def test_a_failure_is_passed_on_with_its_log(cloud, launch, capfd, status):
    cloud.write(runs=[{"0": 134, "1": status}], hosts=2)
    assert launch() == status
    out, err = capfd.readouterr()
    assert f"line of host 1: leaves with {status}" not in out
    assert err.endswith(
        f"{JOB}: worker 1 of {JOB} ended with status {status}\n"
        f"start 0 on host 1 in source-\nline of host 1: leaves with {status}\n"
    )
    assert cloud.verbs() == ["create", "scp", "install", "start", "tail", "delete"]
    assert cloud.resource is None


def test_hosts_that_do_not_end_are_ended(cloud, launch, monkeypatch):
    monkeypatch.setattr(tpu_run, "OTHERS_LIMIT", 0.2)
    cloud.write(runs=[{"0": 1, "1": "wait"}], hosts=2)
    assert launch() == 1
    assert cloud.verbs() == ["create", "scp", "install", "start", "end", "delete"]


def test_a_host_that_was_started_anew(cloud, launch, capfd):
    """The command and what watches over it are gone, without a status."""
    cloud.write(runs=["lost", 0])
    assert launch() == 0
    assert cloud.verbs().count("start") == 2
    assert "was started anew; restart 1" in capfd.readouterr().err


def test_without_a_network_for_a_while(cloud, launch, capfd, monkeypatch):
    """However long that is: the command goes on."""
    monkeypatch.setattr(tpu_run, "UNREACHABLE_LIMIT", 0)
    cloud.write(runs=["offline"])
    assert launch() == 0
    assert cloud.verbs() == ["create", "scp", "install", "start", "delete"]
    assert "cannot be reached, and will be tried again" in capfd.readouterr().err


def test_keeps_the_machines(cloud, launch, capfd):
    assert launch("--keep") == 0
    assert cloud.verbs() == ["create", "scp", "install", "start"]
    assert (
        f"gcloud compute tpus queued-resources delete {JOB} --zone=us-west4-a --force --quiet" in capfd.readouterr().err
    )
    assert launch("--keep") == 0
    assert cloud.verbs().count("create") == 1
    assert cloud.verbs().count("start") == 2
    assert (
        len((cloud.home() / "uv.jsonl").read_text().splitlines()) == 2
    )  # those of the first time: nothing has changed


# ---- Whose it is


@pytest.mark.parametrize("options", [(), ("--stop",)])
@pytest.mark.parametrize("state", ["ACTIVE", "SUSPENDED"])
def test_what_it_did_not_create_is_left_alone(cloud, launch, capfd, state, options):
    foreign = {"labels": {"team": "other"}, "nodes": [JOB], "states": [state], "life": 0}
    (cloud.folder / "resource.json").write_text(json.dumps(foreign))
    command = ["launch", "tpu", "--zone", "z", "--name", JOB, *options]
    assert (cli.main(command) if options else launch()) == 1
    assert "did not create" in capfd.readouterr().err
    assert cloud.verbs() == []
    assert cloud.resource == foreign


def test_another_command_of_the_same_name(cloud, launch, capfd):
    assert launch("--name", "a", "--detach") == 0
    before = cloud.resource
    assert launch("--name", "a", command=(*TRAIN, "--config.seed=1")) == 1
    assert "a: runs another command, or on other machines" in capfd.readouterr().err
    assert launch("--name", "a", accelerator="v5litepod-4") == 1
    assert (cloud.verbs().count("create"), cloud.verbs().count("delete"), cloud.resource) == (1, 0, before)


def test_deleted_by_somebody_else(cloud, launch, capfd):
    cloud.write(runs=["delete"])
    assert launch() == 130
    assert "was deleted by somebody else" in capfd.readouterr().err
    assert cloud.verbs() == ["create", "scp", "install", "start"]


# ---- Leaving, coming back, stopping


def test_detached_and_followed_again(cloud, launch, capfd):
    cloud.write(seconds=3)
    assert launch("--detach") == 0
    assert "runs by itself" in capfd.readouterr().err
    assert cloud.verbs() == ["create", "scp", "install", "start"]
    assert launch() == 0
    out, err = capfd.readouterr()
    assert out == "start 0 on host 0 in source-\nline of host 0: leaves with 0\n"
    assert "runs already" in err
    assert cloud.verbs() == ["create", "scp", "install", "start", "delete"]


def test_status_and_stop(cloud, launch, capfd):
    cloud.write(runs=["wait"], hosts=2)
    assert launch("--detach") == 0
    act = ["launch", "tpu", "--zone", "z", "--name", JOB]
    capfd.readouterr()
    assert cli.main([*act, "--status"]) == 0
    lines = [f"{JOB}: ACTIVE", *(f"  worker {i} of {JOB}: running" for i in range(2)), "start 0 on host 0 in source-"]
    assert capfd.readouterr().out.splitlines() == lines
    homes = [cloud.home(host) for host in range(2)]
    assert cli.main([*act, "--stop"]) == 0
    for home in homes:
        (log,) = home.glob("ttt-launch/*/runs/*/log")
        assert log.read_text().endswith("saved\n")
    assert cloud.verbs()[-2:] == ["stop", "delete"]
    assert cloud.resource is None
    capfd.readouterr()
    assert cli.main([*act, "--status"]) == 0
    assert capfd.readouterr().out.startswith(f"{JOB}: no such job")


# ---- What arrives


NASTY = """a 'b' "c" $(touch BAD) `touch BAD`; touch BAD & \\ * ~ {x,y} $HOME !!  ü\ttab
line two"""


def test_every_value_arrives_as_it_is(cloud, launch):
    command = (*TRAIN[:3], "--workdir", f"gs://bucket/{NASTY}", *TRAIN[5:], f"--config.data.tokenizer={NASTY}")
    assert launch("--env", f"A={NASTY}", "--env", "CLOUD", "--name", "nasty", command=command) == 0
    assert cloud.argv() == ["train", "--config", "configs/quickstart.py", *command[3:]]
    environment = json.loads((cloud.home() / "environment-0.json").read_text())
    assert (environment["A"], environment["CLOUD"]) == (NASTY, str(cloud.folder))
    assert not list(cloud.folder.rglob("BAD"))


def test_secrets_are_not_shown(cloud, launch, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    assert launch("--env", "WANDB_API_KEY", "--dry-run") == 0
    assert launch("--env", "WANDB_API_KEY") == 0
    assert "s3cret" not in "".join(capfd.readouterr())
    assert "s3cret" not in json.dumps(cloud.calls())
    assert not list((tmp_path / "cache").rglob("*.env"))
    home = cloud.home()
    assert json.loads((home / "environment-0.json").read_text())["WANDB_API_KEY"] == "s3cret"
    (kept,) = [
        path
        for path in home.rglob("*")
        if path.is_file() and b"s3cret" in path.read_bytes() and path.name != "environment-0.json"
    ]
    assert kept.stat().st_mode & 0o777 == 0o600


def test_several_slices(cloud, launch):
    assert launch("--slices", "2", accelerator="v5litepod-4") == 0
    create = next(call for call in cloud.calls() if "create" in call)
    assert {"--node-count=2", f"--node-prefix={JOB}", "--accelerator-type=v5litepod-4"} <= set(create)
    assert not any(argument.startswith("--node-id") for argument in create)
    for node in (f"{JOB}-0", f"{JOB}-1"):
        assert cloud.argv(node=node) == list(THERE)
    assert sorted(cloud.verbs()[1:-1]) == sorted(["scp", "install", "start"] * 2)


def test_dry_run_prints_what_can_be_run_by_hand(cloud, launch, capfd):
    command = (*TRAIN, "--config.data.tokenizer=it's $HOME")
    cloud.write(lives=[["ACTIVE"]])
    assert launch("--dry-run", command=command) == 0
    printed = capfd.readouterr().out
    assert cloud.calls() == []
    done = subprocess.run(["bash", "-euo", "pipefail"], input=printed, text=True, capture_output=True, check=True)
    assert "line of host 0: leaves with 0" in done.stdout
    assert cloud.verbs() == ["create", "scp", "install", "start", "delete"]
    assert cloud.argv() == [*THERE, command[-1]]
    by_hand = cloud.calls()
    assert launch(command=command) == 0

    def comparable(calls):
        return [
            re.sub(r"\d{8}T\d{6}-\w{4}", "RUN", " ".join(c))
            for c in calls
            if "describe" not in c and "status" not in c[-1]
        ]

    assert comparable(by_hand) == comparable(cloud.calls()[len(by_hand) :])
