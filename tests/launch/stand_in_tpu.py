"""Programs that stand in for those of others, as scripts to be put first on PATH. This file is all of them; its name
says which one it is. They keep what they know in the folder $CLOUD:

  script.json   what shall happen: see Cloud in conftest.py
  calls.jsonl   the arguments of every gcloud, as a list, in order
  resource.json the queued resource that exists, if one does
  machines/     LIFE/NODE/WORKER: the home folders of hosts; each creation is a new life
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

cloud = Path(os.environ["CLOUD"])
script = json.loads((cloud / "script.json").read_text())


def taken(name, default):
    """The next entry of a list of the script; each is taken once, and the last one again and again."""
    count = cloud / f"{name}.count"
    n = len(count.read_text()) if count.exists() else 0
    with count.open("a") as file:
        file.write("|")
    entries = script.get(name) or [default]
    return entries[min(n, len(entries) - 1)]


def replace(path, **changes):
    path.with_suffix(".new").write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    path.with_suffix(".new").rename(path)


def fail(text, status=1):
    print(text, file=sys.stderr)
    sys.exit(status)


def gcloud(arguments):
    with (cloud / "calls.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    if time.time() < script.get("offline_until", 0):
        fail("ERROR: (gcloud) Network is unreachable")
    arguments = [a for a in arguments if a != "alpha"]
    assert arguments[:2] == ["compute", "tpus"]
    kind, verb, *rest = arguments[2:]
    options = dict(a.lstrip("-").partition("=")[::2] for a in rest if a.startswith("--"))
    names = [a for a in rest if not a.startswith("--")]
    failures = script["failures"].get(verb, [])
    count = cloud / f"failed-{verb}"
    n = len(count.read_text()) if count.exists() else 0
    if n < len(failures):
        count.write_text("|" * (n + 1))
        if failures[n]:
            fail(failures[n])
    {"queued-resources": queued_resources, "tpu-vm": tpu_vm}[kind](verb, names, options)


def queued_resources(verb, names, options):
    path = cloud / "resource.json"
    if verb == "create":
        if path.exists():
            fail("ERROR: (gcloud) ALREADY_EXISTS: Resource already exists")
        assert "async" in options
        labels = dict(pair.split("=") for pair in options["labels"].split(","))
        if "node-count" in options:
            nodes = [f"{options['node-prefix']}-{i}" for i in range(int(options["node-count"]))]
        else:
            nodes = [options["node-id"]]
        states = taken("lives", ["ACCEPTED", "ACTIVE"])
        life = len((cloud / "lives.count").read_text())
        path.write_text(json.dumps({"labels": labels, "nodes": nodes, "states": states, "life": life}))
        replace(cloud / "script.json", node="READY")
        return
    if not path.exists():
        fail(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) NOT_FOUND: Resource '{names[0]}' was not found")
    if verb == "delete":
        assert {"force", "quiet"} <= options.keys()
        path.unlink()
        kill_commands()
        return
    assert verb == "describe"
    resource = json.loads(path.read_text())
    state = resource["states"][0]
    if len(resource["states"]) > 1:
        resource["states"].pop(0)
        path.write_text(json.dumps(resource))
    about = {"state": state}
    if ":" in state:
        about = {"state": state.split(":")[0], "failedData": {"error": {"message": state.split(":")[1]}}}
    specs = [{"nodeId": node, "node": {"labels": resource["labels"]}} for node in resource["nodes"]]
    print(json.dumps({"name": f"projects/p/x/{names[0]}", "state": about, "tpu": {"nodeSpec": specs}}))


def kill_commands():
    """Machines that are deleted take what runs on them along."""
    for pid in (cloud / "machines").glob("*/*/*/ttt-launch/*/runs/*/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def tpu_vm(verb, names, options):
    path = cloud / "resource.json"
    if not path.exists() or json.loads(path.read_text())["states"][0] in ("SUSPENDED", "SUSPENDING"):
        fail("ERROR: (gcloud) NOT_FOUND: the node was not found")
    resource = json.loads(path.read_text())
    if verb == "describe":
        print(json.dumps({"name": names[0], "state": script["node"], "labels": resource["labels"]}))
        return
    if script["node"] != "READY":
        fail(f"ERROR: (gcloud) TPU is in state {script['node']}", 1)
    node = names[0] if verb == "ssh" else names[-1].removesuffix(":")
    assert node in resource["nodes"]
    everyone = [str(i) for i in range(script["hosts"])]
    workers = everyone if options["worker"] == "all" else [options["worker"]]
    assert set(workers) <= set(everyone)
    status = 0
    for worker in workers:
        home = cloud / "machines" / str(resource["life"]) / node / worker
        home.mkdir(parents=True, exist_ok=True)
        if verb == "scp":
            for source in map(Path, names[:-1]):
                assert source.suffix != ".env" or source.stat().st_mode & 0o777 == 0o600
                (home / source.name).write_bytes(source.read_bytes())
        else:
            environment = {"HOME": str(home), "PATH": f"{cloud}/host:/usr/bin:/bin", "CLOUD": str(cloud)}
            # As sshd does: one string, for the shell of the user.
            shell = ["bash", "-c", options["command"]]
            done = subprocess.Popen(shell, cwd=home, env=environment, stdin=subprocess.DEVNULL, process_group=0)
            signal.signal(signal.SIGTERM, lambda *_, group=done.pid: os.killpg(group, signal.SIGHUP))
            status = done.wait() or status
            with contextlib.suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGHUP)  # the connection is closed
    sys.exit(status)


def curl(arguments):
    assert arguments[-1].endswith("/computeMetadata/v1/instance/attributes/agent-worker-number")
    print(Path.home().name, end="")


def uv(arguments):
    with (Path.home() / "uv.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    if arguments[0] == "venv":
        (Path(arguments[-1]) / "bin").mkdir(parents=True)
        (Path(arguments[-1]) / "bin" / "ttt").symlink_to(cloud / "host" / "ttt")


def ttt(arguments):
    """Does what the script says for this start of this host: an exit status; "wait" for SIGTERM, upon which it "saves"
    and exits with 75; "hang", which does not hear it; "suspend" and "preempt", upon which Google takes the machines;
    "delete", upon which somebody else has; "offline", upon which gcloud has no network for a while;
    "lost", upon which the host starts anew."""
    home = Path.home()
    starts = cloud / f"starts-{home.parent.name}-{home.name}"
    n = len(starts.read_text()) if starts.exists() else 0
    with starts.open("a") as file:
        file.write("|")
    (home / f"argv-{n}.json").write_text(json.dumps(arguments))
    (home / f"environment-{n}.json").write_text(json.dumps(dict(os.environ)))
    does = script["runs"][min(n, len(script["runs"]) - 1)]
    does = does.get(home.name, does["0"]) if isinstance(does, dict) else does

    def save(*_):
        print("saved", flush=True)
        sys.exit(75)

    if does == "wait":
        signal.signal(signal.SIGTERM, save)
    if does == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"start {n} on host {home.name} in {Path.cwd().name[:7]}", flush=True)
    time.sleep(script["seconds"])
    if does == "suspend":
        replace(cloud / "resource.json", states=["SUSPENDING", "SUSPENDED"])
    if does == "preempt":
        replace(cloud / "script.json", node="PREEMPTED")
    if does == "offline":
        replace(cloud / "script.json", offline_until=time.time() + 1)
        time.sleep(2)
        sys.exit(0)
    if does == "delete":
        (cloud / "resource.json").unlink()
    if does == "lost":
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(does, str):
        time.sleep(60)
        sys.exit(99)
    if does > 128:
        os.kill(os.getpid(), does - 128)
    print(f"line of host {home.name}: leaves with {does}", flush=True)
    sys.exit(does)


if __name__ == "__main__":
    name = re.sub(r"\W", "", Path(sys.argv[0]).name)
    {"gcloud": gcloud, "curl": curl, "uv": uv, "ttt": ttt}[name](sys.argv[1:])
