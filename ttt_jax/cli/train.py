"""Run ``ttt train``: train the model of a config, or continue a run."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from ttt_jax import config as config_lib
from ttt_jax.cli.options import CONFIG_USAGE, add_processes
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.terminal.stopping import DONE, INTERRUPTED, RESTART

DESCRIPTION = """\
Trains the model of a config, or continues the run in the workdir.

The workdir holds config.json, metrics.jsonl and checkpoints/. Running the same command again continues at the newest
checkpoint, with the same batches and, on the same machine, the same bits as a run that was never stopped. Ctrl-C saves
first; a second Ctrl-C does not wait.
"""
USAGE = f"ttt train {CONFIG_USAGE} --workdir DIR"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt train``."""
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="where the run lives: a folder, or gs://bucket/name")
    accepts = "continue although the source of model.ttt.learner, a function of your own, has changed since"
    add("--accept-changed-learner", action="store_true", help=accepts)
    add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run ``ttt train`` and return its exit status."""
    workdir = workdir_lib.at(options.workdir)
    config = config_lib.from_arguments(rest)
    from ttt_jax.distributed import startup

    startup.use_compilation_cache()
    startup.keep_freed_memory()
    startup.start(options.coordinator, options.processes, options.process, limit=options.start_limit)
    import jax

    from ttt_jax.training import loop

    outcome = loop.train(config, workdir, accept_changed_learner=options.accept_changed_learner)
    status = {None: DONE, signal.SIGTERM: RESTART, signal.SIGINT: INTERRUPTED}[outcome.signal]
    if jax.process_index():
        return status
    if outcome.signal is not None:
        print(f"stopped by {outcome.signal.name}; saved at step {outcome.step} of {outcome.total}. To continue:")
        print(f"  {_same_command()}")
    elif outcome.loss is None:
        done = f"all {outcome.step} steps are done already"
        if outcome.step > outcome.total:
            done = f"{outcome.step} steps are done already, more than the {outcome.total} of training.duration"
        print(f"{workdir}: {done}; a longer --config.training.duration adds")
    else:
        print(f"{workdir}: {outcome.step} steps done, loss {outcome.loss:.4f}")
    return status


def _same_command() -> str:
    program = "ttt" if os.path.basename(sys.argv[0]) != "__main__.py" else "python -m ttt_jax"
    return shlex.join([*program.split(), *sys.argv[1:]])
