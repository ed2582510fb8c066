"""SkyPilot on one machine: managed jobs whose setup and run are done for real, with a home of their own.

It keeps jobs as JSON in $STAND_IN/jobs.json and each call as a line of $STAND_IN/calls. Called as "controller" it runs
a job. $STAND_IN/"fail-VERB" holds faults of the next calls of a verb; $STAND_IN/hold keeps jobs from starting.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
HOME = HERE / "home"
ENDED = ("SUCCEEDED", "FAILED", "FAILED_SETUP", "CANCELLED")


def main() -> int:
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    if name == "controller":
        return controller(int(arguments[0]))
    with (HERE / "calls").open("a") as calls:
        calls.write(json.dumps([name, *arguments]) + "\n")
    group, verb, *rest = arguments
    assert group == "jobs"
    fault = HERE / f"fail-{verb}"
    if fault.exists() and (faults := json.loads(fault.read_text())):
        then, said = faults.pop(0)
        fault.write_text(json.dumps(faults))
        if then == "after":
            VERBS[verb](rest)
        print(said, file=sys.stderr)
        return 1
    return VERBS[verb](rest) or 0


@contextlib.contextmanager
def jobs():
    with (HERE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = HERE / "jobs.json"
        known = json.loads(path.read_text()) if path.exists() else []
        yield known
        (HERE / "new").write_text(json.dumps(known))
        (HERE / "new").rename(path)


def change(number, **changes):
    with jobs() as known:
        known[number - 1].update(changes)


def state(number):
    with jobs() as known:
        return known[number - 1]


def launch(arguments):
    import yaml

    *options, file = arguments
    assert options[1:3] == ["--yes", "--detach-run"]
    task = yaml.safe_load(Path(file).read_text())
    assert options[0] == f"--name={task['name']}"
    secrets = {key: os.environ[key] for key in (option.removeprefix("--secret=") for option in options[3:])}
    with jobs() as known:
        number = len(known) + 1
        known.append({"job_id": number, "job_name": task["name"], "status": "STARTING", "recovery_count": 0})
        known[-1] |= {"failure_reason": None, "task": task, "secrets": secrets}
    for there, here in task["file_mounts"].items():  # they are sent before launch returns
        there = Path(there.replace("~", str(HOME)))
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here, there)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([str(HERE / "bin" / "controller"), str(number)], start_new_session=True, **quiet)
    while (HERE / "quick").exists() and state(number)["status"] not in ENDED:  # the job ends before anybody asks
        time.sleep(0.02)
    print(f"Job submitted, ID: {number}")


def controller(number):
    """Runs a job, again and again while it may be recovered."""
    job = state(number)
    task, recovery = job["task"], job["task"]["resources"]["job_recovery"]
    nodes = task["num_nodes"]
    environment = {**os.environ, **job["secrets"], "HOME": str(HOME)}
    environment["PATH"] = f"{HERE / 'remote'}:{os.environ['PATH']}"
    while (HERE / "hold").exists() and state(number)["status"] == "STARTING":
        time.sleep(0.02)
    with (HERE / f"{number}.log").open("ab") as log:
        while state(number)["status"] != "CANCELLED":
            change(number, status="RUNNING")
            if script(task["setup"], environment, log).wait():
                change(number, status="FAILED_SETUP")
                return 1
            recoveries = state(number)["recovery_count"]
            started = []
            for i in range(nodes):
                of_node = {
                    "SKYPILOT_NODE_RANK": str(i),
                    "SKYPILOT_NUM_NODES": str(nodes),
                    "RECOVERIES": str(recoveries),
                }
                of_node["SKYPILOT_NODE_IPS"] = "\n".join(f"10.0.0.{j + 1}" for j in range(nodes))
                started.append(script(task["run"], {**environment, **of_node}, log))
            change(number, processes=[process.pid for process in started])
            codes = [process.wait() for process in started]
            if state(number)["status"] == "CANCELLED":
                return 0
            if not any(codes):
                change(number, status="SUCCEEDED")
                return 0
            if not set(codes) & set(recovery["recover_on_exit_codes"]):
                said = f"code {codes[0]}" if nodes == 1 else f"codes {codes}"
                reason = f"Job exited with exit {said} (user program failure). To see the details, run: sky jobs logs"
                change(number, status="FAILED", failure_reason=reason)
                return 0
            change(number, status="RECOVERING", recovery_count=recoveries + 1)
    return 0


def script(text, environment, log):
    path = HERE / f"script-{hash(text)}"
    path.write_text(text + "\n")
    # As SkyPilot does, whose shell is an interactive one.
    command = ["bash", "-i", str(path)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def queue(arguments):
    assert arguments[:2] == ["--all", "--verbose"]
    assert arguments[-1] == "--output=json"
    if (HERE / "never").exists():
        print("No in-progress managed jobs.", file=sys.stderr)
        return 1
    with jobs() as known:
        shown = [job for job in known if job["status"] not in ENDED or "--skip-finished" not in arguments]
    print("some hint of the day")
    print(json.dumps(shown, indent=2))
    return 0


def logs(arguments):
    follow, tail, number = arguments
    assert follow == "--follow"
    assert tail in ("--tail=0", "--tail=50")
    position = 0
    while True:
        status = state(int(number))["status"]
        path = HERE / f"{number}.log"
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                new = file.read()
            position += len(new)
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        if status in ENDED:
            return {"SUCCEEDED": 0, "CANCELLED": 103}.get(status, 100)
        time.sleep(0.02)


def cancel(arguments):
    assert arguments[0] == "--yes"
    number = int(arguments[1])
    change(number, status="CANCELLED")
    for process in state(number).get("processes", []):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


VERBS = {"launch": launch, "queue": queue, "logs": logs, "cancel": cancel}

if __name__ == "__main__":
    sys.exit(main())
