"""SkyPilot: managed jobs on whatever cloud has the accelerators, TPUs or GPUs."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ttt_jax.errors import ConfigError, LaunchError
from ttt_jax.launch import accelerators, checks, lifecycle, stream, versions
from ttt_jax.launch.commands import CommandError, Commands, Retry
from ttt_jax.launch.job import Job
from ttt_jax.launch.shell_word import plain
from ttt_jax.storage.workdir import cache_folder
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, REFUSED, RESTART

DESCRIPTION = """\
Runs a command of ttt as a managed job of SkyPilot, which finds machines for it, installs this source tree with the
versions of this machine there, makes new ones after a preemption, and deletes them in the end.

Ctrl-C cancels the job; SkyPilot does not wait for it to save, so what it has done since its last checkpoint is lost.
The same command while the job waits or runs follows that one.
"""
ACTIONS = ("status", "stop")

_POLL = 30.0  # seconds between two questions to SkyPilot
_FOLDER = "~/ttt-launch"  # there
# Statuses after which the same command goes on: that of ttt, abort (of JAX, when another process is lost) and SIGTERM.
_RECOVERED = (RESTART, 134, 143)
_PASSES = Retry(
    on="Could not connect to SkyPilot API server|Failed to connect to jobs controller|Connection (refused|reset)|"
    "[Rr]ead timed out|Connection aborted|50[234] (Server Error|Bad Gateway|Service Unavailable|Gateway Time)",
    attempts=12,
)
_NO_JOBS = "No in-progress managed jobs"  # what it says before there has ever been one
_ENDED = {
    "SUCCEEDED": DONE,
    "CANCELLED": INTERRUPTED,
    "FAILED": FAILED,  # or what the command exited with
    "FAILED_SETUP": FAILED,
    "FAILED_PRECHECKS": REFUSED,
    "FAILED_NO_RESOURCE": RESTART,
    "FAILED_CONTROLLER": RESTART,
}


class Record(NamedTuple):
    """A job as ``sky jobs queue`` has it."""

    number: int
    state: str
    recoveries: int
    failure: str

    @property
    def status(self) -> int | None:
        """What ttt exits with, once the job has ended."""
        if self.state == "FAILED" and (match := re.search(r"exit codes? \[?([\d, ]+)", self.failure)):
            codes = {int(code) for code in re.findall(r"\d+", match[1])}
            # One that says that the run cannot go on counts more than what losing a process does to the others.
            for final in (FAILED, REFUSED, INTERRUPTED):
                if final in codes:
                    return final
            return RESTART if any(code == RESTART or code >= 128 for code in codes) else FAILED
        return _ENDED.get(self.state)

    def __str__(self) -> str:
        return f"{self.state}{f', recovered {self.recoveries} times' if self.recoveries else ''}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the target."""
    add = parser.add_argument_group("machines").add_argument
    add("--accelerator", metavar="NAME[:N]", help="of each node, as SkyPilot calls them: tpu-v5litepod-8, H100:8, ...")
    add("--cpus", metavar="N", help="instead: machines without accelerators, such as 32+")
    add("--nodes", type=_positive, default=1, metavar="N", help="with GPUs (default: 1)")
    add("--infra", metavar="CLOUD[/REGION[/ZONE]]", help="where (default: where it is cheapest)")
    add("--spot", action="store_true", help="cheaper, and may be preempted")
    add("--disk-size", type=_positive, metavar="GB", help="(default: that of SkyPilot)")


def run(options: argparse.Namespace, job: Job, commands: Commands) -> int:
    """Runs the job to its end; returns its exit status."""
    return lifecycle.run(options, job, commands, ManagedJobs(options, job, commands))


def check(options: argparse.Namespace, job: Job) -> None:
    """Raise ConfigError for whatever would fail there and can be seen from here."""
    neither = options.accelerator is None and options.cpus is None
    kinds = "one, such as tpu-v5litepod-8 or H100:8, or --cpus instead"
    checks.required((neither, "--accelerator", kinds), checks.command(job))
    if options.accelerator is not None and options.cpus is not None:
        raise ConfigError("--accelerator: expected one, or --cpus instead, not both")
    checks.bucket(job, "the machines are deleted in the end")
    checks.no_local_files(job)


class ManagedJobs:
    """The managed jobs of SkyPilot, seen by one of them, which they know by a number.

    Its name there ends with the identity of the command, by which it is known as one that ttt launch has submitted.
    """

    def __init__(self, options: argparse.Namespace, job: Job, commands: Commands):
        self._options, self._job, self._commands = options, job, commands
        self._name = f"{job.name}-{job.identity}"

    def find(self) -> str | None:
        """The number of the job, if it waits or runs."""
        for name, record in self._queue("--skip-finished"):
            if not re.fullmatch(rf"{self._job.name}-[0-9a-f]{{12}}", name) or record.status is not None:
                continue
            if self._job.command and name != self._name:
                raise ConfigError(
                    f"the managed job {record.number} of the name {self._job.name} runs another command; expected "
                    f"another --name, or first: ttt launch sky --name {self._job.name} --stop"
                )
            return str(record.number)
        return None

    def submit(self) -> str:
        """Submits the job; returns its number."""
        packed, file = (cache_folder() / "launch" / f"{self._name}{end}" for end in (".tar.gz", ".yaml"))
        task = yaml.safe_dump(self._task(packed), sort_keys=False, allow_unicode=True, width=float("inf"))
        platform = checks.extras(self._job, self._platform)
        if self._commands.dry_run:
            self._commands.note(f"{packed}: the source tree {self._job.checkout}, with the versions of this machine")
            print(f"cat >{file} <<'END'\n{task}END")
        else:
            constraints = {"launch-constraints.txt": versions.constraints(platform)}
            versions.archive(self._job.checkout, constraints, packed)
            file.write_text(task)
        os.environ.update(
            self._job.environment
        )  # from where sky takes them, as on the command line all could read them
        secrets = [f"--secret={key}" for key in self._job.environment]
        arguments = ["sky", "jobs", "launch", f"--name={self._name}", "--yes", "--detach-run", *secrets, str(file)]
        try:
            lifecycle.submit(self._commands, arguments, _PASSES, self.find, _POLL)
        except CommandError as error:
            self._commands.note(error.printed.rstrip())
            raise LaunchError(f"{error}; all that it said is above") from error
        if self._commands.dry_run:
            return "NUMBER"
        ours = [record.number for name, record in self._queue() if name == self._name]
        if not ours:
            raise LaunchError(f"{self._name}: was submitted, and sky jobs queue does not have it")
        return str(max(ours))

    def describe(self, number: str) -> str:
        """How the job is."""
        return f"managed job {number}, {self._record(number)}"

    def follow(self, number: str, from_start: bool) -> int:
        """Show the log until the job ends, and return its exit status. Cancel it after too many recoveries.

        The log of a job that has ended before it is asked about is shown, too.
        """
        said, shown = "", False

        def over() -> bool:
            nonlocal said
            record = self._record(number)
            if str(record) != said:
                said = str(record)
                self._commands.note(f"{self._job.name}: {said}")
            return record.status is not None or record.recoveries > self._options.restarts

        tail = "--tail=0" if from_start else "--tail=50"
        while not over() or not shown:
            shown = True
            stream.show(self._commands, ["sky", "jobs", "logs", "--follow", tail, number], over, _POLL)
            tail = "--tail=50"  # where it breaks off while the job goes on
            if not over():
                self._commands.wait(_POLL)
        record = self._record(number)
        if record.status is None:
            self._commands.note(
                f"{self._job.name}: recovered {record.recoveries} times, more than --restarts; is cancelled"
            )
            self.stop(number)
            return RESTART
        if record.failure:
            self._commands.note(f"{self._job.name}: {record.failure}")
        return record.status

    def stop(self, number: str) -> None:
        """Cancels the job."""
        self._commands.run(["sky", "jobs", "cancel", "--yes", number], retry=_PASSES, finish=True)

    def _record(self, number: str) -> Record:
        for _, record in self._queue():
            if str(record.number) == number:
                return record
        raise LaunchError(f"managed job {number}: sky jobs queue does not have it any more")

    def _queue(self, *options: str) -> list[tuple[str, Record]]:
        """Names and jobs, those of others left out."""
        question = ["sky", "jobs", "queue", "--all", "--verbose", *options, "--output=json"]
        try:
            answer = self._commands.output(question, retry=_PASSES)
        except CommandError as error:
            if _NO_JOBS in error.printed:
                return []
            raise
        if (start := re.search(r"^\[", answer, re.MULTILINE)) is None:
            if answer.strip() and _NO_JOBS not in answer:
                raise LaunchError(f"{' '.join(question)}: printed no list; expected SkyPilot 0.14 or later")
            return []
        known: list[dict[str, Any]] = json.JSONDecoder().raw_decode(answer, start.start())[0]
        return [
            (
                job["job_name"] or "",
                Record(job["job_id"], job["status"], job.get("recovery_count") or 0, job.get("failure_reason") or ""),
            )
            for job in known
        ]

    @property
    def _platform(self) -> str | None:
        if self._options.accelerator is None:
            return None
        return "tpu" if self._options.accelerator.startswith("tpu-") else "cuda"

    def _task(self, packed: Path) -> dict[str, Any]:
        """The task, as its YAML has it."""
        options, job = self._options, self._job
        resources: dict[str, Any] = {
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": list(_RECOVERED)}
        }
        for key in ("infra", "cpus", "disk_size"):
            if (value := getattr(options, key)) is not None:
                resources[key] = value
        if options.accelerator is not None:
            resources["accelerators"] = options.accelerator
        if options.spot:
            resources["use_spot"] = True
        several = options.nodes > 1
        if self._platform == "tpu":
            if several:
                raise ConfigError("--nodes: of GPUs only; expected a larger slice, such as tpu-v5litepod-16")
            accelerator = accelerators.parse(options.accelerator.removeprefix("tpu-").removesuffix(":1"))
            several = accelerator.several_hosts
            if not re.match("k8s|kubernetes", options.infra or ""):
                resources["accelerator_args"] = {"runtime_version": accelerator.runtime_version}
        checks.one_host(job, several)
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        script = f"{_FOLDER}/source/launch/sky.sh"
        extras = ",".join(checks.extras(job, self._platform))
        there = f"{_FOLDER}/source.tar.gz"
        unpack = f"rm -rf {_FOLDER}/source && mkdir -p {_FOLDER}/source && tar -xzf {there} -C {_FOLDER}/source"
        return {
            "name": self._name,
            "resources": resources,
            "num_nodes": options.nodes,
            "file_mounts": {there: str(packed)},
            "setup": f"{unpack} && bash {script} setup {python} {extras}",
            "run": f"exec bash {script} run {self._platform or 'cpu'} {' '.join(map(plain, job.command))}",
        }


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more")
    return int(text)
