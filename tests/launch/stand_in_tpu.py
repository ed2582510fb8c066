"""Stand for Cloud TPU on one machine: gcloud, whose ssh runs commands in folders of this machine.

"cloud.json" in $STAND_IN has what shall happen: the states that describe finds after each creation, the last one for
ever (lives), the state of nodes (node), how many hosts a node has (hosts), until when there is no network (offline).
"resource.json" is the queued resource that exists; machines/LIFE/NODE/HOST are the home folders of hosts, and each
creation is a new life.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from stand_in import HERE, fail, kept, options_of

RESOURCE = HERE / "resource.json"
CLOUD = {"lives": [["ACCEPTED", "ACTIVE"]], "life": 0, "node": "READY", "hosts": 1, "offline": 0}


def gcloud(arguments):
    options, words = options_of(arguments)
    with kept("cloud", CLOUD) as cloud:
        cloud.update({**CLOUD, **cloud})
    if time.time() < cloud["offline"]:
        return fail("ERROR: (gcloud) Network is unreachable")
    compute, tpus, kind, verb, *names = [word for word in words if word != "alpha"]
    assert (compute, tpus) == ("compute", "tpus")
    return (queued_resources if kind == "queued-resources" else tpu_vm)(cloud, verb, names, options)


def queued_resources(cloud, verb, names, options):
    if verb == "create":
        if RESOURCE.exists():
            return fail("ERROR: (gcloud) ALREADY_EXISTS: Resource already exists")
        assert "async" in options
        labels = dict(pair.split("=") for pair in options["labels"].split(","))
        several = [f"{options.get('node-prefix')}-{i}" for i in range(int(options.get("node-count", 0)))]
        life, lives = cloud["life"], cloud["lives"]
        states = lives[min(life, len(lives) - 1)]
        made = {"labels": labels, "nodes": several or [options["node-id"]], "states": states, "life": life + 1}
        RESOURCE.write_text(json.dumps(made))
        with kept("cloud", CLOUD) as cloud:
            cloud.update(life=life + 1, node="READY")
        return 0
    if not RESOURCE.exists():
        return fail(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) NOT_FOUND: '{names[0]}' was not found")
    if verb == "delete":
        assert {"force", "quiet"} <= options.keys()
        RESOURCE.unlink()
        kill_commands()
        return 0
    assert verb == "describe"
    resource = json.loads(RESOURCE.read_text())
    state, _, message = resource["states"][0].partition(":")
    if len(resource["states"]) > 1:
        resource["states"].pop(0)
        RESOURCE.write_text(json.dumps(resource))
    specs = [{"nodeId": node, "node": {"labels": resource["labels"]}} for node in resource["nodes"]]
    about = {"state": state, "failedData": {"error": {"message": message}}}
    print(json.dumps({"name": f"projects/p/x/{names[0]}", "state": about, "tpu": {"nodeSpec": specs}}))
    return 0


def kill_commands():
    """End what runs on machines, as their deletion does."""
    for pid in HERE.glob("machines/*/*/*/ttt-launch/*/runs/*/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def tpu_vm(cloud, verb, names, options):
    if not RESOURCE.exists() or json.loads(RESOURCE.read_text())["states"][0] in ("SUSPENDED", "SUSPENDING"):
        return fail("ERROR: (gcloud) NOT_FOUND: the node was not found")
    resource = json.loads(RESOURCE.read_text())
    if verb == "describe":
        print(json.dumps({"name": names[0], "state": cloud["node"], "labels": resource["labels"]}))
        return 0
    if cloud["node"] != "READY":
        return fail(f"ERROR: (gcloud) TPU is in state {cloud['node']}")
    node = names[-1].removesuffix(":")
    assert node in resource["nodes"]
    everyone = [str(i) for i in range(cloud["hosts"])]
    workers = everyone if options["worker"] == "all" else [options["worker"]]
    assert set(workers) <= set(everyone)
    status = 0
    for worker in workers:
        home = HERE / "machines" / str(resource["life"]) / node / worker
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
# somebody else deletes them; this machine has no network for a second; the host is started anew.


def suspend():
    resource = json.loads(RESOURCE.read_text())
    RESOURCE.write_text(json.dumps({**resource, "states": ["SUSPENDING", "SUSPENDED"]}))


def preempt(**changes):
    with kept("cloud", CLOUD) as cloud:
        cloud.update(changes or {"node": "PREEMPTED"})


def delete():
    RESOURCE.unlink()


def offline():
    preempt(offline=time.time() + 1)
    time.sleep(2)
    sys.exit(0)


def lost():
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
