"""A queued resource of Cloud TPU: a request for one slice or several, and the slices once they are there.

What is created carries two labels, the name of the job and the identity of what it runs. Nothing without them is used
or deleted.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ttt_jax.errors import LaunchError
from ttt_jax.launch.commands import CommandError, Commands, Retry

# What gcloud prints of faults that pass: of the API (google.rpc.Code UNAVAILABLE, INTERNAL, DEADLINE_EXCEEDED, ABORTED,
# rates of requests), of the network, and of machines whose ssh daemon is not up yet.
TRANSIENT = Retry(
    on=(
        r"UNAVAILABLE|INTERNAL\b|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|rateLimitExceeded|Rate Limit Exceeded|"
        r"[Qq]uota exceeded for quota metric|HTTPError (?:429|500|502|503|504)|"
        r"[Ii]nternal error|[Ss]ervice (?:is currently )?unavailable|[Bb]ackend [Ee]rror|"
        r"[Cc]onnection (?:refused|reset|timed out|closed)|[Oo]peration timed out|[Tt]imed out|Broken pipe|"
        r"Temporary failure|Max retries exceeded|Unable to find the server|Name or service not known|"
        r"No route to host|Network is unreachable|kex_exchange_identification|\[255\]|exit status 255"
    ),
    # Limits of a project in chips come with the code of rates that are too high, but waiting does not raise them.
    but_not=r"Quota limit '|PERMISSION_DENIED|INVALID_ARGUMENT|does not have permission",
)
_DELETING = Retry(TRANSIENT.on + r"|FAILED_PRECONDITION|is not supported when state is", TRANSIENT.but_not, attempts=10)
_NOT_FOUND = r"NOT_FOUND|was not found|HTTPError 404"
_ALREADY_EXISTS = r"ALREADY_EXISTS|already exists|HTTPError 409"
NO_CAPACITY = r"no more capacity|out of capacity|[Ss]tockout|insufficient capacity|not enough capacity"

QUEUED = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
LOST = ("SUSPENDING", "SUSPENDED", "FAILED")
_GONE_NODES = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDDEN", "UNKNOWN")


class State(NamedTuple):
    """What is known of a queued resource."""

    state: str  # ACCEPTED, ACTIVE, SUSPENDED, ...
    error: str  # why it failed, if it has
    nodes: tuple[str, ...]  # slices
    labels: dict[str, str]


class QueuedResource:
    """A queued resource of a name in a zone, which may not exist.

    Args:
      name: of the job.
      identity: of what it runs; empty where that does not matter.
      where: ``--zone`` and ``--project``, as gcloud wants them.
      slices: how many.
    """

    def __init__(self, commands: Commands, name: str, identity: str, where: Sequence[str], slices: int = 1):
        self.name = name
        self.commands = commands
        self.where = tuple(where)
        self.slices = slices
        self._labels = {"ttt-launch": name, "ttt-command": identity}
        self._gcloud = ("gcloud", "compute", "tpus", "queued-resources")

    @property
    def deletion(self) -> list[str]:
        """The command that deletes it, with its slices."""
        return [*self._gcloud, "delete", self.name, *self.where, "--force", "--quiet"]

    def create(self, options: Sequence[str], alpha: bool = False) -> None:
        """Puts the request into the queue; where an earlier attempt has done so already, all is well.

        Raises:
          CommandError: when it is refused.
        """
        program = [self._gcloud[0], *["alpha"] * alpha, *self._gcloud[1:]]
        several = [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        nodes = [f"--node-id={self.name}"] if self.slices == 1 else several
        labels = "--labels=" + ",".join(f"{key}={value}" for key, value in self._labels.items())
        argv = [*program, "create", self.name, *self.where, *nodes, *options, labels, "--async", "--quiet"]
        try:
            self.commands.run(argv, retry=TRANSIENT, finish=True)
        except CommandError as error:
            if not _matches(_ALREADY_EXISTS, error.printed) or self.find() is None:
                raise

    def find(self) -> State | None:
        """Its state; None where there is no such resource.

        Raises:
          LaunchError: where there is one of that name that is not of this job.
          CommandError: when nobody can tell.
        """
        argv = [*self._gcloud, "describe", self.name, *self.where, "--format=json"]
        try:
            printed = self.commands.output(argv, retry=TRANSIENT)
        except CommandError as error:
            if _matches(_NOT_FOUND, error.printed):
                return None
            raise
        if self.commands.dry_run:
            return None
        state = self._read(printed)
        if state.labels.get("ttt-launch") != self.name:
            raise LaunchError(
                f"{self.name}: a queued resource of this name exists that ttt launch did not create (it has no label "
                f"ttt-launch={self.name}); it is left alone; expected another --name"
            )
        if self._labels["ttt-command"] not in ("", state.labels.get("ttt-command")):
            raise LaunchError(
                f"{self.name}: runs another command, or on other machines; expected that one to be ended first "
                f"(ttt launch tpu --name {self.name} ... --stop), or another --name"
            )
        return state

    def delete(self) -> None:
        """Deletes it with its slices, and waits until it is gone. Only what has our labels, and only what exists.

        Raises:
          LaunchError: where it is not of this job, or cannot be deleted; the message has the command to try by hand.
        """
        if not self.commands.dry_run and self.find() is None:
            return
        try:
            self.commands.run(self.deletion, retry=_DELETING)
        except CommandError as error:
            if not _matches(_NOT_FOUND, error.printed):
                raise

    def lost_nodes(self, nodes: Sequence[str]) -> str | None:
        """The first slice that is gone though the queued resource does not say so, with its state; None if none is.

        Raises:
          CommandError: when nobody can tell.
        """
        for node in nodes:
            try:
                state = self._node(node).get("state", "")
            except CommandError as error:
                if _matches(_NOT_FOUND, error.printed):
                    return f"{node} is gone"
                raise
            if state in _GONE_NODES:
                return f"{node} is {state}"
        return None

    def _node(self, node: str) -> dict[str, Any]:
        argv = ["gcloud", "compute", "tpus", "tpu-vm", "describe", node, *self.where, "--format=json"]
        return json.loads(self.commands.output(argv, retry=TRANSIENT))

    def _read(self, printed: str) -> State:
        described = json.loads(printed)
        about = described.get("state", {})
        specs = described.get("tpu", {}).get("nodeSpec", [])
        nodes = tuple(spec["nodeId"] for spec in specs if spec.get("nodeId")) or self.nodes
        labels = specs[0].get("node", {}).get("labels", {}) if specs else {}
        state = about.get("state", "STATE_UNSPECIFIED")
        if not labels and state == "ACTIVE":
            labels = self._node(nodes[0]).get("labels", {})
        error = about.get("failedData", {}).get("error", {}).get("message", "")
        return State(state, error, nodes, labels)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The slices by the names that were asked for."""
        if self.slices == 1:
            return (self.name,)
        return tuple(f"{self.name}-{i}" for i in range(self.slices))


def _matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None
