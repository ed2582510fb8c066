"""Do on all hosts of slices, over ssh, what ``launch/worker.sh`` can: install, start, ask, follow and stop."""

import contextlib
import re
import shlex
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from ttt_jax.launch import sources
from ttt_jax.launch.commands import NEVER, TRANSIENT, Retry
from ttt_jax.launch.lifecycle import Target, is_final
from ttt_jax.storage.workdir import cache_folder
from ttt_jax.terminal.stopping import DONE, INTERRUPTED, RESTART

_Result = TypeVar("_Result")


class Host(NamedTuple):
    """A host, and the state of the command there."""

    node: str  # the slice
    number: str  # within it
    run: str
    state: str  # none, running, exited; lost when the machine has been started anew
    status: int | None = None  # with which the command exited
    when: int = 0  # it exited, in seconds

    def __str__(self) -> str:
        return f"worker {self.number} of {self.node}"

    @property
    def ending(self) -> str:
        """Return how the command ended here, for people."""
        if self.status is None:
            return "was started anew" if self.state == "lost" else "runs nothing"
        if self.status > 128 and self.status != INTERRUPTED:
            names = {number.value: number.name for number in signal.Signals}
            return f"was ended by {names.get(self.status - 128) or self.status}"
        return f"ended with status {self.status}"


class Verdict(NamedTuple):
    """The end of a run on all hosts together: the exit status, and the host that decides it; None when all agree."""

    status: int
    host: Host | None = None


def verdict(hosts: Sequence[Host]) -> Verdict:
    """Return how a run ended on all hosts.

    Statuses are those of ttt (docs/pods.md): one that says that the run cannot go on counts more than those that ask
    for another start, which the loss of a process brings about on the other hosts.
    """
    if all(host.status == DONE for host in hosts):
        return Verdict(DONE)
    final = [host for host in hosts if host.status is not None and is_final(host.status)]
    first = min(final or [host for host in hosts if host.status != DONE], key=lambda host: host.when)
    return Verdict(first.status if final and first.status else RESTART, first)


class Hosts:
    """All hosts of slices, by their names ``nodes``; ``target`` is ttt launch tpu for the job that runs there."""

    def __init__(self, target: Target, nodes: Sequence[str]):
        self._commands, self._job, self.nodes = target.commands, target.job, tuple(nodes)
        self._options = [*target.where, *["--internal-ip"] * target.options.internal_ips, "--quiet"]
        self._folder = cache_folder() / "launch"  # of what is sent
        self._tree = ""

    def install(self, extras: Sequence[str]) -> None:
        """Send the source tree and make the environment on all hosts, with the versions of this machine."""
        name, archive = self._job.name, self._folder / f"{self._job.name}.tar.gz"
        constraints = {"launch-constraints.txt": sources.constraints(extras)}
        self._tree = f"ttt-launch/{name}/source-{sources.archive(self._job.checkout, constraints, archive)}"
        sent = [str(archive)]
        unpack = f"mkdir -p {self._tree} && tar -xzf {archive.name} -C {self._tree} && "
        unpack += f"cp --remove-destination {self._tree}/launch/worker.sh ttt-launch/{name}/ && "

        def install_on(node: str) -> None:
            copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", *sent, f"{node}:", "--worker=all", *self._options]
            self._commands.run(copy, retry=TRANSIENT)
            install = self._ssh(node, "install", sources.PYTHON, ",".join(extras), before=unpack)
            self._commands.run(install, retry=TRANSIENT)

        with contextlib.ExitStack() as stack:
            if variables := self._job.environment:
                lines = {key: f"export {key}={shlex.quote(value)}" for key, value in variables.items()}
                path = self._folder / f"{name}.env"
                sent.append(stack.enter_context(self._commands.private_file(path, lines)))
            self._on_each(install_on)

    def start(self, run: str) -> None:
        """Start the command on all hosts; it continues without this process."""
        self._run("start", run, *self._job.command)

    def ask(self, retry: Retry = NEVER) -> list[Host]:
        """Return the state of the command on each host.

        Raises:
          CommandError: where a host cannot be reached.
        """
        line = re.compile(r"^ttt-worker (\S+) (\S+) (\w+)(?: (\d+) (\d+))? *$", re.MULTILINE)

        printed = self._on_each(lambda node: (node, self._commands.output(self._ssh(node, "status"), retry=retry)))
        return [
            Host(node, number, run, state, int(code) if code else None, int(when or 0))
            for node, text in printed
            for number, run, state, code, when in line.findall(text)
        ]

    def stop(self, seconds: int, verb: str = "stop") -> None:
        """End the command on all hosts: SIGTERM, upon which it saves, and SIGKILL after so many seconds."""
        self._run(verb, str(seconds))

    def tail(self, host: Host, lines: int) -> str:
        """Return the end of the log of one host."""
        tail = self._ssh(host.node, "tail", host.run, str(lines), worker=host.number)
        return self._commands.output(tail, retry=TRANSIENT)

    def log_command(self, run: str, offset: int) -> list[str]:
        """Return the command that prints the log of the first host from a byte on, until the run ends."""
        follow = self._ssh(self.nodes[0], "follow", run, str(offset), worker="0")
        return [*follow, "--ssh-flag=-oServerAliveInterval=30"]

    def _run(self, verb: str, *arguments: str) -> None:
        self._on_each(lambda node: self._commands.run(self._ssh(node, verb, *arguments), retry=TRANSIENT))

    def _ssh(self, node: str, verb: str, *arguments: str, worker: str = "all", before: str = "") -> list[str]:
        """Return the command that runs ``worker.sh VERB NAME ARGUMENTS...`` on workers of a node."""
        here = verb in ("install", "start")  # else on machines on which another process may have installed, or none
        script = f"{self._tree}/launch/worker.sh" if here else f"ttt-launch/{self._job.name}/worker.sh"
        run = before + shlex.join(["bash", script, verb, self._job.name, *arguments])
        if not here:
            none = 'echo "ttt-worker ? - none"' if verb == "status" else "true"
            run = f"if [ -f {script} ]; then {run}; else {none}; fi"
        program = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, f"--worker={worker}", *self._options]
        return [*program, f"--command={run}"]

    def _on_each(self, action: Callable[[str], _Result]) -> list[_Result]:
        if len(self.nodes) == 1 or self._commands.dry_run:
            return [action(node) for node in self.nodes]
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            try:
                return list(pool.map(action, self.nodes))
            except BaseException:
                self._commands.end_all()
                raise
