"""Slurm: GPUs of a cluster whose nodes share a file system, and so the environment, with this machine."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ttt_jax.errors import ConfigError, LaunchError
from ttt_jax.launch import checks, lifecycle
from ttt_jax.launch.commands import CommandError, Commands, Retry
from ttt_jax.launch.job import Job
from ttt_jax.launch.log_file import LogFile
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, REFUSED, RESTART

DESCRIPTION = """\
Runs a command of ttt as a job of Slurm, one process per GPU. Nothing is sent: the job uses this Python, this checkout
and this working directory, so they and the workdir have to be where the nodes see them, too.

The job saves two minutes before its time limit, or when it is preempted, and is put into the queue again. Ctrl-C ends
it, after it has saved. The same command while the job is in the queue or runs follows that one.
"""
ACTIONS = ("status", "stop")
# Runs the files that are here, rather than those of a source tree that is sent.
SENDS_SOURCES = False

_POLL = 10.0  # seconds between two questions to Slurm
_GRACE = 300.0  # seconds for which a job that is asked to end may save
_MARK = "ttt_jax:"  # what the comment of a job begins with; the identity of its command follows
_PASSES = Retry(
    on="Unable to contact slurm controller|Socket timed out|Connection (refused|reset|timed out)|Zero Bytes were "
    "transmitted|Transport endpoint is not connected|Resource temporarily unavailable|temporarily unable to accept",
    attempts=30,
)
_UNKNOWN_JOB = "Invalid job id"
_ENDED = {
    "COMPLETED": DONE,
    "FAILED": FAILED,  # or what the script exited with
    "CANCELLED": INTERRUPTED,
    "TIMEOUT": RESTART,
    "PREEMPTED": RESTART,
    "NODE_FAIL": RESTART,
    "BOOT_FAIL": RESTART,
    "REVOKED": RESTART,
    "DEADLINE": FAILED,
    "OUT_OF_MEMORY": FAILED,
}


class State(NamedTuple):
    """How a job is: the name of its state, the status it exited with, and its log."""

    name: str
    exit_status: int = 0
    log: Path | None = None

    @property
    def status(self) -> int | None:
        """What ttt exits with, once the job has ended."""
        if self.name == "FAILED" and self.exit_status in (REFUSED, RESTART, INTERRUPTED):
            return self.exit_status
        return _ENDED.get(self.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the target."""
    add = parser.add_argument
    add("--nodes", type=_positive, default=1, metavar="N", help="(default: 1)")
    add("--gpus-per-node", type=_positive, metavar="G", help="and as many processes")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}", help="as of sbatch")
    add("--time", metavar="LIMIT", help="as of sbatch, such as 8:00:00 or 2-0; the job goes on after it")
    add("--cpus-per-task", type=_positive, metavar="C", help="CPU cores for each process")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="any other, such as --sbatch=--exclusive")
    add("--setup", type=Path, metavar="FILE", help="a file that bash sources first, such as one with module load")
    add(
        "--folder",
        type=Path,
        metavar="DIR",
        help="for the log (default: slurm in the workdir; here, if that is a bucket)",
    )


def run(options: argparse.Namespace, job: Job, commands: Commands) -> int:
    """Runs the job to its end; returns its exit status."""
    folder = _folder(options, job)
    arguments = [] if options.action else _sbatch(options, job, folder)
    return lifecycle.run(options, job, commands, Slurm(job, commands, folder, arguments))


def check(options: argparse.Namespace, job: Job) -> None:
    """Raise ConfigError for what is missing. Local paths are right here: nodes and this machine share their files."""
    missing = options.gpus_per_node is None
    checks.required((missing, "--gpus-per-node", "how many GPUs each node has"), checks.command(job))
    checks.functions(job)
    if options.setup is not None and not options.setup.is_file():
        raise ConfigError(f"--setup {options.setup}: no such file")


class Slurm:
    """Slurm, seen by one job, which it knows by a number.

    Args:
      folder: for its files.
      sbatch: the command that submits it.
    """

    def __init__(self, job: Job, commands: Commands, folder: Path, sbatch: list[str]):
        self._job, self._commands, self._folder, self._sbatch = job, commands, folder, sbatch

    def find(self) -> str | None:
        """The number of the job of this name, if it is in the queue or runs.

        Raises:
          ConfigError: if that one was not submitted from here, or is another command.
        """
        question = ["squeue", "--me", "--noheader", f"--name={self._job.name}", "--format=%i|%k"]
        for line in self._commands.output(question, retry=_PASSES).splitlines():
            number, _, comment = line.strip().partition("|")
            if not comment.startswith(_MARK):
                raise ConfigError(f"job {number} has the name {self._job.name} already; expected another --name")
            if self._job.command and comment != _MARK + self._job.identity:
                raise ConfigError(
                    f"job {number} has the name {self._job.name} and runs another command; expected another --name, "
                    f"or first: ttt launch slurm --name {self._job.name} --stop"
                )
            return number
        return None

    def submit(self) -> str:
        """Puts the job into the queue; returns its number."""
        if not self._commands.dry_run:
            self._folder.mkdir(parents=True, exist_ok=True)
        printed = lifecycle.submit(self._commands, self._sbatch, _PASSES, self.find, _POLL)
        number = self.find() if printed is None else printed.strip().partition(";")[0]
        if number is None:
            raise LaunchError(f"{self._job.name}: was submitted, and is not in the queue any more")
        return number

    def describe(self, number: str) -> str:
        """How the job is."""
        state = self.state(number)
        return f"job {number}, {state.name}, its log is {state.log}"

    def state(self, number: str) -> State:
        """How a job is, also for some time after its end.

        Raises:
          LaunchError: if Slurm does not know it, or no more.
        """
        try:
            shown = self._commands.output(["scontrol", "show", "job", number], retry=_PASSES)
        except CommandError as error:
            if _UNKNOWN_JOB not in error.printed:
                raise
            return self._past_state(number)
        name, exit_status = re.search(r"JobState=(\w+)", shown), re.search(r"ExitCode=(\d+):", shown)
        log = re.search(r"^ *StdOut=(.*)$", shown, re.MULTILINE)
        if name is None or exit_status is None:
            raise LaunchError(f"scontrol show job {number}: no JobState and ExitCode in what it printed")
        path = Path(log[1].strip().replace("%j", number)) if log else None
        return State(name[1], int(exit_status[1]), path)

    def _past_state(self, number: str) -> State:
        question = ["sacct", f"--jobs={number}", "--allocations", "--noheader", "--parsable2"]
        with contextlib.suppress(CommandError, ConfigError):  # where there is no accounting
            answer = self._commands.output([*question, "--format=State,ExitCode"], retry=_PASSES).split("\n")[0]
            if match := re.match(r"(\w+).*\|(\d+):", answer):
                return State(match[1], int(match[2]))
        raise LaunchError(f"job {number}: Slurm does not know it any more; its log tells how it ended")

    def follow(self, number: str, from_start: bool) -> int:
        """Shows the log until the job ends; returns its exit status."""
        status = None
        for state in self._changes(number, from_start):
            status = state.status
            self._commands.note(f"{self._job.name}: job {number}, {state.name}")
        assert status is not None
        return status

    def _changes(self, number: str, from_start: bool) -> Iterator[State]:
        """The states of a job up to its last, while its log is shown."""
        last, log = None, None
        while True:
            state = self.state(number)
            if log is None and state.log:
                log = LogFile(state.log, only_end=not from_start)
            if state.status is not None:
                self._commands.wait(min(_POLL, 2.0))  # for what the file system has not brought yet
            if log:
                log.show()
            if state.name != last:
                yield state
            if state.status is not None:
                return
            last = state.name
            self._commands.wait(_POLL)

    def stop(self, number: str) -> None:
        """Ends the job: asks it to save, and to end; after a while, or another Ctrl-C, without asking."""
        state = self.state(number)
        stop_file = state.log.with_suffix(".stop") if state.log else None
        ended = state.status is not None
        try:
            if state.name == "RUNNING" and stop_file is not None:
                with contextlib.suppress(OSError):
                    stop_file.touch()
                self._commands.run(["scancel", "--signal=TERM", number], retry=_PASSES)
                self._commands.note(f"{self._job.name}: job {number} saves and ends")
                for _ in range(round(_GRACE / _POLL)):
                    self._commands.wait(_POLL)
                    if ended := self.state(number).status is not None:
                        break
        finally:
            if not ended:
                self._commands.run(["scancel", number], retry=_PASSES, finish=True)
            if stop_file is not None:
                with contextlib.suppress(OSError):
                    stop_file.unlink()


def _folder(options: argparse.Namespace, job: Job) -> Path:
    """Where the log goes."""
    of_a_run = job.workdir is not None and "://" not in job.workdir and job.command[0] != "tokenize"
    return (options.folder or Path(f"{job.workdir}/slurm" if of_a_run else "slurm")).resolve()


def _sbatch(options: argparse.Namespace, job: Job, folder: Path) -> list[str]:
    """The command that submits the job."""
    prefix = folder / job.name
    os.environ.update(job.environment)  # sbatch hands the environment on; on the command line all could read it
    arguments = [
        "sbatch",
        "--parsable",
        f"--job-name={job.name}",
        f"--comment={_MARK}{job.identity}",
        f"--output={str(prefix).replace('%', '%%')}-%j.log",
        f"--nodes={options.nodes}",
        f"--gpus-per-node={options.gpus_per_node}",
        f"--ntasks-per-node={options.gpus_per_node}",
    ]
    for name in ("partition", "account", "qos", "constraint", "time", "cpus_per_task"):
        if (value := getattr(options, name)) is not None:
            arguments.append(f"--{name.replace('_', '-')}={value}")
    setup = "" if options.setup is None else str(options.setup.resolve())
    script = [str(job.checkout / "launch" / "slurm.sbatch"), str(prefix), str(options.restarts), setup]
    return [*arguments, *options.sbatch, *script, sys.executable, "-m", "ttt_jax", *job.command]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more")
    return int(text)
