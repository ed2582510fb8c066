"""The hosts of slices, over ssh: what ``launch/worker.sh`` does there, from here."""

import codecs
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from ttt_jax.launch import versions
from ttt_jax.launch.commands import NEVER, Commands
from ttt_jax.launch.job import Job
from ttt_jax.launch.queued_resource import TRANSIENT
from ttt_jax.terminal.stopping import DONE, RESTART

_Result = TypeVar("_Result")
_STATUS = re.compile(r"^ttt-worker (\S+) (\S+) (\w+)(?: (\d+) (\d+))? *$", re.MULTILINE)


class Worker(NamedTuple):
    """One host, and how the command fares there."""

    node: str  # the slice
    number: str  # within it
    run: str
    state: str  # none, running, exited; lost when the machine has been started anew
    status: int | None = None  # with which the command exited
    when: int = 0  # it did, in seconds

    def __str__(self) -> str:
        return f"worker {self.number} of {self.node}"


class Verdict(NamedTuple):
    """How a run ended on all hosts together."""

    status: int
    worker: Worker | None = None  # that says so; None when all do

    @property
    def restart(self) -> bool:
        return self.status == RESTART


def verdict(workers: Sequence[Worker]) -> Verdict:
    """Of all hosts together. Statuses are those of ttt (docs/pods.md): one that says that the run cannot go on counts
    more than those that ask for another start, for these are what the loss of a process does to the others."""
    if all(worker.status == DONE for worker in workers):
        return Verdict(DONE)
    final = [w for w in workers if w.status is not None and 0 < w.status < 128 and w.status != RESTART]
    final += [w for w in workers if w.status == 130]
    if final:
        first = min(final, key=lambda worker: worker.when)
        assert first.status is not None
        return Verdict(first.status, first)
    return Verdict(RESTART, min((w for w in workers if w.status != DONE), key=lambda worker: worker.when))


class Workers:
    """All hosts of the slices of a job.

    Args:
      nodes: the slices.
      where: ``--zone`` and ``--project``, as gcloud wants them.
      internal: reach them by their internal addresses.
      folder: local, for what is sent.
    """

    def __init__(
        self, commands: Commands, job: Job, nodes: Sequence[str], where: Sequence[str], internal: bool, folder: Path
    ):
        self._commands, self._job, self._nodes = commands, job, tuple(nodes)
        self._options = [*where, *["--internal-ip"] * internal, "--quiet"]
        self._folder = folder
        self._tree = ""

    def install(self, extras: Sequence[str]) -> None:
        """Sends the source tree and makes the environment on all hosts, in the versions of this one.

        Raises:
          CommandError: where that fails.
        """
        name = self._job.name
        archive = self._folder / f"{name}.tar.gz"
        constraints = versions.constraints(extras)
        tree = versions.archive(self._job.checkout, {"launch-constraints.txt": constraints}, archive)
        sent = [str(archive)]
        if self._job.environment:
            sent.append(str(self._write_environment()))
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        self._tree = f"ttt-launch/{name}/source-{tree}"
        unpack = (
            f"mkdir -p {self._tree} && tar -xzf {archive.name} -C {self._tree} && "
            f"cp --remove-destination {self._tree}/launch/worker.sh ttt-launch/{name}/"
        )
        script = self._script("install", python, ",".join(extras))

        def on(node: str) -> None:
            copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", *sent, f"{node}:", "--worker=all", *self._options]
            self._commands.run(copy, retry=TRANSIENT)
            self._ssh(node, f"{unpack} && {script}")

        try:
            self._on_each(on)
        finally:
            if not self._commands.dry_run:
                (self._folder / f"{name}.env").unlink(missing_ok=True)

    def start(self, run: str) -> None:
        """Starts the command on all hosts; it goes on without this process."""
        script = self._script("start", run, *self._job.command)
        self._on_each(lambda node: self._ssh(node, script))

    def statuses(self, patient: bool = False) -> list[Worker]:
        """How the command fares on each host; with patience for hosts that have just been started.

        Raises:
          CommandError: where a host cannot be reached.
        """

        def on(node: str) -> list[Worker]:
            lines = re.findall(
                r"^ttt-worker (\S+) (\S+) (\w+)(?: (\d+) (\d+))? *$", self._ask(node, patient), re.MULTILINE
            )
            return [
                Worker(node, number, run, state, int(status) if status else None, int(when or 0))
                for number, run, state, status, when in lines
            ]

        return [worker for found in self._on_each(on) for worker in found]

    def stop(self, seconds: int, verb: str = "stop") -> None:
        """Ends the command on all hosts: SIGTERM, upon which it saves, and SIGKILL after so many seconds."""
        script = self._installed_script(verb, str(seconds))
        self._on_each(lambda node: self._ssh(node, script))

    def tail(self, worker: Worker, lines: int) -> str:
        """The end of the log of one host."""
        script = self._installed_script("tail", worker.run, str(lines))
        return self._commands.output(self._ssh_command(worker.node, script, worker.number), retry=TRANSIENT)

    def following(self, run: str, offset: int) -> list[str]:
        """The command that prints the log of the first host from there on, until the run ends."""
        script = self._installed_script("follow", run, str(offset))
        return [*self._ssh_command(self._nodes[0], script, "0"), "--ssh-flag=-oServerAliveInterval=30"]

    def _ask(self, node: str, patient: bool) -> str:
        argv = self._ssh_command(node, self._installed_script("status"), "all")
        return self._commands.output(argv, retry=TRANSIENT if patient else NEVER)

    def _ssh(self, node: str, script: str) -> None:
        self._commands.run(self._ssh_command(node, script, "all"), retry=TRANSIENT)

    def _ssh_command(self, node: str, script: str, worker: str) -> list[str]:
        program = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, f"--worker={worker}", *self._options]
        return [*program, f"--command={script}"]

    def _script(self, verb: str, *arguments: str) -> str:
        return shlex.join(["bash", f"{self._tree}/launch/worker.sh", verb, self._job.name, *arguments])

    def _installed_script(self, verb: str, *arguments: str) -> str:
        """For machines on which somebody else may have installed, or nobody."""
        script = f"ttt-launch/{self._job.name}/worker.sh"
        none = 'echo "ttt-worker ? - none"' if verb == "status" else "true"
        run = shlex.join(["bash", script, verb, self._job.name, *arguments])
        return f"if [ -f {script} ]; then {run}; else {none}; fi"

    def _on_each(self, action: Callable[[str], _Result]) -> list[_Result]:
        if len(self._nodes) == 1 or self._commands.dry_run:
            return [action(node) for node in self._nodes]
        with ThreadPoolExecutor(len(self._nodes)) as pool:
            try:
                return list(pool.map(action, self._nodes))
            except BaseException:
                self._commands.end_all()
                raise

    def _write_environment(self) -> Path:
        path = self._folder / f"{self._job.name}.env"
        names = ", ".join(self._job.environment)
        if self._commands.dry_run:
            self._commands.note(f"{path} has a line export KEY=VALUE for each of {names}; it is not written now")
            return path
        text = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in self._job.environment.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        return path


class LogStream:
    """Copies the log of the first host to standard output, in a thread, from its beginning or from where a connection
    broke.

    Args:
      ended: set when the log ends, or cannot be read for now.
    """

    def __init__(self, commands: Commands, workers: Workers, run: str, ended: threading.Event):
        self._commands, self._workers, self._run, self._ended = commands, workers, run, ended
        self._offset = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "LogStream":
        self.go_on()
        return self

    def go_on(self) -> None:
        """Connects again, if it is not connected."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._copy, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Waits for the end of the log of a run that has ended."""
        if self._thread is not None:
            self._thread.join(30)

    def __exit__(self, *exception) -> None:
        self._closed = True
        self._commands.end_all()

    def _copy(self) -> None:
        try:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            with self._commands.follow(self._workers.following(self._run, self._offset)) as process:
                assert process is not None
                assert process.stdout is not None
                while not self._closed and (piece := os.read(process.stdout.fileno(), 65536)):
                    self._offset += len(piece)
                    sys.stdout.write(decoder.decode(piece))
                    sys.stdout.flush()
        finally:
            self._ended.set()
