"""Stand for SkyPilot on one machine: managed jobs whose setup and run are done for real, with a home of their own.

$STAND_IN/quick lets a job end before anybody asks about it, never is a SkyPilot that has never had a job.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

from stand_in import HERE, attempts, end, fail, follow, job, kept, new_number, options_of, run_all, submit

HOME = HERE / "home"
ENDED = ("SUCCEEDED", "FAILED", "FAILED_SETUP", "CANCELLED")


def sky(arguments):
    group, verb, *rest = arguments
    assert group == "jobs"
    return {"launch": launch, "queue": queue, "logs": logs, "cancel": cancel}[verb](rest)


def launch(arguments):
    import yaml

    *options, file = arguments
    assert options[1:3] == ["--yes", "--detach-run"]
    task = yaml.safe_load(Path(file).read_text())
    assert options[0] == f"--name={task['name']}"
    secrets = {key: os.environ[key] for key in (option.removeprefix("--secret=") for option in options[3:])}
    number = new_number(1)
    for there, here in task["file_mounts"].items():  # they are sent before launch returns
        there = Path(there.replace("~", str(HOME)))
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here, there)
    submit(number, job_id=int(number), job_name=task["name"], failure_reason=None, task=task, secrets=secrets)
    while (HERE / "quick").exists() and job(number)["state"] not in ENDED:
        time.sleep(0.02)


def runner(arguments):
    """Run a job, again and again while it may be recovered."""
    (number,) = arguments
    known = job(number)
    task, nodes, log = known["task"], known["task"]["num_nodes"], HERE / f"{number}.log"
    variables = {**known["secrets"], "HOME": str(HOME), "SKYPILOT_NUM_NODES": str(nodes)}
    variables["SKYPILOT_NODE_IPS"] = "\n".join(f"10.0.0.{i + 1}" for i in range(nodes))
    ranks = [{**variables, "SKYPILOT_NODE_RANK": str(i), "HOST": str(i)} for i in range(nodes)]
    for step in ("setup", "run"):
        (HERE / f"{number}-{step}").write_text(task[step] + "\n")
    for _ in attempts(number):
        # As SkyPilot does, whose shell is an interactive one.
        setup, run = (["bash", "-i", str(HERE / f"{number}-{step}")] for step in ("setup", "run"))
        if any(run_all(number, setup, [variables], [log])):
            job(number, state="FAILED_SETUP")
            return
        codes = run_all(number, run, ranks, [log] * nodes)
        recovered = task["resources"]["job_recovery"]["recover_on_exit_codes"]
        if job(number)["state"] == "CANCELLED" or set(codes) & set(recovered):
            continue
        text = f"code {codes[0]}" if nodes == 1 else f"codes {codes}"
        reason = f"Job exited with exit {text} (user program failure). To see the details, run: sky jobs logs"
        job(number, **({"state": "FAILED", "failure_reason": reason} if any(codes) else {"state": "SUCCEEDED"}))


def queue(arguments):
    assert arguments == ["--all", "--verbose", "--output=json"]
    if (HERE / "never").exists():
        return fail("No in-progress managed jobs.")
    with kept("jobs", {}) as jobs:
        shown = [{**each, "status": each["state"], "recovery_count": each["attempt"]} for each in jobs.values()]
    print("some hint of the day")
    print(json.dumps(shown, indent=2))
    return 0


def logs(arguments):
    options, (number,) = options_of(arguments)
    assert options["follow"] == ""
    assert options["tail"] in ("0", "50")
    follow(HERE / f"{number}.log", 0, lambda: job(number)["state"] in ENDED)
    return {"SUCCEEDED": 0, "CANCELLED": 103}.get(job(number)["state"], 100)


def cancel(arguments):
    assert arguments[0] == "--yes"
    known = job(arguments[1], state="CANCELLED")
    for process in known["processes"]:
        end([-process], signal.SIGKILL)
