"""Ask Cloud TPU for slices through a queued resource, and know its accelerator types.

A queued resource carries two labels, the name of its job and the identity of what runs there. Nothing without them is
used or deleted.
"""

import json
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.text import Text

from ttt_jax.errors import ConfigError, LaunchError
from ttt_jax.launch.commands import TRANSIENT, CommandError, Retry
from ttt_jax.launch.lifecycle import Target
from ttt_jax.terminal import console
from ttt_jax.terminal.stopping import INTERRUPTED, RESTART

_DELETING = Retry(TRANSIENT.on + r"|FAILED_PRECONDITION|is not supported when state is", TRANSIENT.but_not, attempts=10)
_NOT_FOUND = r"NOT_FOUND|was not found|HTTPError 404"
_NO_CAPACITY = r"no more capacity|out of capacity|[Ss]tockout|insufficient capacity|not enough capacity"
_QUEUED = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
_LOST = ("SUSPENDING", "SUSPENDED", "FAILED")
_LOST_NODES = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDDEN", "UNKNOWN")
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0  # seconds between two attempts to have machines


class Accelerator(NamedTuple):
    """The slice that a name such as ``v5litepod-256`` stands for."""

    name: str
    devices: int  # as JAX counts: chips, but cores of v2 and v3
    several_hosts: bool
    runtime_version: str


# cloud.google.com/tpu/docs/supported-tpu-configurations and runtimes; of each generation: what the number in the name
# counts for a chip (2 cores, or 1), the most chips of a host, and the runtime version.
_GENERATIONS = {
    "v2": (2, 4, "tpu-ubuntu2204-base"),
    "v3": (2, 4, "tpu-ubuntu2204-base"),
    "v4": (2, 4, "tpu-ubuntu2204-base"),
    "v5litepod": (1, 8, "v2-alpha-tpuv5-lite"),
    "v5p": (2, 4, "v2-alpha-tpuv5"),
    "v6e": (1, 8, "v2-alpha-tpuv6e"),
}


def parse(name: str) -> Accelerator:
    """Read an accelerator type, such as ``v5litepod-256`` or ``v4-32`` (32 cores, 16 chips).

    Raises:
      ConfigError: for a name that is no accelerator type.
    """
    generation, _, digits = name.partition("-")
    per_chip, most, runtime_version = _GENERATIONS.get(generation, (1, 0, ""))
    number = int(digits) if re.fullmatch(r"\d+", digits) else 0
    if not runtime_version or number < 1 or number % per_chip:
        example = "v5litepod-256, v6e-64, v5p-128 or v4-32 (these two count cores, two a chip)"
        known = ", ".join(_GENERATIONS)
        raise ConfigError(f"--accelerator {name}: expected an accelerator type, such as {example}; known are {known}")
    chips = number // per_chip
    return Accelerator(name, number if generation in ("v2", "v3") else chips, chips > most, runtime_version)


class GoneError(LaunchError):
    """The machines did not come in time (status 75), or somebody else has deleted them (130)."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Found(NamedTuple):
    """The state of a queued resource that exists, as gcloud reports it."""

    state: str  # ACCEPTED, ACTIVE, SUSPENDED, ...
    error: str  # why it failed, if it has
    nodes: tuple[str, ...]  # slices


class QueuedResource:
    """The queued resource of a job in a zone, which may not exist; ``target`` is ttt launch tpu for that job."""

    def __init__(self, target: Target):
        self._target, self._commands, self.name = target, target.commands, target.job.name
        slices = target.options.slices  # the names of those that are asked for:
        self.nodes = (self.name,) if slices == 1 else tuple(f"{self.name}-{i}" for i in range(slices))
        self.deletion = [*self._gcloud("queued-resources", "delete"), "--force", "--quiet"]  # with its slices

    def create(self) -> None:
        """Put the request into the queue, unless an earlier attempt has done so.

        Raises:
          CommandError: when it is refused.
        """
        options = self._target.options
        accelerator = parse(options.accelerator)
        several = [f"--node-count={options.slices}", f"--node-prefix={self.name}"]
        request = [f"--node-id={self.name}"] if options.slices == 1 else several
        request.append(f"--accelerator-type={accelerator.name}")
        request.append(f"--runtime-version={options.runtime_version or accelerator.runtime_version}")
        request += self._target.given("spot", "best-effort", "reserved")
        request += self._target.given("network", "subnetwork", "service-account", "internal-ips")
        request.append(f"--labels=ttt-launch={self.name},ttt-command={self._target.identity}")
        gcloud, *create = self._gcloud("queued-resources", "create")
        argv = [gcloud, *["alpha"] * options.best_effort, *create, *request, "--async", "--quiet"]
        self._commands.run(argv, retry=TRANSIENT, finish=True, done=self.find)

    def find(self) -> Found | None:
        """Return what is known of it; None where it does not exist.

        Raises:
          ConfigError: for one that ttt launch did not make, or that runs another command.
        """
        described = self._describe("queued-resources", self.name)
        if described is None:
            return None
        about = described.get("state", {})
        specs = described.get("tpu", {}).get("nodeSpec", [])
        nodes = tuple(spec["nodeId"] for spec in specs if spec.get("nodeId")) or self.nodes
        labels = specs[0].get("node", {}).get("labels", {}) if specs else {}
        state = about.get("state", "STATE_UNSPECIFIED")
        if not labels and state == "ACTIVE":
            labels = (self._describe("tpu-vm", nodes[0]) or {}).get("labels", {})
        identity = labels.get("ttt-command", "") if labels.get("ttt-launch") == self.name else None
        self._target.check_ours(f"the queued resource {self.name}", identity)
        return Found(state, about.get("failedData", {}).get("error", {}).get("message", ""), nodes)

    def get(self) -> tuple[tuple[str, ...], bool]:
        """Wait for the slices. Those of this job that exist are used; lost ones are deleted and asked for anew.

        Returns:
          The names of the slices, and whether they are new.

        Raises:
          GoneError: when they do not come within ``--timeout``, or somebody deletes them meanwhile.
          LaunchError: when they cannot be had.
        """
        name, options, note = self.name, self._target.options, self._commands.note
        began, pause, shown, new = time.monotonic(), FIRST_PAUSE, "", False
        with console.literal(stderr=True).status("") as line:
            while (found := self.find()) is None or found.state != "ACTIVE":
                waited = time.monotonic() - began
                if found is None:
                    if new:
                        raise GoneError(f"{name}: was deleted by somebody else", INTERRUPTED)
                    several = f"{options.slices} x " if options.slices > 1 else ""
                    note(f"{name}: asks for {several}{options.accelerator}")
                    self.create()
                    new = True
                    continue
                line.update(Text(f"{name}: {found.state}, {console.duration(waited)}"))
                if found.state != shown:
                    note(f"{name}: {found.state}")
                    shown = found.state
                if found.state in _QUEUED:
                    if waited > (options.timeout or math.inf):
                        after = f"after {console.duration(waited)}, which is the --timeout"
                        raise GoneError(f"{name}: is {found.state} {after}", RESTART)
                    time.sleep(options.poll)
                    continue
                self.delete()
                if new:
                    if found.error and not re.search(_NO_CAPACITY, found.error):
                        raise LaunchError(f"{name}: cannot be had: {found.error}")
                    note(f"{name}: {found.error or 'was lost at once'}; asks anew in {pause:.0f} s")
                    time.sleep(pause)
                    pause, new = min(2 * pause, LONGEST_PAUSE), False
            return found.nodes, new

    def lost(self, nodes: Sequence[str]) -> str | None:
        """Return why the slices cannot be used any more; None where they exist as far as Google knows.

        Raises:
          GoneError: when somebody has deleted them.
          CommandError: when nobody can tell, such as without a network.
        """
        found = self.find()
        if found is None or found.state == "DELETING":
            raise GoneError(f"{self.name}: was deleted by somebody else", INTERRUPTED)
        if found.state in _LOST:
            return f"the machines are {found.state}"
        for node in nodes:  # the queued resource may not know it yet
            described = self._describe("tpu-vm", node)
            if described is None or described.get("state") in _LOST_NODES:
                return f"{node} is {described['state'] if described else 'gone'}"
        return None

    def delete(self) -> None:
        """Delete it with its slices, if it exists and is of this job.

        Raises:
          LaunchError: where it cannot be deleted.
        """
        if not self._commands.dry_run and self.find() is None:
            return
        try:
            self._commands.run(self.deletion, retry=_DELETING)
        except CommandError as error:
            if not re.search(_NOT_FOUND, error.printed):
                raise

    def _describe(self, kind: str, name: str) -> dict[str, Any] | None:
        try:
            printed = self._commands.output([*self._gcloud(kind, "describe", name), "--format=json"], retry=TRANSIENT)
        except CommandError as error:
            if re.search(_NOT_FOUND, error.printed):
                return None
            raise
        return json.loads(printed) if printed else None

    def _gcloud(self, kind: str, verb: str, name: str = "") -> list[str]:
        return ["gcloud", "compute", "tpus", kind, verb, name or self.name, *self._target.where]
