"""Cloud TPU: a slice, or several, through queued resources."""

import argparse

from ttt_jax.launch.commands import Commands
from ttt_jax.launch.job import Job

DESCRIPTION = """\
Runs a command of ttt on every host of a slice of Cloud TPU.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the target."""
    add = parser.add_argument
    add("--accelerator", metavar="TYPE", help="v5litepod-256, v6e-64, v5p-128, v4-32, ...")
    add("--zone", help="such as us-west4-a")


def run(options: argparse.Namespace, job: Job, commands: Commands) -> int:
    """Runs the job to its end; returns its exit status."""
    commands.run(["gcloud", "compute", "tpus", "queued-resources", "create", job.name, f"--zone={options.zone}"])
    return 0
