"""Stand for programs of others, first on PATH: what all stand-ins share, and the command that is launched.

Everything is kept in the folder $STAND_IN: "calls" has the arguments of each call, "plan" what the launched command
does, "started" what each of its processes got. Files with these names change how jobs go:

  fail-PROGRAM WORD  faults of the next calls that have the word: ["before" or "after" the work, what it says]
  hold               keeps jobs in the queue
  finish             ends commands that wait
"""

import contextlib
import fcntl
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ.get("STAND_IN", "."))
QUIET = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
_INSIDE = ("runner", "ttt", "python", "uv", "curl")  # no programs that ttt launch calls


def main(target: str) -> int:
    """Do what the program of this name does for a target."""
    programs = importlib.import_module(f"stand_in_{target}")
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    program = getattr(programs, name, None) or globals()[name]
    if name in _INSIDE:
        return program(arguments) or 0
    with (HERE / "calls").open("a") as calls:
        calls.write(json.dumps([name, *arguments]) + "\n")
    for path in HERE.glob(f"fail-{name}*"):
        faults = json.loads(path.read_text())
        if faults and set(path.name.split()[1:]) <= set(arguments):
            path.write_text(json.dumps(faults[1:]))
            when, text = faults[0]
            if text:
                if when == "after":
                    program(arguments)
                return fail(text)
    return program(arguments) or 0


def fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 1


@contextlib.contextmanager
def kept(name, default):
    """Give what is kept under a name, to be changed."""
    with (HERE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = HERE / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else default
        before = json.dumps(known)
        yield known
        if json.dumps(known) != before:
            (HERE / f"{name}.new").write_text(json.dumps(known))
            (HERE / f"{name}.new").rename(path)


def job(key: str, **changes):
    """Return a job as it is after the changes; empty where there is none."""
    with kept("jobs", {}) as jobs:
        if changes:
            jobs[key] = {**jobs.get(key, {}), **changes}
        return dict(jobs.get(key, {}))


def forget(key: str):
    """Return a job that there is no more from now on; None where there was none."""
    with kept("jobs", {}) as jobs:
        return jobs.pop(key, None)


def submit(key: str, **known) -> None:
    """Put a job into the queue; :func:`runner` of the target runs it."""
    job(key, state="PENDING", attempt=0, processes=[], **known)
    subprocess.Popen([str(HERE / "bin" / "runner"), key], start_new_session=True, **QUIET)


def new_number(first: int) -> str:
    """Return the number of a new job, as text."""
    with kept("numbers", []) as numbers:
        numbers.append(first + len(numbers))
        return str(numbers[-1])


def attempts(key: str):
    """Yield the numbers of the attempts of a job, from when it may start until it has ended."""
    while (HERE / "hold").exists() and job(key).get("state") == "PENDING":
        time.sleep(0.02)
    for attempt in itertools.count():
        if job(key).get("state") not in ("PENDING", "RUNNING"):
            return
        job(key, state="RUNNING", attempt=attempt)
        yield attempt


def run_all(key: str, command, variables, logs) -> list[int]:
    """Run the processes of an attempt together, each with its variables and log; return their exit codes."""
    started = []
    for own, log in zip(variables, logs, strict=True):
        environment = {**os.environ, "PATH": f"{HERE / 'remote'}:{os.environ['PATH']}", **own}
        with open(log, "ab") as file:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "start_new_session": True}
            started.append(subprocess.Popen(command, env=environment, **pipes))
    job(key, processes=[process.pid for process in started])
    return [code if code >= 0 else 128 - code for code in [process.wait() for process in started]]


def end(processes, number) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def follow(path: Path, position: int, over) -> None:
    """Copy what is added to a file to standard output, until ``over()`` was true before a read."""
    last = False
    while not last:
        last = over()
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                new = file.read()
            position += len(new)
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        time.sleep(0.02)


def options_of(arguments):
    """Return the options by name, and the other arguments."""
    options = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
    return options, [a for a in arguments if not a.startswith("--")]


def uv(arguments) -> bool:
    """Make an environment with the launched command in it."""
    with (HERE / "uv").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if arguments[0] == "venv":
        os.makedirs(f"{arguments[-1]}/bin", exist_ok=True)
        with contextlib.suppress(FileExistsError):
            Path(arguments[-1], "bin", "ttt").symlink_to(HERE / "remote" / "ttt")
    else:
        (HERE / "constraints").write_text(Path(arguments[arguments.index("--constraint") + 1]).read_text())
    return (HERE / "no-packages").exists()


def ttt(arguments) -> int:
    """Do what $STAND_IN/plan says for this start on this host: end with a status; "wait" for SIGTERM, upon which it
    saves and ends with 75; "hang", which ignores SIGTERM; or call a function of the stand-ins of the target."""
    plan = json.loads((HERE / "plan").read_text())
    host = os.environ.get("HOST") or "/".join(Path.home().parts[-2:])
    with kept("started", []) as started:
        n = sum(each["host"] == host for each in started) if len(plan) > 1 else 0
        started.append({"host": host, "argv": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)})
    does = plan[min(n, len(plan) - 1)]
    does = does.get(host.split("/")[-1], 0) if isinstance(does, dict) else does
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN if does == "hang" else lambda *_: terminated.append(1))
    print(f"start {n} of host {host.split('/')[-1]}: {does}", flush=True)
    deadline = time.monotonic() + 30
    if isinstance(does, str) and does not in ("wait", "hang"):
        getattr(importlib.import_module("stand_in_tpu"), does)()
    while isinstance(does, str) and not terminated and time.monotonic() < deadline:
        if (HERE / "finish").exists():
            print("finished", flush=True)
            return 0
        time.sleep(0.01)
    if terminated:
        print("saved", flush=True)
        return 75
    time.sleep(0.05)
    if isinstance(does, str):
        return 99
    if does > 128 and does != 130:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), does - 128)
    return does


python = ttt  # sys.executable, of which Slurm runs ``-m ttt_jax``
