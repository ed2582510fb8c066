"""Google Kubernetes Engine: TPU slices of a cluster, through xpk, which makes a JobSet of each workload."""

import argparse
import functools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from ttt_jax.errors import ConfigError, LaunchError
from ttt_jax.launch import sources
from ttt_jax.launch.commands import TRANSIENT, Commands, quoted
from ttt_jax.launch.job import Job, check_files, extras
from ttt_jax.launch.lifecycle import PATIENT, Begin, State, Target, exit_status, required
from ttt_jax.storage.workdir import cache_folder
from ttt_jax.terminal.console import positive
from ttt_jax.terminal.stopping import DONE, FAILED, REFUSED, RESTART

_GRACE = 120  # seconds that pods have for saving when they are deleted
_MARK = "TTT_JAX_COMMAND"  # variable of the container whose value is the identity of the command
_CONTAINER = "jax-tpu"  # the name that xpk gives


class Gke(Target):
    """A cluster, seen by one workload, which it knows by its name."""

    DESCRIPTION = """\
Run a command of ttt as a workload of a GKE cluster that xpk has made: on all hosts of a TPU slice, or of several, in
an image of this source tree.

The workload is started again after a preemption. Ctrl-C deletes it, after it has saved. The same command while the
workload waits or runs follows that one.
"""

    def __init__(self, options: argparse.Namespace, job: Job, commands: Commands):
        super().__init__(options, job, commands)
        required(_cluster(options))
        _check_names(options)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("machines").add_argument
        add("--cluster", help="made by xpk cluster create")
        add("--tpu-type", metavar="TYPE", help="of each slice: v5litepod-256, v6e-64, v5p-128, ...")
        add("--slices", type=positive, default=1, metavar="N", help="so many, joined by the data center network")
        add("--zone", help="where (default: compute/zone of gcloud config)")
        add("--project", help="whose (default: core/project of gcloud config)")
        add("--priority", choices=["very-low", "low", "medium", "high", "very-high"], help="(default: medium)")
        tier = parser.add_mutually_exclusive_group()  # of clusters with autoprovisioning
        tier.add_argument("--spot", action="store_true", help="cheaper, where the cluster makes nodes on demand")
        tier.add_argument("--on-demand", action="store_true", help="the same, not cheaper")
        tier.add_argument("--reservation", metavar="NAME", help="the same, of a reservation")
        made = parser.add_mutually_exclusive_group()
        made.add_argument("--image", help="that was built from launch/Dockerfile, and is used as it is")
        made.add_argument("--build", metavar="REPOSITORY", help="build an image of this source tree and push it there")

    @staticmethod
    def check(options: argparse.Namespace, job: Job) -> None:
        _check_names(options)
        required(
            _cluster(options),
            (options.tpu_type, "--tpu-type", "one such as v5litepod-256"),
            (options.image or options.build, "--image", "an image, or --build and where to put one"),
            job=job,
        )
        for option in ("image", "build"):
            image = getattr(options, option)
            if image is not None and not re.fullmatch(r"[a-z0-9][A-Za-z0-9_.:/@-]*", image):
                example = "us-docker.pkg.dev/PROJECT/REPOSITORY/ttt_jax"
                raise ConfigError(f"--{option} {image}: expected an image, such as {example}")
        if ":" in (options.build or "").rpartition("/")[2]:
            raise ConfigError(f"--build {options.build}: expected no tag; it is made of what is in the image")
        check_files(job, "the machines are deleted in the end")

    def find(self) -> str | None:
        jobset, name = self._jobset(), self.job.name
        if jobset is None:
            return None
        mark = _identity(jobset)
        if mark is None or not _conditions(jobset).keys() & {"Completed", "Failed"}:
            self.check_ours(f"the workload {name}", mark)
            return name
        return None

    def submit(self) -> str:
        """Create the workload, in the place of one of the same name that has ended."""
        options, job = self.options, self.job
        self.stop(job.name)
        image = options.image or self._build()
        arguments = [
            *("xpk", "workload", "create", f"--workload={job.name}", *self.where),
            *(f"--tpu-type={options.tpu_type}", f"--num-slices={options.slices}", f"--docker-image={image}"),
            # xpk starts all pods again for statuses from 127, which are kills, and for these.
            *(f"--max-restarts={options.restarts}", f"--restart-on-exit-codes={RESTART}"),
            f"--termination-grace-period-seconds={_GRACE}",
            *self.given("spot", "on-demand", "priority", "reservation"),
        ]
        # A value goes between the double quotes of YAML, where Kubernetes replaces $(NAME), and $$ by $.
        quoted_value = functools.partial(yaml.safe_dump, default_style='"', width=float("inf"))
        variables = {_MARK: job.identity, **job.environment}
        lines = {k: f"{k}={quoted_value(v).strip()[1:-1].replace('$', '$$')}" for k, v in variables.items()}
        with self.commands.private_file(cache_folder() / "launch" / f"{job.name}.env", lines) as file:
            command = f"--command=exec ttt {' '.join(map(quoted, job.command))}"
            self.run_submission([*arguments, f"--env-file={file}", command])
        return job.name

    def state(self, key: str) -> State:
        jobset = self._jobset()
        if jobset is None:
            raise LaunchError(f"{key}: the workload was deleted by somebody else")
        items = self._get("pods", f"--selector=jobset.sigs.k8s.io/jobset-name={key}")["items"]
        pods = sorted(items, key=lambda pod: pod["metadata"]["creationTimestamp"], reverse=True)
        log, growing = "", True
        for pod in pods:  # the newest of the first host that has a log
            name, phase = pod["metadata"]["name"], pod["status"].get("phase")
            if name.startswith(f"{key}-slice-job-0-0-") and phase in ("Running", "Succeeded", "Failed"):
                log, growing = name, phase == "Running"
                break
        conditions = _conditions(jobset)
        for kind in conditions.keys() & {"Completed", "Failed"}:
            text = f"{kind}: {conditions[kind].get('message', '')}"
            return State(text, _status(kind, conditions[kind].get("reason"), pods), log, growing)
        attempt = f"runs, attempt {jobset.get('status', {}).get('restarts', 0) + 1}"
        return State("waits in the queue" if "Suspended" in conditions else attempt, None, log, growing)

    def log_command(self, log: str, begin: Begin) -> list[str]:
        """Return the command that follows the log of a pod; what may have been missed is shown again."""
        limit = {"start": "--tail=-1", "end": "--tail=50"}.get(str(begin)) or f"--since={round(float(begin)) + 1}s"
        return [*self._kubectl, "logs", "--follow", f"--container={_CONTAINER}", limit, log]

    def stop(self, key: str) -> None:
        """Delete the workload, if there is one of ttt launch; its pods save first."""
        # Never without --workload: xpk would delete all workloads of the cluster.
        delete = ["xpk", "workload", "delete", f"--workload={key}", *self.where, "--force"]
        jobset = self._jobset()
        if jobset is not None and _identity(jobset) is not None:
            self.commands.run(delete, retry=PATIENT, finish=True)

    @functools.cached_property
    def _kubectl(self) -> list[str]:
        """Have xpk make the cluster known to kubectl, and return the command that asks it, whatever the context is."""
        output, cluster = self.commands.output, self.options.cluster
        output(["xpk", "workload", "list", *self.where, f"--filter-by-job={self.job.name}"], retry=PATIENT)
        context = output(["kubectl", "config", "current-context"]).strip()
        if self.commands.dry_run:
            context = f"CONTEXT-OF-{cluster}"
        elif not context.endswith(f"_{cluster}"):
            raise LaunchError(f"kubectl: its context is {context!r} after xpk has connected it to {cluster}; try again")
        return ["kubectl", f"--context={context}", "--namespace=default"]

    def _jobset(self) -> dict[str, Any] | None:
        return self._get("jobset", self.job.name, "--ignore-not-found")

    def _get(self, *what: str) -> Any:
        answer = self.commands.output([*self._kubectl, "get", *what, "--output=json"], retry=PATIENT)
        return json.loads(answer) if answer.strip() else None

    def _build(self) -> str:
        """Build the image of launch/Dockerfile and push it; return its name, whose tag differs between contents."""
        job, wanted = self.job, extras(self.job, "tpu")
        with tempfile.TemporaryDirectory(prefix="ttt-launch-") as folder:
            packed, context = Path(folder) / "source.tar.gz", Path(folder) / "context"
            # The constraints of this machine come last in the archive, and replace those of the source tree.
            content = sources.archive(job.checkout, {"constraints.txt": sources.constraints(wanted)}, packed)
            sources.unpack(packed, context)
            image = f"{self.options.build}:tpu-{content}"
            self.commands.note(f"{image}: the source tree {job.checkout}, with the versions of this machine")
            build = [
                *("docker", "build", f"--file={context / 'launch' / 'Dockerfile'}", "--target=tpu"),
                *("--platform=linux/amd64", f"--build-arg=PYTHON={sources.PYTHON}"),
                *(f"--build-arg=EXTRAS={','.join(wanted[1:])}", f"--tag={image}", str(context)),
            ]
            self.commands.run(build, retry=TRANSIENT)
        self.commands.run(["docker", "push", image], retry=TRANSIENT)
        return image


def _cluster(options: argparse.Namespace) -> tuple[object, str, str]:
    return options.cluster, "--cluster", "the name of a cluster that xpk has made"


def _check_names(options: argparse.Namespace) -> None:
    # xpk puts these into commands of a shell.
    for name in ("cluster", "tpu_type", "zone", "project", "reservation"):
        if (value := getattr(options, name)) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:/-]*", value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected letters, digits and hyphens")


def _conditions(jobset: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the conditions of a JobSet that hold, by type."""
    return {each["type"]: each for each in jobset.get("status", {}).get("conditions", []) if each["status"] == "True"}


def _identity(jobset: dict[str, Any]) -> str | None:
    """Return the identity of the command of a workload; None for one that ttt launch did not create."""
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    variables = [variable for container in template["spec"]["containers"] for variable in container.get("env", [])]
    return next((variable.get("value") for variable in variables if variable["name"] == _MARK), None)


def _status(kind: str, reason: str | None, pods: list[dict[str, Any]]) -> int:
    """Return the exit status of a workload that has ended."""
    if kind == "Completed" or reason == "ReachedMaxRestarts":
        return DONE if kind == "Completed" else RESTART
    codes = [
        container["state"]["terminated"]["exitCode"]
        for pod in pods
        for container in pod["status"].get("containerStatuses", [])
        if container["name"] == _CONTAINER and "terminated" in container["state"]
    ]
    return REFUSED if exit_status(codes) == REFUSED else FAILED
