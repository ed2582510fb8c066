"""Run ``ttt launch TARGET [options] -- VERB ...``: a command of ttt on other machines, to its end."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from ttt_jax.launch import gke, lifecycle, sky, slurm, tpu
from ttt_jax.launch import job as job_lib
from ttt_jax.launch.commands import Commands
from ttt_jax.terminal.console import not_negative

TARGETS: dict[str, type[lifecycle.Target]] = {"tpu": tpu.Tpu, "gke": gke.Gke, "slurm": slurm.Slurm, "sky": sky.Sky}

DESCRIPTION = """\
Run a command of ttt on other machines: make them, install this source tree and its packages there, run the command,
show its log, start it again after a preemption, and delete the machines. The exit status is that of the command.

targets:
  tpu       a slice, or several, of Cloud TPU, through queued resources
  gke       slices of a GKE cluster, through xpk
  slurm     GPUs of a Slurm cluster
  sky       TPUs or GPUs of any cloud, through SkyPilot

Each target tells more: ttt launch tpu --help
"""
EPILOG = """\
examples:
  ttt launch tpu --accelerator v5litepod-256 --zone us-west4-a --spot -- \\
      train --config configs/quickstart.py --workdir gs://bucket/runs/a
  ttt launch tpu --zone us-west4-a --name ttt-a-0c1d2e --stop

exit status:
  that of the command: 0 done, 1 it failed, 2 it cannot be run; 75 preempted more often than --restarts allows;
  130 stopped by Ctrl-C
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the targets, each with its options."""
    parser.usage = f"{parser.prog} [-h] TARGET [options] -- VERB ..."
    said_above = argparse.SUPPRESS
    group = parser.add_subparsers(dest="target", required=True, metavar="TARGET", help=said_above, prog=parser.prog)
    for name, target in TARGETS.items():
        p = group.add_parser(
            name,
            description=target.DESCRIPTION,
            usage=f"ttt launch {name} [options] -- VERB ...",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        target.add_arguments(p)
        add = p.add_argument_group("of every target").add_argument
        add("--name", help="of the job (default: made of the workdir, so that the same command finds its job again)")
        add(
            "--env",
            action="append",
            default=[],
            metavar="KEY[=VALUE]",
            help="a variable; KEY alone: as it is set here",
        )
        add("--restarts", type=not_negative, default=100, metavar="N", help="after preemptions (default: 100)")
        add("--detach", action="store_true", help="return as soon as the command runs there")
        add("--dry-run", action="store_true", help="print the commands, and run none")
        p.set_defaults(action=None)
        add = p.add_mutually_exclusive_group().add_argument
        add("--status", dest="action", action="store_const", const="status", help="print the state of the job")
        stop = "end the job: it saves, and its machines are deleted"
        add("--stop", dest="action", action="store_const", const="stop", help=stop)


def run(options: argparse.Namespace, parse: Callable[[Sequence[str]], tuple]) -> int:
    """Run the verb, and return its exit status.

    Args:
      options: of the verb; ``options.command`` is what is to be run.
      parse: the parser of ttt, for that command.
    """
    target = TARGETS[options.target]
    return lifecycle.run(target(options, checked_job(options, parse), Commands(options.dry_run)))


def checked_job(options: argparse.Namespace, parse: Callable[[Sequence[str]], tuple]) -> job_lib.Job:
    """Return the job that the options describe, after all checks that can be made here.

    Raises:
      ConfigError: for whatever could not run there.
    """
    target, asks_only = TARGETS[options.target], options.action is not None
    if not options.command and not asks_only:
        target.check(options, job_lib.Job("", (), Path()))  # names all that is missing, the command among it
    job = job_lib.make(options.command, parse, options.name, options.env, target.SENDS_SOURCES)
    if not asks_only:
        target.check(options, job)
    return job
