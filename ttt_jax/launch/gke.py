"""Google Kubernetes Engine: TPU slices of a cluster, through xpk."""

import argparse
import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from ttt_jax.errors import ConfigError, LaunchError
from ttt_jax.launch import checks, image, lifecycle
from ttt_jax.launch.commands import CommandError, Commands
from ttt_jax.launch.job import Job
from ttt_jax.launch.jobset import PASSES, Cluster
from ttt_jax.launch.shell_word import plain
from ttt_jax.terminal.stopping import RESTART

DESCRIPTION = """\
Runs a command of ttt as a workload of a GKE cluster that xpk has made: on all hosts of a TPU slice, or of several, in
an image of this source tree.

The workload is started again after a preemption. Ctrl-C deletes it, after it has saved. The same command while the
workload waits or runs follows that one.
"""
ACTIONS = ("status", "stop")

_POLL = 10.0  # seconds between two questions to the cluster
_GRACE = 120  # seconds for which pods that are deleted may save
_MARK = "TTT_JAX_COMMAND"  # variable of the container whose value is the identity of the command
_CONTAINER = "jax-tpu"  # the name that xpk gives


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the target."""
    add = parser.add_argument_group("machines").add_argument
    add("--cluster", help="made by xpk cluster create")
    add("--tpu-type", metavar="TYPE", help="of each slice: v5litepod-256, v6e-64, v5p-128, ...")
    add("--slices", type=_positive, default=1, metavar="N", help="so many, joined by the data center network")
    add("--zone", help="where (default: compute/zone of gcloud config)")
    add("--project", help="whose (default: core/project of gcloud config)")
    add("--priority", choices=["very-low", "low", "medium", "high", "very-high"], help="(default: medium)")
    tier = parser.add_mutually_exclusive_group()  # of clusters with autoprovisioning
    tier.add_argument("--spot", action="store_true", help="cheaper, where the cluster makes nodes as they are needed")
    tier.add_argument("--on-demand", action="store_true", help="the same, not cheaper")
    tier.add_argument("--reservation", metavar="NAME", help="the same, of a reservation")
    made = parser.add_mutually_exclusive_group()
    made.add_argument("--image", help="that was built from launch/Dockerfile, and is used as it is")
    made.add_argument("--build", metavar="REPOSITORY", help="build an image of this source tree and push it there")


def run(options: argparse.Namespace, job: Job, commands: Commands) -> int:
    """Runs the job to its end; returns its exit status."""
    checks.required(_cluster(options))
    _check_names(options)
    return lifecycle.run(options, job, commands, Workload(options, job, commands))


def check(options: argparse.Namespace, job: Job) -> None:
    """Raise ConfigError for whatever would fail there and can be seen from here."""
    _check_names(options)
    no_image = options.image is None and options.build is None
    checks.required(
        _cluster(options),
        (options.tpu_type is None, "--tpu-type", "one such as v5litepod-256"),
        (no_image, "--image", "an image, or --build and where to put one"),
        checks.command(job),
    )
    if options.image is not None:
        image.checked(options.image, "--image")
    checks.bucket(job, "the machines are deleted in the end")
    checks.no_local_files(job)


def _cluster(options: argparse.Namespace) -> tuple[bool, str, str]:
    return options.cluster is None, "--cluster", "the name of a cluster that xpk has made"


def _check_names(options: argparse.Namespace) -> None:
    # xpk puts these into commands of a shell.
    for name in ("cluster", "tpu_type", "zone", "project", "reservation"):
        if (value := getattr(options, name)) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:/-]*", value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected letters, digits and hyphens")


class Workload:
    """A cluster, seen by one workload (a JobSet of Kubernetes), which it knows by its name."""

    def __init__(self, options: argparse.Namespace, job: Job, commands: Commands):
        self._options, self._job, self._commands = options, job, commands
        self._where = [f"--cluster={options.cluster}"]
        self._where += [f"--{name}={value}" for name in ("project", "zone") if (value := getattr(options, name))]

    @functools.cached_property
    def _cluster(self) -> Cluster:
        """Has xpk make the cluster known to kubectl. Questions name it, whatever else kubectl is used for meanwhile."""
        output, cluster = self._commands.output, self._options.cluster
        output(["xpk", "workload", "list", *self._where, f"--filter-by-job={self._job.name}"], retry=PASSES)
        context = output(["kubectl", "config", "current-context"]).strip()
        if self._commands.dry_run:
            context = f"CONTEXT-OF-{cluster}"
        elif not context.endswith(f"_{cluster}"):
            raise LaunchError(f"kubectl: its context is {context!r} after xpk has connected it to {cluster}; try again")
        kubectl = ["kubectl", f"--context={context}", "--namespace=default"]
        return Cluster(self._commands, kubectl, self._job.name, _CONTAINER)

    def find(self) -> str | None:
        """The name of the workload, if it waits or runs."""
        jobset, name = self._cluster.jobset(), self._job.name
        if jobset is None:
            return None
        mark = jobset.variable(_MARK)
        if mark is None:
            raise ConfigError(f"a workload {name} is there already, and not of ttt launch; expected another --name")
        if jobset.ended:
            return None
        if self._job.command and mark != self._job.identity:
            raise ConfigError(
                f"the workload {name} runs another command; expected another --name, or first: ttt launch gke "
                f"--cluster {self._options.cluster} --name {name} --stop"
            )
        return name

    def submit(self) -> str:
        """Creates the workload, in the place of one of the same name that has ended."""
        options, job = self._options, self._job
        if self._cluster.jobset() is not None:
            self._delete()
        used = options.image or image.build(self._commands, job, "tpu", options.build)
        arguments = [
            *("xpk", "workload", "create", f"--workload={job.name}", *self._where),
            *(f"--tpu-type={options.tpu_type}", f"--num-slices={options.slices}", f"--docker-image={used}"),
            # All pods are started again, for statuses from 127, which are kills, as xpk has it, and for these.
            *(f"--max-restarts={options.restarts}", f"--restart-on-exit-codes={RESTART}"),
            f"--termination-grace-period-seconds={_GRACE}",
        ]
        arguments += [f"--{name}" for name in ("spot", "on-demand") if getattr(options, name.replace("-", "_"))]
        arguments += [f"--{name}={value}" for name in ("priority", "reservation") if (value := getattr(options, name))]
        with self._variables() as file:
            arguments += [f"--env-file={file}", f"--command=exec ttt {' '.join(map(plain, job.command))}"]
            try:
                lifecycle.submit(self._commands, arguments, PASSES, self.find, _POLL)
            except CommandError as error:
                self._commands.note(error.printed.rstrip())
                raise LaunchError(f"{error}; all that it said is above") from error
        return job.name

    def describe(self, name: str) -> str:
        """How the workload is."""
        return str(self._cluster.jobset() or "is deleted")

    def follow(self, name: str, from_start: bool) -> int:
        """Shows the log of the first host until the workload has ended; returns its exit status."""
        log, said = self._cluster.log(from_start, _POLL), ""
        while True:
            jobset = self._cluster.jobset()
            if jobset is None:
                raise LaunchError(f"{name}: the workload was deleted by somebody else")
            if str(jobset) != said:
                said = str(jobset)
                self._commands.note(f"{name}: {said}")
            log.show()
            if jobset.ended:
                return self._cluster.status(jobset)
            self._commands.wait(_POLL)

    def stop(self, name: str) -> None:
        """Deletes the workload; its pods save first."""
        jobset = self._cluster.jobset()
        if jobset is not None and jobset.variable(_MARK) is not None:
            self._delete()

    def _delete(self) -> None:
        # Never without --workload: xpk would delete all of the cluster.
        arguments = ["xpk", "workload", "delete", f"--workload={self._job.name}", *self._where, "--force"]
        self._commands.run(arguments, retry=PASSES, finish=True)

    @contextlib.contextmanager
    def _variables(self) -> Iterator[str]:
        """A file with the variables of the container, which may be secrets, as xpk reads it."""
        variables = {_MARK: self._job.identity, **self._job.environment}
        if self._commands.dry_run:
            self._commands.note(f"the file of --env-file has {', '.join(variables)}")
            yield f"{self._job.name}.env"
            return
        descriptor, path = tempfile.mkstemp(prefix="ttt-launch-", suffix=".env")
        try:
            with os.fdopen(descriptor, "w") as file:
                for key, value in variables.items():
                    # It goes between the double quotes of YAML, where Kubernetes replaces $(NAME), and $$ by $.
                    quoted = yaml.safe_dump(value, default_style='"', width=float("inf")).strip()
                    file.write(f"{key}={quoted[1:-1].replace('$', '$$')}\n")
            yield path
        finally:
            Path(path).unlink()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more")
    return int(text)
