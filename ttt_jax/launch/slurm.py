"""Slurm: GPUs of a cluster whose nodes share a file system, and so the environment, with this machine."""

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path

from ttt_jax.errors import ConfigError, LaunchError
from ttt_jax.launch.commands import CommandError
from ttt_jax.launch.job import Job, check_functions
from ttt_jax.launch.lifecycle import PATIENT, Begin, State, Target, required
from ttt_jax.terminal.console import positive
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, REFUSED, RESTART

_GRACE = 300.0  # seconds that a job has for saving when it is asked to end
_MARK = "ttt_jax:"  # begins the comment of a job; the identity of its command follows
_ENDED = {
    "COMPLETED": DONE,
    "FAILED": FAILED,  # or the exit status of the script
    "CANCELLED": INTERRUPTED,
    **dict.fromkeys(("TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED"), RESTART),
    **dict.fromkeys(("DEADLINE", "OUT_OF_MEMORY"), FAILED),
}


class Slurm(Target):
    """Slurm, seen by one job, which it knows by a number."""

    DESCRIPTION = """\
Run a command of ttt as a job of Slurm, one process per GPU. Nothing is sent: the job uses this Python, this checkout
and this working directory, so they and the workdir have to be where the nodes see them, too.

The job saves two minutes before its time limit, or when it is preempted, and is put into the queue again. Ctrl-C ends
it, after it has saved. The same command while the job is in the queue or runs follows that one.
"""
    SENDS_SOURCES = False

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--nodes", type=positive, default=1, metavar="N", help="(default: 1)")
        add("--gpus-per-node", type=positive, metavar="G", help="and as many processes")
        for name in ("partition", "account", "qos", "constraint"):
            add(f"--{name}", help="as of sbatch")
        add("--time", metavar="LIMIT", help="as of sbatch, such as 8:00:00 or 2-0; the job continues after it")
        add("--cpus-per-task", type=positive, metavar="C", help="CPU cores for each process")
        add("--sbatch", action="append", default=[], metavar="OPTION", help="any other, such as --sbatch=--exclusive")
        add("--setup", type=Path, metavar="FILE", help="a file that bash sources first, such as one with module load")
        default = "(default: slurm in the workdir; here, if that is a bucket)"
        add("--folder", type=Path, metavar="DIR", help=f"for the log {default}")

    @staticmethod
    def check(options: argparse.Namespace, job: Job) -> None:
        """Raise ConfigError for what is missing; local paths are right here."""
        required((options.gpus_per_node, "--gpus-per-node", "how many GPUs each node has"), job=job)
        check_functions(job)
        if options.setup is not None and not options.setup.is_file():
            raise ConfigError(f"--setup {options.setup}: no such file")

    def find(self) -> str | None:
        question = ["squeue", "--me", "--noheader", f"--name={self.job.name}", "--format=%i|%k"]
        for line in self.commands.output(question, retry=PATIENT).splitlines():
            number, _, comment = line.strip().partition("|")
            identity = comment.removeprefix(_MARK) if comment.startswith(_MARK) else None
            self.check_ours(f"job {number} of the name {self.job.name}", identity)
            return number
        return None

    def submit(self) -> str:
        options, job = self.options, self.job
        of_a_run = job.workdir is not None and "://" not in job.workdir and job.command[0] != "tokenize"
        folder = (options.folder or Path(f"{job.workdir}/slurm" if of_a_run else "slurm")).resolve()
        if not self.commands.dry_run:
            folder.mkdir(parents=True, exist_ok=True)
        prefix = str(folder / job.name)
        arguments = [
            *("sbatch", "--parsable", f"--job-name={job.name}", f"--comment={_MARK}{job.identity}"),
            *(f"--output={prefix.replace('%', '%%')}-%j.log", f"--ntasks-per-node={options.gpus_per_node}"),
            *self.given("nodes", "gpus-per-node", "partition", "account", "qos", "constraint", "time", "cpus-per-task"),
        ]
        setup = "" if options.setup is None else str(options.setup.resolve())
        script = [str(job.checkout / "launch" / "slurm.sbatch"), prefix, str(options.restarts), setup]
        command = [sys.executable, "-m", "ttt_jax", *job.command]
        # sbatch hands the environment on; on the command line everybody could read it.
        printed = self.run_submission([*arguments, *options.sbatch, *script, *command], job.environment)
        number = printed.strip().partition(";")[0] or self.find()
        if number is None and not self.commands.dry_run:
            raise LaunchError(f"{job.name}: was submitted, and is not in the queue any more")
        return number or "NUMBER"

    def state(self, key: str) -> State:
        """Return the state of a job, for some time also after its end; LaunchError if Slurm does not know it."""
        try:
            shown = self.commands.output(["scontrol", "show", "job", key], retry=PATIENT)
        except CommandError as error:
            if "Invalid job id" not in error.printed:
                raise
            return self._past_state(key)
        found = re.search(r"JobState=(\w+).*ExitCode=(\d+):(?:.*?^ *StdOut=(.*?) *$)?", shown, re.DOTALL | re.MULTILINE)
        if found is None:
            raise LaunchError(f"scontrol show job {key}: no JobState and ExitCode in what it printed")
        return _state(key, found[1], int(found[2]), (found[3] or "").replace("%j", key))

    def _past_state(self, number: str) -> State:
        options = "--allocations --noheader --parsable2 --format=State,ExitCode".split()
        with contextlib.suppress(CommandError, ConfigError):  # where there is no accounting
            answer = self.commands.output(["sacct", f"--jobs={number}", *options], retry=PATIENT).split("\n")[0]
            if match := re.match(r"(\w+).*\|(\d+):", answer):
                return _state(number, match[1], int(match[2]), "")
        raise LaunchError(f"job {number}: Slurm does not know it any more; its log tells how it ended")

    def log_command(self, log: str, begin: Begin) -> list[str]:
        """Return the command that follows the log, which another machine writes and which may not be there yet."""
        lines = {"start": "--bytes=+1", "end": "--lines=50"}.get(str(begin), "--lines=0")
        return ["tail", "--follow=name", "--retry", lines, log]

    def stop(self, key: str) -> None:
        """Ask the job to save and to end; after a while, or by another Ctrl-C, end it without asking."""
        state = self.state(key)
        if state.status is not None:
            return
        stop_file, ended = Path(state.log).with_suffix(".stop"), False
        try:
            if ", RUNNING" in state.text:
                stop_file.touch()
                self.commands.run(["scancel", "--signal=TERM", key], retry=PATIENT)
                self.commands.note(f"{self.job.name}: job {key} saves and ends")
                for _ in range(round(_GRACE / self.POLL)):
                    time.sleep(self.POLL)
                    if ended := self.state(key).status is not None:
                        break
        finally:
            if not ended:
                self.commands.run(["scancel", key], retry=PATIENT, finish=True)
            stop_file.unlink(missing_ok=True)


def _state(number: str, name: str, code: int, log: str) -> State:
    status = code if name == "FAILED" and code in (REFUSED, RESTART, INTERRUPTED) else _ENDED.get(name)
    return State(f"job {number}, {name}" + (f", its log is {log}" if log else ""), status, log, growing=status is None)
