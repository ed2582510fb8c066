"""A GKE cluster of one machine: xpk, kubectl, docker, and the pods of a workload, which run for real.

Its name tells which of them it is. It keeps JobSets and pods as JSON in $STAND_IN, and each call as a line of
$STAND_IN/calls. Files there make it behave: "fail-xpk create" and the like hold faults of the next calls, suspend keeps
workloads in the queue, break-log breaks a log off once, endless-log never ends one. The script of a pod, its policies
and the shells on the way are those of xpk 1.16 and Kubernetes.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
HOSTS = 2
# xpk/core/docker_container.py, with a shorter sleep
SCRIPT = """
echo XPK Start: $(date);
_sigterm() (kill -SIGTERM $! 2>/dev/null;);
trap _sigterm SIGTERM;
({command}) & PID=$!;
while kill -0 $PID 2>/dev/null;
    do sleep 0.1;
done;
wait $PID;
EXIT_CODE=$?;
echo XPK End: $(date);
echo EXIT_CODE=$EXIT_CODE;
exit $EXIT_CODE
"""


def main() -> int:
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    if name == "kubelet":
        return kubelet(*arguments)
    with (HERE / "calls").open("a") as calls:
        calls.write(json.dumps([name, *arguments]) + "\n")
    verb = next(word for word in arguments[1:] if not word.startswith("--"))
    fault = HERE / f"fail-{name} {verb}"
    if fault.exists() and (faults := json.loads(fault.read_text())):
        then, said = faults.pop(0)
        fault.write_text(json.dumps(faults))
        if then == "after":
            PROGRAMS[name](arguments)
        print(said, file=sys.stderr if name == "kubectl" else sys.stdout)
        return 1
    return PROGRAMS[name](arguments) or 0


@contextlib.contextmanager
def kept(name, default):
    """What is kept in a file, to be changed."""
    with (HERE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = HERE / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else default
        before = json.dumps(known)
        yield known
        if json.dumps(known) != before:
            (HERE / f"{name}.new").write_text(json.dumps(known))
            (HERE / f"{name}.new").rename(path)


def xpk(arguments):
    group, verb, *rest = arguments
    assert group == "workload"
    options = dict(option[2:].partition("=")[::2] for option in rest)
    (HERE / "context").write_text(f"gke_project_zone_{options['cluster']}")
    if verb == "create":
        return create(options)
    if verb == "delete":
        return delete(options["workload"])
    return 0


def create(options):
    import yaml

    name = options["workload"]
    with kept("jobsets", {}) as jobsets:
        if name in jobsets:
            print(f"[XPK] {name} already exists, do you want to overwrite it? (y/N): ")
            raise EOFError  # nobody is there to answer
        variables = dict(line.partition("=")[::2] for line in Path(options["env-file"]).read_text().splitlines())
        # One line of a block of YAML; values between double quotes.
        assert re.fullmatch("[ -~]+", options["command"])
        env = [{"name": key, "value": yaml.safe_load(f'"{value}"')} for key, value in variables.items()]
        script = SCRIPT.replace("{command}", options["command"])
        container = {"name": "jax-tpu", "env": env, "command": ["bash", "-c", script]}
        template = {"spec": {"template": {"spec": {"containers": [container]}}}}
        codes = {42, *range(127, 256), *map(int, options["restart-on-exit-codes"].split(","))}
        jobsets[name] = {
            "spec": {"replicatedJobs": [{"name": "slice-job", "template": template}]},
            "status": {"conditions": [], "restarts": 0},
            "restarting": sorted(codes),
            "most": int(options["max-restarts"]),
        }
        if (HERE / "suspend").exists():
            jobsets[name]["status"]["conditions"] = [{"type": "Suspended", "status": "True"}]
            return
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([str(HERE / "bin" / "kubelet"), name], start_new_session=True, **quiet)


def delete(name):
    with kept("jobsets", {}) as jobsets:
        if jobsets.pop(name, None) is None:
            print(f'Error from server (NotFound): jobsets.jobset.x-k8s.io "{name}" not found')
            return 1
    with kept("pods", []) as pods:
        running = [pod["process"] for pod in pods if pod["status"]["phase"] == "Running"]
        pods.clear()
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in running) and time.monotonic() < deadline:
        time.sleep(0.02)
    return 0


def expanded(text, variables):
    """What Kubernetes does to commands and values."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)


def kubelet(name):
    """Runs the pods of a workload, attempt after attempt, as the policies have it."""
    while True:
        with kept("jobsets", {}) as jobsets:
            jobset = jobsets[name]
        attempt = jobset["status"]["restarts"]
        container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
        variables = {}
        for variable in container["env"]:
            variables[variable["name"]] = expanded(variable["value"], variables)
        command = [expanded(word, variables) for word in container["command"]]
        environment = {**os.environ, **variables, "ATTEMPT": str(attempt)}
        environment["PATH"] = f"{HERE / 'image'}:{os.environ['PATH']}"
        started = []
        for host in range(HOSTS):
            pod = f"{name}-slice-job-0-{host}-{attempt}x"
            with (HERE / f"{pod}.log").open("wb") as log:
                process = subprocess.Popen(
                    command, env={**environment, "HOST": str(host)}, stdout=log, stderr=log, start_new_session=True
                )
            started.append((pod, process))
        with kept("pods", []) as pods:
            pods += [
                {
                    "metadata": {"name": pod, "creationTimestamp": f"2026-01-01T00:00:{attempt:02}Z"},
                    "status": {"phase": "Running"},
                    "process": process.pid,
                }
                for pod, process in started
            ]
        codes = [process.wait() for _, process in started]
        codes = [128 - code if code < 0 else code for code in codes]
        with kept("pods", []) as pods:
            for (pod, _), code in zip(started, codes, strict=True):
                for known in pods:
                    if known["metadata"]["name"] == pod:
                        state = {"terminated": {"exitCode": code}}
                        known["status"] = {"phase": "Failed" if code else "Succeeded"}
                        known["status"]["containerStatuses"] = [{"name": "jax-tpu", "state": state}]
        with kept("jobsets", {}) as jobsets:
            if name not in jobsets:
                return 0
            status = jobsets[name]["status"]
            if not any(codes):
                end = {"type": "Completed", "reason": "AllJobsCompleted", "message": "jobset completed successfully"}
            elif not all(code in jobset["restarting"] for code in codes if code):
                end = {"type": "Failed", "reason": "FailJobSetFailurePolicyAction", "message": "a pod failed"}
            elif attempt >= jobset["most"]:
                end = {"type": "Failed", "reason": "ReachedMaxRestarts", "message": "reached max number of restarts"}
            else:
                status["restarts"] += 1
                continue
            status["conditions"] = [{**end, "status": "True"}]
            return 0


def kubectl(arguments):
    if arguments == ["config", "current-context"]:
        print((HERE / "context").read_text())
        return 0
    context, namespace, verb, *rest = arguments
    assert context == "--context=gke_project_zone_c", context
    assert namespace == "--namespace=default"
    if verb == "logs":
        return logs(*rest)
    kind, *rest = rest
    assert verb == "get"
    if kind == "jobset":
        assert "--ignore-not-found" in rest
        with kept("jobsets", {}) as jobsets:
            if rest[0] in jobsets:
                print(json.dumps(jobsets[rest[0]]))
    else:
        selector = rest[0].removeprefix("--selector=jobset.sigs.k8s.io/jobset-name=")
        with kept("pods", []) as pods:
            print(json.dumps({"items": [p for p in pods if p["metadata"]["name"].startswith(selector)]}))
    return 0


def logs(follow, container, limit, pod):
    assert (follow, container) == ("--follow", "--container=jax-tpu")
    path = HERE / f"{pod}.log"
    position = path.stat().st_size if limit.startswith("--since") else 0
    breaks = HERE / "break-log"
    while True:
        with kept("pods", []) as pods:
            runs = any(p["metadata"]["name"] == pod and p["status"]["phase"] == "Running" for p in pods)
        with path.open("rb") as file:
            file.seek(position)
            new = file.read()
        position += len(new)
        sys.stdout.buffer.write(new)
        sys.stdout.flush()
        if not runs and not (HERE / "endless-log").exists():
            return 0
        if breaks.exists() and b"started" in path.read_bytes():
            breaks.unlink()
            return 1
        time.sleep(0.02)


def docker(arguments):
    if arguments[0] == "build":
        context = Path(arguments[-1])
        (HERE / "constraints").write_text((context / "constraints.txt").read_text())
        (HERE / "context-files").write_text(
            "\n".join(str(path.relative_to(context)) for path in sorted(context.rglob("*")) if path.is_file())
        )
    return 0


PROGRAMS = {"xpk": xpk, "kubectl": kubectl, "docker": docker}

if __name__ == "__main__":
    sys.exit(main())
