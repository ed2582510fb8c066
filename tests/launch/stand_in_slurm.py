"""Stand for Slurm on one machine, enough to run launch/slurm.sbatch for real.

Signals of ``scancel --signal`` go to the processes of the step, and not to the batch shell.
"""

import os
import signal
from pathlib import Path

from stand_in import HERE, attempts, end, fail, job, kept, new_number, options_of, run_all, submit

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "FORGOTTEN")


def split(arguments):
    """Return the options of sbatch or srun by name, and the command."""
    first = next(i for i, argument in enumerate(arguments) if not argument.startswith("--"))
    return options_of(arguments[:first])[0], arguments[first:]


def sbatch(arguments):
    given, (script, *rest) = split(arguments)
    text, number = Path(script).read_text(), new_number(101)
    directives = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    options = {**options_of(directives)[0], **given}
    (HERE / f"{number}.sh").write_text(text)  # Slurm copies it
    log = options["output"].replace("%j", number).replace("%%", "%")
    submit(number, options=options, command=["bash", str(HERE / f"{number}.sh"), *rest], log=log, code=0)
    print(f"{number};cluster" if "parsable" in options else f"Submitted batch job {number}")


def runner(arguments):
    (number,) = arguments
    for attempt in attempts(number):
        known = job(number, requeue=False)
        tasks = int(known["options"]["nodes"]) * int(known["options"]["ntasks-per-node"])
        variables = {"SLURM_JOB_ID": number, "STAND_IN_TASKS": str(tasks)}
        if attempt:
            variables["SLURM_RESTART_COUNT"] = str(attempt)
        if known["options"].get("open-mode") != "append":
            Path(known["log"]).write_text("")
        (code,) = run_all(number, known["command"], [variables], [known["log"]])
        known = job(number)
        if known["state"] == "RUNNING" and not known["requeue"]:
            job(number, state="FAILED" if code else "COMPLETED", code=code)


def srun(arguments):
    number, tasks = os.environ["SLURM_JOB_ID"], int(os.environ["STAND_IN_TASKS"])
    options, command = split(arguments)
    assert options["kill-on-bad-exit"] == "0"
    shared = {"SLURM_NTASKS": str(tasks), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    each = [{**shared, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "HOST": str(i)} for i in range(tasks)]
    known = job(number)
    job(number, batch=known["processes"])
    return max(run_all(number, command, each, [known["log"]] * tasks))


def squeue(arguments):
    options, _ = options_of(arguments)
    assert options["format"] == "%i|%k"
    with kept("jobs", {}) as jobs:
        for number, known in jobs.items():
            if known["state"] not in ENDED and known["options"]["job-name"] == options["name"]:
                print(f"{number}|{known['options']['comment']}")


def scontrol(arguments):
    number = arguments[-1]
    known = job(number)
    if arguments[0] == "requeue":
        if known["options"].get("requeue") is None:
            return fail("Requested operation is presently disabled for job")
        return job(number, requeue=True) and 0
    if known["state"] == "FORGOTTEN":
        return fail("slurm_load_jobs error: Invalid job id specified")
    print(f"JobId={number} JobName={known['options']['job-name']}\n   JobState={known['state']} Reason=None")
    print(f"   Requeue=1 Restarts={known['attempt']} ExitCode={known['code']}:0\n   StdOut={known['log']}")
    return 0


def sacct(arguments):
    known = job(options_of(arguments)[0]["jobs"])
    print(f"{known['past']}|{known['code']}:0")


def scancel(arguments):
    options, (number,) = options_of(arguments)
    known = job(number)
    if "signal" in options:
        end(known["processes"], signal.Signals[f"SIG{options['signal']}"])
    elif known["state"] not in ENDED:
        job(number, state="CANCELLED")
        end(known["processes"], signal.SIGKILL)
        end(known.get("batch", []), signal.SIGTERM)
