"""Stand for Cloud TPU on one machine: gcloud, whose ssh runs commands in folders of this machine.

"cloud.json" in $STAND_IN has what shall happen: the states that describe finds after each creation, the last one for
ever (lives), how many hosts a node has (hosts), until when there is no network (offline). The job NAME is the queued
resource that exists; machines/LIFE/NODE/HOST are the home folders of hosts, and each creation is a new life.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from stand_in import HERE, fail, forget, job, kept, new_number, options_of

NAME = "mine"
CLOUD = {"lives": [["ACCEPTED", "ACTIVE"]], "hosts": 1, "offline": 0}


def gcloud(arguments):
    options, words = options_of(arguments)
    with kept("cloud", CLOUD) as cloud:
        cloud = {**CLOUD, **cloud}
    if time.time() < cloud["offline"]:
        return fail("ERROR: (gcloud) Network is unreachable")
    compute, tpus, kind, verb, *names = [word for word in words if word != "alpha"]
    assert (compute, tpus) == ("compute", "tpus")
    if kind == "tpu-vm":
        return tpu_vm(cloud, verb, names, options)
    assert names == [NAME]
    known = job(NAME)
    if verb == "create":
        if known:
            return fail("ERROR: (gcloud) ALREADY_EXISTS: Resource already exists")
        assert "async" in options
        labels = dict(pair.split("=") for pair in options["labels"].split(","))
        several = [f"{options.get('node-prefix')}-{i}" for i in range(int(options.get("node-count", 0)))]
        life, lives = int(new_number(1)), cloud["lives"]
        states = lives[min(life, len(lives)) - 1]
        job(NAME, labels=labels, nodes=several or [options["node-id"]], node="READY", states=states, life=life)
    elif not known:
        return fail(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) NOT_FOUND: '{NAME}' was not found")
    elif verb == "delete":
        assert {"force", "quiet"} <= options.keys()
        delete()
        for pid in HERE.glob("machines/*/*/*/ttt-launch/*/runs/*/pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
    else:
        assert verb == "describe"
        state, _, message = known["states"][0].partition(":")
        job(NAME, states=known["states"][1:] or known["states"])
        specs = [{"nodeId": node, "node": {"labels": known["labels"]}} for node in known["nodes"]]
        print(
            json.dumps(
                {"state": {"state": state, "failedData": {"error": {"message": message}}}, "tpu": {"nodeSpec": specs}}
            )
        )
    return 0


def tpu_vm(cloud, verb, names, options):
    known = job(NAME)
    if not known or known["states"][0] in ("SUSPENDED", "SUSPENDING"):
        return fail("ERROR: (gcloud) NOT_FOUND: the node was not found")
    if verb == "describe":
        print(json.dumps({"name": names[0], "state": known["node"], "labels": known["labels"]}))
        return 0
    if known["node"] != "READY":
        return fail(f"ERROR: (gcloud) TPU is in state {known['node']}")
    node = names[-1].removesuffix(":")
    assert node in known["nodes"]
    workers = map(str, range(cloud["hosts"])) if options["worker"] == "all" else [options["worker"]]
    status = 0
    for worker in workers:
        home = HERE / "machines" / str(known["life"]) / node / worker
        home.mkdir(parents=True, exist_ok=True)
        if verb == "scp":
            for source in map(Path, names[:-1]):
                assert source.suffix != ".env" or source.stat().st_mode & 0o777 == 0o600
                (home / source.name).write_bytes(source.read_bytes())
            continue
        path = f"{HERE / 'remote'}:/usr/bin:/bin"
        environment = {"HOME": str(home), "PATH": path, "STAND_IN": str(HERE)}
        # As sshd does: one string, for the shell of the user.
        shell = ["bash", "-c", options["command"]]
        done = subprocess.Popen(shell, cwd=home, env=environment, stdin=subprocess.DEVNULL, process_group=0)
        signal.signal(signal.SIGTERM, lambda *_, group=done.pid: os.killpg(group, signal.SIGHUP))
        status = done.wait() or status
        with contextlib.suppress(ProcessLookupError):
            os.killpg(done.pid, signal.SIGHUP)  # the connection is closed
    return status


def curl(arguments):
    """Print the metadata of a host."""
    assert arguments[-1].endswith("/computeMetadata/v1/instance/attributes/agent-worker-number")
    print(Path.home().name, end="")


# What the launched command may do to its machines: Google takes them, as the queued resource or only the node shows;
# somebody else deletes them; this machine has no network for a while; the host is started anew.


def suspend():
    job(NAME, states=["SUSPENDING", "SUSPENDED"])


def preempt():
    job(NAME, node="PREEMPTED")


def delete():
    forget(NAME)


def offline():
    with kept("cloud", {}) as cloud:
        cloud["offline"] = time.time() + 0.5
    time.sleep(1)
    sys.exit(0)


def lost():
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
