"""Test what is special about Cloud TPU: a queue of machines, and a command that only ttt launch restarts."""

import re

import pytest

from ttt_jax.config import ConfigError
from ttt_jax.launch import cloud_tpu, sources
from ttt_jax.launch.tpu_hosts import Host, verdict
from ttt_jax.terminal.stopping import FAILED

FRESH = ["create", "scp", "install", "start", "delete"]
COMMAND = "train --config configs/quickstart.py --workdir gs://bucket/runs/a --config.data.batch_size=8".split()


def verbs(tpu) -> list[str]:
    """Return what was done, in a word each; what only looks is left out."""
    words = []
    for call in tpu.calls():
        verb = call[call.index("tpus") + 2]
        if verb == "ssh":
            script = next(argument for argument in call if argument.startswith("--command="))
            verb = re.search(r"worker\.sh (install|start|status|follow|tail|stop|end) ", script)[1]
        if verb not in ("describe", "status", "follow"):
            words.append(verb)
    return words


def home(tpu, life=1, node="mine", host=0):
    return tpu.folder / "machines" / str(life) / node / str(host)


def test_gcloud_gets_all_options_and_hosts_the_versions_of_this_machine(tpu):
    tpu.kept("cloud", hosts=2)
    out, err = tpu.launch("--spot", "--project", "p", "--env", "WANDB_API_KEY=s3cret")
    assert out == "start 0 of host 0: 0\n"
    assert "mine: ACCEPTED\n" in err
    assert verbs(tpu) == FRESH
    calls = [re.sub("=[0-9a-f]{12}-", "=ID-", " ".join(call[3:])) for call in tpu.calls()]
    where, cache = "--zone=us-west4-a --project=p", tpu.folder / "cache/ttt_jax/launch"
    request = "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite --spot"
    labels = "--labels=ttt-launch=mine,ttt-command=ID-1-v5litepod-8"
    assert f"queued-resources create mine {where} --node-id=mine {request} {labels} --async --quiet" in calls
    assert f"tpu-vm scp {cache}/mine.tar.gz {cache}/mine.env mine: --worker=all {where} --quiet" in calls
    ssh = f"tpu-vm ssh mine --worker=all {where} --quiet --command="
    assert sum(call.startswith(ssh) and bool(re.search(r"\.sh (install|start) ", call)) for call in calls) == 2
    assert calls[-1] == f"queued-resources delete mine {where} --force --quiet"
    assert not (cache / "mine.env").exists()
    for host in (0, 1):
        assert (home(tpu, host=host) / "ttt-launch/mine/env").stat().st_mode & 0o777 == 0o600
    assert [(each["host"], each["argv"]) for each in tpu.started()] == [("mine/0", COMMAND), ("mine/1", COMMAND)]
    (source,) = (home(tpu) / "ttt-launch/mine").glob("source-*")
    venv, packages = tpu.uv()[:2]
    assert venv[:-1] == ["venv", "--quiet", "--allow-existing", "--python", sources.PYTHON]
    assert packages[-1] == f"{source}[tpu,gcs]"
    assert (source / "launch-constraints.txt").read_text() == sources.constraints(("tpu", "gcs"))


def test_several_slices(tpu):
    tpu.launch("--slices", "2", "--accelerator", "v5litepod-4")
    (create,) = tpu.calls("create")
    assert {"--node-count=2", "--node-prefix=mine"} <= set(create)
    assert not any(argument.startswith("--node-id") for argument in create)
    started = sorted((each["host"], each["argv"]) for each in tpu.started())
    assert started == [("mine-0/0", COMMAND), ("mine-1/0", COMMAND)]
    assert sorted(verbs(tpu)[1:-1]) == sorted(["scp", "install", "start"] * 2)


# ---- The queue

FULL = ["ACCEPTED", 'FAILED:There is no more capacity in the zone "us-west4-a"']


@pytest.mark.parametrize(
    ("lives", "options", "status", "said", "done"),
    [
        ([["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]], (), 0, "PROVISIONING\n", FRESH),
        ([["WAITING_FOR_RESOURCES"]], ("--timeout", "0.3s"), 75, "after 0:0., which is the --timeout", FRESH[::4]),
        ([["ACCEPTED", "FAILED:Quota limit 'T' exceeded"]], (), 1, "cannot be had: Quota limit 'T' exc", FRESH[::4]),
        ([FULL, FULL, ["ACTIVE"]], (), 0, "no more capacity .*; asks anew", FRESH[::4] * 2 + FRESH),
        ([["ACTIVE", "SUSPENDED"], ["ACTIVE"]], (), 0, "restart 1", ["create", "scp", "delete", *FRESH]),
    ],
)
def test_waits_in_the_queue_of_google(tpu, lives, options, status, said, done):
    tpu.kept("cloud", lives=lives)
    _, err = tpu.launch(*options, ends=status)
    assert verbs(tpu) == done
    assert re.search(said, err)
    assert tpu.calls("delete")
    assert not tpu.kept("jobs")


@pytest.mark.parametrize(
    ("call", "fault", "done"),
    [
        ("create", "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", ["create"]),
        ("create", "RESOURCE_EXHAUSTED: Quota limit 'T' has been exceeded.", ["create"]),
        ("create", "INVALID_ARGUMENT: Cloud TPU received a bad request.", ["create"]),
        ("scp", "ERROR: Connection reset by peer", ["create", *["scp"] * 6, "delete"]),
    ],
)
def test_final_faults_end_the_launch(tpu, call, fault, done):
    tpu.fail(f"gcloud {call}", *[("before", fault)] * 9)
    _, err = tpu.launch(ends=FAILED)
    assert verbs(tpu) == done
    assert fault in err.splitlines()[-1]


# ---- Ends


@pytest.mark.parametrize(
    ("plan", "status", "done", "said"),
    [
        ([75, {"0": 134, "1": 75}, 0], 0, [*FRESH[:3], *["start"] * 3, "delete"], "ended with status 75; restart 1 of"),
        ([{"0": "wait", "1": "suspend"}, 0], 0, FRESH * 2, "mine: the machines are SUSPENDING; restart 1 of 100"),
        ([{"0": "wait", "1": "preempt"}, 0], 0, FRESH * 2, "mine: mine is PREEMPTED; restart 1 of 100"),
        ([137], 75, [*FRESH[:3], *["start"] * 3, "delete"], "by SIGKILL; so it ended 3 times in a row in less than"),
        ([{"0": 134, "1": 2}], 2, [*FRESH[:4], "tail", "delete"], r"worker 1 of mine .* 2\nstart 0 of host 1: 2\n$"),
        # A machine that was started anew has neither a status nor a supervisor of the command.
        (["lost", 0], 0, [*FRESH[:4], *FRESH[1:]], "was started anew; restart 1"),
        (["offline"], 0, FRESH, "cannot be reached, and will be tried again"),
        (["delete"], 130, FRESH[:-1], "was deleted by somebody else"),
    ],
)
def test_the_end_of_a_run_decides_what_is_done(tpu, monkeypatch, plan, status, done, said):
    monkeypatch.setattr("ttt_jax.launch.tpu.MOST_SHORT_RUNS", 3)
    monkeypatch.setattr("ttt_jax.launch.tpu.UNREACHABLE_LIMIT", 0)
    tpu.plan(*plan)
    tpu.kept("cloud", hosts=1 + any(isinstance(hosts, dict) for hosts in plan))
    out, err = tpu.launch(ends=status)
    assert verbs(tpu) == done
    assert re.search(said, err)
    assert "host 1" not in out


def test_hosts_that_do_not_end_are_ended(tpu, monkeypatch):
    monkeypatch.setattr("ttt_jax.launch.tpu.OTHERS_LIMIT", 0.2)
    tpu.plan({"0": 1, "1": "wait"})
    tpu.kept("cloud", hosts=2)
    tpu.launch(ends=FAILED)
    assert verbs(tpu) == ["create", "scp", "install", "start", "end", "delete"]


def test_machines_that_are_kept_are_used_again(tpu):
    _, err = tpu.launch("--keep")
    assert verbs(tpu) == FRESH[:-1]
    assert "gcloud compute tpus queued-resources delete mine --zone=us-west4-a --force --quiet" in err
    tpu.fail("gcloud describe", ("before", "ERROR: NOT_FOUND: not there yet"), ("before", "ERROR: NOT_FOUND"))
    tpu.fail("gcloud create", ("before", "HTTPError 504: deadline"))  # it was created, though gcloud lost the answer
    tpu.launch()
    assert verbs(tpu) == [*FRESH[:-1], *FRESH]
    assert len(tpu.uv()) == 2  # of the first time: nothing has changed


# ---- Hosts together, and accelerator types


def host(status, when=0, state="exited"):
    return Host("node", str(when), "run", state, status, when)


@pytest.mark.parametrize(
    ("statuses", "together", "decides"),
    [
        ([0, 0], 0, None),
        ([0, 75], 75, 1),
        ([75, 134], 75, 0),
        ([137, 0], 75, 0),  # killed
        ([75, 1, 134], 1, 1),  # the failure of one ends the others
        ([2, 1], 2, 0),
        ([75, 130], 130, 1),
        ([127, 75], 127, 0),
        ([0, None], 75, 1),  # started anew
    ],
)
def test_verdict(statuses, together, decides):
    hosts = [host(status, when) for when, status in enumerate(statuses)]
    assert verdict(hosts[::-1]) == (together, None if decides is None else hosts[decides])


@pytest.mark.parametrize(
    ("name", "devices", "several", "image"),
    [
        ("v5litepod-256", 256, True, "v2-alpha-tpuv5-lite"),
        ("v5litepod-8", 8, False, "v2-alpha-tpuv5-lite"),
        ("v4-32", 16, True, "tpu-ubuntu2204-base"),
        ("v5p-128", 64, True, "v2-alpha-tpuv5"),
        ("v6e-8", 8, False, "v2-alpha-tpuv6e"),
        ("v3-8", 8, False, "tpu-ubuntu2204-base"),  # a device of JAX is a core there
    ],
)
def test_accelerators(name, devices, several, image):
    assert cloud_tpu.parse(name) == (name, devices, several, image)


@pytest.mark.parametrize("name", ["", "v5e-256", "v4-7", "v5litepod", "v5litepod-0", "v9-8", "V4-8", "v4-8 --spot"])
def test_unknown_accelerators(name):
    with pytest.raises(ConfigError, match="--accelerator"):
        cloud_tpu.parse(name)
