"""Stand for a GKE cluster of one machine: xpk, kubectl, docker, and the pods of workloads, which run for real.

$STAND_IN/break-log breaks a log off once, endless-log never ends one. The script of a pod, its policies and the shells
on the way are those of xpk 1.16 and Kubernetes.
"""

import re
import signal
import time
from pathlib import Path

from stand_in import HERE, attempts, end, fail, follow, forget, job, options_of, run_all, submit

HOSTS = 2
# xpk/core/docker_container.py, with a shorter sleep and without its messages
SCRIPT = """
_sigterm() (kill -SIGTERM $! 2>/dev/null;);
trap _sigterm SIGTERM;
({command}) & PID=$!;
while kill -0 $PID 2>/dev/null;
    do sleep 0.1;
done;
wait $PID;
exit $?
"""


def xpk(arguments):
    options, (group, verb) = options_of(arguments)
    assert group == "workload"
    (HERE / "context").write_text(f"gke_project_zone_{options['cluster']}")
    return {"create": create, "delete": delete, "list": lambda options: 0}[verb](options)


def create(options):
    import yaml

    name = options["workload"]
    assert not job(name), "xpk would ask whether to overwrite it"
    variables = dict(line.partition("=")[::2] for line in Path(options["env-file"]).read_text().splitlines())
    # One line of a block of YAML; values between double quotes.
    assert re.fullmatch("[ -~]+", options["command"])
    env = [{"name": key, "value": yaml.safe_load(f'"{value}"')} for key, value in variables.items()]
    command = ["bash", "-c", SCRIPT.replace("{command}", options["command"])]
    codes = [42, *range(127, 256), *map(int, options["restart-on-exit-codes"].split(","))]
    submit(name, env=env, command=command, restarting=codes, most=int(options["max-restarts"]), conditions=[], pods=[])
    time.sleep((HERE / "slow").exists())


def delete(options):
    if (known := forget(options["workload"])) is None:
        return fail("Error from server (NotFound): jobsets.jobset.x-k8s.io not found")
    end(known["processes"], signal.SIGTERM)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in known["processes"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return 0


def expanded(text, variables):
    """Return a command or value as Kubernetes expands it."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)


def runner(arguments):
    """Run the pods of a workload, attempt after attempt, as the policies have it."""
    (name,) = arguments
    for attempt in attempts(name):
        known, variables = job(name), {}
        for variable in known["env"]:
            variables[variable["name"]] = expanded(variable["value"], variables)
        command = [expanded(word, variables) for word in known["command"]]
        pods = [pod(name, attempt, host) for host in range(HOSTS)]
        job(name, pods=[*known["pods"], *pods])
        each = [{**variables, "HOST": str(host)} for host in range(HOSTS)]
        codes = run_all(name, command, each, [HERE / f"{pod['metadata']['name']}.log" for pod in pods])
        if not job(name):
            return
        job(name, pods=[*known["pods"], *(pod(name, attempt, host, code) for host, code in enumerate(codes))])
        if not any(codes):
            ended = ("Completed", "AllJobsCompleted", "jobset completed successfully")
        elif not all(code in known["restarting"] for code in codes if code):
            ended = ("Failed", "FailJobSetFailurePolicyAction", "a pod failed")
        elif attempt >= known["most"]:
            ended = ("Failed", "ReachedMaxRestarts", "reached max number of restarts")
        else:
            continue
        condition = dict(zip(("type", "reason", "message"), ended, strict=True))
        job(name, state="ENDED", conditions=[{**condition, "status": "True"}])


def kubectl(arguments):
    import json

    if arguments == ["config", "current-context"]:
        print((HERE / "context").read_text())
        return 0
    context, namespace, verb, *rest = arguments
    assert (context, namespace) == ("--context=gke_project_zone_c", "--namespace=default")
    if verb == "logs":
        return logs(*rest)
    options, (kind, *names) = options_of(rest)
    assert verb == "get"
    name = names[0] if names else options["selector"].removeprefix("jobset.sigs.k8s.io/jobset-name=")
    known = job(name)
    if kind == "pods":
        print(json.dumps({"items": known.get("pods", [])}))
    elif known:
        container = {"name": "jax-tpu", "env": known["env"], "command": known["command"]}
        template = {"spec": {"template": {"spec": {"containers": [container]}}}}
        waits = [{"type": "Suspended", "status": "True"}] if known["state"] == "PENDING" else []
        status = {"conditions": known["conditions"] or waits, "restarts": known["attempt"]}
        spec = {"replicatedJobs": [{"name": "slice-job", "template": template}]}
        print(json.dumps({"spec": spec, "status": status}))
    return 0


def pod(name, attempt, host, code=None):
    """Return a pod that runs, or that has ended with a code."""
    metadata = {"name": f"{name}-slice-job-0-{host}-{attempt}x", "creationTimestamp": f"2026-01-01T00:00:{attempt:02}Z"}
    if code is None:
        return {"metadata": metadata, "status": {"phase": "Running"}}
    states = [{"name": "jax-tpu", "state": {"terminated": {"exitCode": code}}}]
    return {"metadata": metadata, "status": {"phase": "Failed" if code else "Succeeded", "containerStatuses": states}}


def logs(flag, container, limit, pod):
    assert (flag, container) == ("--follow", "--container=jax-tpu")
    path, name = HERE / f"{pod}.log", pod.rpartition("-slice-job")[0]
    position = path.stat().st_size if limit.startswith("--since") else 0

    def over():
        breaks = (HERE / "break-log").exists() and b"start" in path.read_bytes()
        if breaks:
            (HERE / "break-log").unlink()
        running = [
            each["metadata"]["name"] for each in job(name).get("pods", []) if each["status"]["phase"] == "Running"
        ]
        return breaks or not (pod in running or (HERE / "endless-log").exists())

    follow(path, position, over)


def docker(arguments):
    if arguments[0] == "build":
        context = Path(arguments[-1])
        (HERE / "constraints").write_text((context / "constraints.txt").read_text())
        files = sorted(str(path.relative_to(context)) for path in context.rglob("*") if path.is_file())
        (HERE / "context-files").write_text("\n".join(files))
