"""A Slurm of one machine, enough to run launch/slurm.sbatch for real: sbatch, squeue, scontrol, sacct, scancel, srun.

Its name tells which of them it is. It keeps jobs as JSON in $STAND_IN/jobs and each call as a line of $STAND_IN/calls.
A job is run by this program, called as "slurmd". $STAND_IN/fail-NAME makes the next calls of NAME fail with what it
holds; $STAND_IN/hold keeps jobs in the queue; $STAND_IN/deaf loses signals but SIGKILL.

Signals go where Slurm lets them go: those before the time limit, and of ``scancel --signal``, to the processes of the
step and not to the batch shell.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
JOBS = HERE / "jobs"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "FORGOTTEN")


def main() -> int:
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    JOBS.mkdir(exist_ok=True)
    if name != "slurmd":
        with (HERE / "calls").open("a") as calls:
            calls.write(json.dumps([name, *arguments]) + "\n")
        fault = HERE / f"fail-{name}"
        if fault.exists():
            faults = json.loads(fault.read_text())
            if faults:
                then, said = faults.pop(0)
                fault.write_text(json.dumps(faults))
                if then == "after":
                    PROGRAMS[name](arguments)
                print(said, file=sys.stderr)
                return 1
    return PROGRAMS[name](arguments) or 0


def job(number, **changes):
    """A job as it is after the changes."""
    path = JOBS / f"{number}.json"
    with (JOBS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = json.loads(path.read_text()) if path.exists() else {}
        known.update(changes)
        if changes:
            path.with_suffix(".new").write_text(json.dumps(known))
            path.with_suffix(".new").rename(path)
    return known


def numbers():
    return sorted(path.stem for path in JOBS.glob("*.json"))


def new_number():
    """A number that no other call of sbatch gets, not even one of the same moment."""
    for number in itertools.count(101):
        with contextlib.suppress(FileExistsError):
            (JOBS / f"{number}.taken").touch(exist_ok=False)
            return str(number)


def options_of(arguments):
    """Options by name, and what comes after them."""
    options = {}
    while arguments and arguments[0].startswith("--"):
        key, _, value = arguments.pop(0)[2:].partition("=")
        options[key] = value
    return options, arguments


def sbatch(arguments):
    given, (script, *rest) = options_of(arguments)
    text = Path(script).read_text()
    directives = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    options = {**options_of(directives)[0], **given}
    number = new_number()
    copy = JOBS / f"{number}.sh"  # as Slurm does
    copy.write_text(text)
    log = options["output"].replace("%j", number).replace("%%", "%")
    job(number, state="PENDING", options=options, arguments=rest, log=log, cwd=os.getcwd(), restarts=0, code=0)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([str(HERE / "bin" / "slurmd"), number], start_new_session=True, **quiet)
    print(f"{number};cluster" if "parsable" in options else f"Submitted batch job {number}")


def slurmd(arguments):
    """Runs a job, again and again while it is put back into the queue."""
    number = arguments[0]
    while (HERE / "hold").exists():
        if job(number)["state"] == "CANCELLED":
            return
        time.sleep(0.02)
    known = job(number)
    tasks = int(known["options"]["nodes"]) * int(known["options"]["ntasks-per-node"])
    while True:
        environment = {**os.environ, "SLURM_JOB_ID": number, "STAND_IN_TASKS": str(tasks)}
        if known["restarts"]:
            environment["SLURM_RESTART_COUNT"] = str(known["restarts"])
        job(number, state="RUNNING", requeue=False)
        with open(known["log"], "ab" if known["options"].get("open-mode") == "append" else "wb") as log:
            script = [str(JOBS / f"{number}.sh"), *known["arguments"]]
            batch = subprocess.Popen(
                ["bash", *script], cwd=known["cwd"], env=environment, stdout=log, stderr=log, start_new_session=True
            )
            job(number, batch=batch.pid)
            code = batch.wait()
        known = job(number)
        if known["state"] in ("CANCELLED", "TIMEOUT"):
            return
        if not known["requeue"]:
            job(number, state="FAILED" if code else "COMPLETED", code=max(code, 0), signal=max(-code, 0))
            return
        known = job(number, state="PENDING", restarts=known["restarts"] + 1)


def srun(arguments):
    number = os.environ["SLURM_JOB_ID"]
    options, command = options_of(arguments)
    tasks = int(os.environ["STAND_IN_TASKS"])
    assert options["kill-on-bad-exit"] == "0"
    environment = {**os.environ, "SLURM_NTASKS": str(tasks), "SLURM_STEP_NODELIST": "localhost"}
    environment |= {"SLURM_STEP_NUM_NODES": "1"}
    started = [
        subprocess.Popen(command, env={**environment, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
        for i in range(tasks)
    ]
    job(number, tasks=[process.pid for process in started])
    codes = [process.wait() for process in started]
    job(number, tasks=[])
    return max(128 - code if code < 0 else code for code in codes)


def squeue(arguments):
    options, _ = options_of(arguments)
    assert options["format"] == "%i|%k"
    for number in numbers():
        known = job(number)
        if known["state"] not in ENDED and known["options"]["job-name"] == options["name"]:
            print(f"{number}|{known['options'].get('comment', '(null)')}")


def scontrol(arguments):
    if arguments[0] == "requeue":
        if job(arguments[1])["options"].get("requeue") is None:
            print("Requested operation is presently disabled for job", file=sys.stderr)
            return 1
        job(arguments[1], requeue=True)
        return 0
    known = job(arguments[2])
    if not known or known["state"] == "FORGOTTEN":
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    print(f"JobId={arguments[2]} JobName={known['options']['job-name']}")
    print(f"   JobState={known['state']} Reason=None Dependency=(null)")
    code = f"{known['code']}:{known.get('signal', 0)}"
    print(f"   Requeue=1 Restarts={known['restarts']} BatchFlag=1 Reboot=0 ExitCode={code}")
    print(f"   Command=/x/slurm.sbatch {known['arguments']}")
    print(f"   StdOut={known['log']}")
    return 0


def sacct(arguments):
    options, _ = options_of(arguments)
    known = job(options["jobs"])
    print(f"{known['past']}|{known['code']}:0")


def scancel(arguments):
    options, (number,) = options_of(arguments)
    known = job(number)
    if "signal" in options:
        to_tasks(known, signal.Signals[f"SIG{options['signal']}"])
        return
    if known["state"] in ENDED:
        return
    job(number, state="CANCELLED")
    to_tasks(known, signal.SIGKILL)
    if "batch" in known:
        end(known["batch"], signal.SIGTERM)


def limit(arguments):
    """What Slurm does before and at the time limit; not a program of Slurm."""
    known = job(arguments[0])
    to, _, _ = known["options"]["signal"].rpartition("@")
    target, name = re.fullmatch(r"(B:)?(\w+)", to).groups()
    if target:
        end(known["batch"], signal.Signals[f"SIG{name}"])
    else:
        to_tasks(known, signal.Signals[f"SIG{name}"])


def to_tasks(known, number):
    if (HERE / "deaf").exists() and number != signal.SIGKILL:
        return
    for process in known.get("tasks", []):
        end(process, number)


def end(process, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


PROGRAMS = {f.__name__: f for f in (sbatch, slurmd, srun, squeue, scontrol, sacct, scancel, limit)}

if __name__ == "__main__":
    sys.exit(main())
