"""What Kubernetes knows of a JobSet: how it is, its pods and their log. Read only, through kubectl."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ttt_jax.launch import stream
from ttt_jax.launch.commands import Commands, Retry
from ttt_jax.terminal.stopping import DONE, FAILED, REFUSED, RESTART

PASSES = Retry(
    on="Unable to connect to the server|TLS handshake timeout|connection (refused|reset)|i/o timeout|unexpected EOF|"
    "etcdserver: (request timed out|leader changed)|the server is currently unable|context deadline exceeded|"
    "Too ?Many ?Requests|net/http: request canceled|HttpError.* 50[0-9]|ServiceUnavailable|Internal error",
    but_not="Unauthorized|[Ff]orbidden|PERMISSION_DENIED",
    attempts=20,
)


class Pod(NamedTuple):
    """The pod of a host, and its phase: it has a log from ``Running`` on."""

    name: str
    phase: str

    @property
    def has_log(self) -> bool:
        return self.phase in ("Running", "Succeeded", "Failed")


class JobSet:
    """A JobSet as it was at one moment."""

    def __init__(self, known: dict[str, Any]):
        self._known = known
        status = known.get("status", {})
        self._conditions = {c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"}
        self.restarts: int = status.get("restarts", 0)

    def variable(self, name: str) -> str | None:
        """The value of a variable of its containers."""
        for replicated in self._known["spec"]["replicatedJobs"]:
            for container in replicated["template"]["spec"]["template"]["spec"]["containers"]:
                for variable in container.get("env", []):
                    if variable["name"] == name:
                        return variable.get("value")
        return None

    @property
    def ended(self) -> bool:
        return not self._conditions.keys().isdisjoint(("Completed", "Failed"))

    @property
    def out_of_restarts(self) -> bool:
        return self._conditions.get("Failed", {}).get("reason") == "ReachedMaxRestarts"

    @property
    def completed(self) -> bool:
        return "Completed" in self._conditions

    def __str__(self) -> str:
        for kind in ("Completed", "Failed"):
            if kind in self._conditions:
                return f"{kind}: {self._conditions[kind].get('message', '')}"
        return "waits in the queue" if "Suspended" in self._conditions else f"runs, attempt {self.restarts + 1}"


class Cluster:
    """Questions about the JobSet ``name``.

    Args:
      kubectl: the command, with the options that name the cluster.
      container: of the pods, in which the command runs.
    """

    def __init__(self, commands: Commands, kubectl: Sequence[str], name: str, container: str):
        self._commands, self._kubectl, self._name, self._container = commands, kubectl, name, container

    def jobset(self) -> JobSet | None:
        """The JobSet; None where there is none."""
        question = [*self._kubectl, "get", "jobset", self._name, "--ignore-not-found", "--output=json"]
        answer = self._commands.output(question, retry=PASSES)
        return JobSet(json.loads(answer)) if answer.strip() else None

    def first_pod(self) -> Pod | None:
        """The newest pod of the first host."""
        for pod in self._pods():
            if pod["metadata"]["name"].startswith(f"{self._name}-slice-job-0-0-"):
                return Pod(pod["metadata"]["name"], pod["status"].get("phase", ""))
        return None

    def status(self, jobset: JobSet) -> int:
        """The exit status of a command that has ended."""
        if jobset.completed:
            return DONE
        if jobset.out_of_restarts:
            return RESTART
        # One pod has ended with a status that is not started again; the others with what losing it does to them.
        codes = {
            container["state"]["terminated"]["exitCode"]
            for pod in self._pods()
            for container in pod["status"].get("containerStatuses", [])
            if container["name"] == self._container and "terminated" in container["state"]
        }
        return REFUSED if REFUSED in codes and FAILED not in codes else FAILED

    def _pods(self) -> list[dict[str, Any]]:
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={self._name}"
        answer = self._commands.output([*self._kubectl, "get", "pods", selector, "--output=json"], retry=PASSES)
        return sorted(json.loads(answer)["items"], key=lambda pod: pod["metadata"]["creationTimestamp"], reverse=True)

    def log(self, from_start: bool, poll: float) -> "Log":
        """The log of the first host."""
        return Log(
            self._commands,
            [*self._kubectl, "logs", "--follow", f"--container={self._container}"],
            self,
            from_start,
            poll,
        )


class Log:
    """The log of the first host, through all its pods."""

    def __init__(
        self, commands: Commands, kubectl_logs: Sequence[str], cluster: Cluster, from_start: bool, poll: float
    ):
        self._commands, self._kubectl_logs, self._cluster, self._poll = commands, kubectl_logs, cluster, poll
        self._limit = "--tail=-1" if from_start else "--tail=50"
        self._pod, self._complete = "", False

    def show(self) -> None:
        """Shows what there is, and what comes until the pod has ended or the log breaks off."""
        pod = self._cluster.first_pod()
        if pod is None or not pod.has_log:
            return
        if pod.name != self._pod:
            if self._pod:
                self._limit = "--tail=-1"
            self._pod, self._complete = pod.name, False
        if self._complete:
            return
        silent = stream.show(
            self._commands,
            [*self._kubectl_logs, self._limit, pod.name],
            lambda: self._cluster.first_pod() != pod,
            self._poll,
        )
        self._complete = self._cluster.first_pod() != (pod.name, "Running")
        self._limit = f"--since={round(silent) + 1}s"  # what may have been missed is shown again
