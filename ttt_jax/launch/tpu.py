"""Cloud TPU: a slice, or several, through queued resources, and a command on all their hosts."""

import argparse
import re

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.launch import accelerators, checks, tpu_run
from ttt_jax.launch.commands import Commands
from ttt_jax.launch.job import Job
from ttt_jax.storage.workdir import cache_folder

DESCRIPTION = """\
Runs a command of ttt on all hosts of a slice of Cloud TPU, or of several: asks for them through a queued resource,
waits for them, installs this source tree with the versions of this machine, runs the command detached, shows the log of
the first host, and deletes the slices when it has ended, has failed, or by Ctrl-C (which saves first).

A preempted slice is asked for anew, and the command goes on from its workdir. The same command run again while the job
runs shows its log again.
"""
ACTIONS = ("status", "stop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the target."""
    add = parser.add_argument_group("machines").add_argument
    add("--accelerator", metavar="TYPE", help="of each slice: v5litepod-256, v6e-64, v5p-128, v4-32, ...")
    add("--zone", help="where (default: compute/zone of gcloud config)")
    add("--project", help="whose (default: core/project of gcloud config)")
    add("--slices", type=_positive, default=1, metavar="N", help="so many, joined by the data center network")
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
    tier.add_argument("--best-effort", action="store_true", help="what spot was before it (needs gcloud alpha)")
    tier.add_argument("--reserved", action="store_true", help="of a reservation")
    add("--runtime-version", metavar="VERSION", help="image of the hosts (default: that of the accelerator)")
    add("--network", help="(default: default)")
    add("--subnetwork", help="of the network")
    add(
        "--internal-ips", action="store_true", help="no external addresses; run this within the network, with Cloud NAT"
    )
    add("--service-account", metavar="EMAIL", help="that reads and writes the bucket (default: that of Compute Engine)")
    add = parser.add_argument_group("running").add_argument
    add("--keep", action="store_true", help="leave the machines when the command has ended")
    add("--timeout", type=_duration, metavar="TIME", help="give up when they do not come within 90m, 12h, 2d, ...")
    add("--poll", type=_seconds, default=30.0, metavar="S", help="seconds between looks at the machines (default: 30)")


def run(options: argparse.Namespace, job: Job, commands: Commands) -> int:
    """Runs the job to its end, or does what ``options.action`` says; returns the exit status of the command.

    Raises:
      ConfigError: for what could not run there, before anything is created.
      LaunchError: when the machines cannot be had, reached or deleted.
    """
    where = [f"--{name}={value}" for name in ("zone", "project") if (value := getattr(options, name))]
    if options.action is not None:
        return tpu_run.act(options.action, commands, job, where, options.internal_ips)
    accelerator = accelerators.parse(options.accelerator)
    request = [f"--accelerator-type={accelerator.name}"]
    request.append(f"--runtime-version={options.runtime_version or accelerator.runtime_version}")
    request += [f"--{name}" for name in ("spot", "best-effort", "reserved") if getattr(options, name.replace("-", "_"))]
    for name in ("network", "subnetwork", "service-account"):
        if value := getattr(options, name.replace("-", "_")):
            request.append(f"--{name}={value}")
    if options.internal_ips:
        request.append("--internal-ips")
    plan = tpu_run.Plan(
        where=tuple(where),
        request=tuple(request),
        alpha=options.best_effort,
        slices=options.slices,
        accelerator=accelerator.name,
        internal=options.internal_ips,
        extras=checks.extras(job, "tpu"),
        restarts=options.restarts,
        keep=options.keep,
        detach=options.detach,
        timeout=options.timeout,
        poll=options.poll,
        folder=cache_folder() / "launch",
    )
    return tpu_run.run(commands, job, plan)


def check(options: argparse.Namespace, job: Job) -> None:
    """Raise ConfigError for whatever would fail there and can be seen from here, before anybody waits for a pod."""
    checks.required(
        (not options.accelerator, "--accelerator", "an accelerator type, such as v5litepod-16"), checks.command(job)
    )
    accelerator = accelerators.parse(options.accelerator)
    several = accelerator.several_hosts or options.slices > 1
    checks.one_host(job, several)
    if several or not options.keep:
        checks.bucket(job, "its hosts share no disk" if several else "the machines are deleted in the end")
    checks.no_local_files(job)
    if job.command[0] == "train" and job.config is not None:
        shape = config_lib.mesh_shape(job.config, accelerator.devices * options.slices)
        if shape["data"] % options.slices:
            raise ConfigError(
                f"mesh.data={shape['data']}: expected a multiple of --slices {options.slices}; only this axis may "
                "cross from slice to slice"
            )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, 3600 at most")
    return seconds


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a time such as 90m, 12h or 2d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
