"""Parse the command line of ``ttt`` and run the verb that it names; each verb is in a file of its own."""

import argparse
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Sequence

import ttt_jax
from ttt_jax import garbage
from ttt_jax.cli import (
    bench,
    config,
    eval,
    harness,
    inspect,
    launch,
    plan,
    plot,
    probe,
    sweep,
    sweep_report,
    tokenize,
    train,
)
from ttt_jax.cli.config import Parser
from ttt_jax.errors import CheckpointError, ConfigError, DataError, LaunchError, NonFiniteLossError
from ttt_jax.storage.workdir_lock import LockLostError
from ttt_jax.terminal.stopping import FAILED, INTERRUPTED, REFUSED, SecondCtrlC

_WAIT_FOR_OTHERS = ("sweep", "launch")  # verbs that end other processes first at a second Ctrl-C
_DESCRIPTION = """\
Trains, evaluates and compares language models that learn at test time.

data:
  tokenize  turn text into a dataset

training:
  train     train a model, or continue a run
  config    print the config of a command, and run nothing
  sweep     run many configs at once, follow them, compare them

trained models:
  eval      measure loss and perplexity by token index, and differences between models
  plot      draw pictures and tables of evaluations
  inspect   show what the inner loop does, layer by layer
  probe     test what a model remembers: needles in haystacks, synthetic tasks
  harness   run tasks of EleutherAI's lm-evaluation-harness

machines:
  plan      estimate memory, time and price of a run on a TPU pod, without one
  launch    run a command on other machines: a TPU pod, a cluster
  bench     time a training step; count its cycles on a TPU, without one

Each verb has its own help: ttt train --help
"""
_EPILOG = """\
examples:
  ttt train --config configs/quickstart.py --workdir runs/a
  ttt train --config configs/quickstart.py:ttt_mlp --workdir runs/b --config.optimizer.peak_lr=1e-3
  ttt config --config configs/quickstart.py:ttt_mlp
  ttt eval --workdir runs/a --context 2048
  ttt plot loss-by-position runs/a runs/b --output a-and-b.png

exit status:
  0 done, 1 the run failed, 2 the command or the config cannot be run, 75 stopped by SIGTERM, a lost process or a stall
  (the same command continues), 130 stopped by Ctrl-C
"""


# Errors of the system that mean a wrong path in the command. All others, such as a full disk, are failures.
_WRONG_PATH = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    garbage.collect_rarely()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape names that the encoding of the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    options, rest = parse(sys.argv[1:] if arguments is None else arguments)
    if options.verb in _WAIT_FOR_OTHERS:
        return _run(options, rest)
    with SecondCtrlC(lambda: f"ttt {options.verb}: interrupted{_how_to_continue(options)}"):
        return _run(options, rest)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        status = options.run(options, rest)
        sys.stdout.flush()  # here, so that an error is reported below
        return status
    except ConfigError as error:
        print(f"ttt {options.verb}: {error}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        if error.errno == errno.EPIPE and _reader_is_gone():
            return FAILED
        print(f"ttt {options.verb}: {error}", file=sys.stderr)
        return REFUSED if error.errno in _WRONG_PATH else FAILED
    except (DataError, CheckpointError, LaunchError, LockLostError, NonFiniteLossError) as error:
        print(f"ttt {options.verb}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"ttt {options.verb}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _reader_is_gone() -> bool:
    """Return whether standard output is a pipe whose reader has closed it, as ``head`` does; discard further output."""
    out = sys.stdout.fileno()
    poll = select.poll()
    poll.register(out, 0)  # POLLERR is always reported
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)  # or Python complains at exit about output that it cannot write
    return True


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line.

    Returns:
      The options of the command, and the arguments that describe its config. ``options.command`` is what follows
      ``--``: the command that ``ttt launch`` runs elsewhere, or the launcher of ``ttt sweep``.

    Raises:
      SystemExit: as argparse does, for wrong options and for ``--help``.
    """
    parser, verbs = parsers()
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if len(arguments) > 1 and " ".join(arguments[:2]) in verbs:  # a verb of two words, such as sweep status
        arguments[:2], end = [" ".join(arguments[:2])], end - 1
    options, rest = parser.parse_known_args(arguments[:end])
    options.command = arguments[end + 1 :]
    if end < len(arguments) and not options.takes_command:
        verbs[options.verb].error("unexpected argument: --")
    if rest and not options.takes_config:
        verbs[options.verb].error(f"unexpected argument: {rest[0]}")
    return options, rest


def _how_to_continue(options: argparse.Namespace) -> str:
    """Return in words what an interrupted command has saved, and how to continue it."""
    if options.verb == "train":
        from ttt_jax.training import checkpoint

        return f"; {checkpoint.describe_newest(options.workdir)}; the same command continues there"
    if options.verb == "tokenize":
        return "; the same command continues from what was saved"
    return ""


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of ``ttt``, and the parser of each verb by its name."""
    parser = _with_manual(Parser, _DESCRIPTION, _EPILOG, prog="ttt", usage="ttt [-h] [--version] VERB ...")
    parser.add_argument("--version", action="version", version=f"ttt_jax {ttt_jax.__version__}")
    group = parser.add_subparsers(dest="verb", required=True, metavar="VERB", help=argparse.SUPPRESS, prog="ttt")
    verbs: dict[str, Parser] = {}

    def verb(name: str, run: Callable, description: str, usage: str | None = None, takes_command: bool = False):
        takes_config = usage is not None
        verbs[name] = _with_manual(group.add_parser, description, name=name, usage=usage)
        verbs[name].takes_config = takes_config
        verbs[name].set_defaults(run=run, takes_config=takes_config, takes_command=takes_command, parser=verbs[name])
        return verbs[name]

    p = verb("tokenize", lambda options, rest: tokenize.run(options), tokenize.DESCRIPTION)
    p.epilog = tokenize.EPILOG
    tokenize.add_arguments(p)
    train.add_arguments(verb("train", train.run, train.DESCRIPTION, train.USAGE))
    config.add_arguments(verb("config", config.run, config.DESCRIPTION, config.USAGE))

    eval.add_arguments(verb("eval", lambda options, rest: eval.run(options), eval.DESCRIPTION))
    compare = verb("eval compare", lambda options, rest: eval.compare(options), eval.COMPARE)
    eval.add_compare_arguments(compare)
    inspect.add_arguments(verb("inspect", lambda options, rest: inspect.run(options), inspect.DESCRIPTION))
    harness.add_arguments(verb("harness", lambda options, rest: harness.run(options), harness.DESCRIPTION))
    plot.add_arguments(verb("plot", lambda options, rest: plot.run(options), plot.DESCRIPTION))
    probe.add_verbs(verb)

    bench.add_arguments(verb("bench", bench.step, bench.DESCRIPTION, bench.USAGE))
    p = verb("bench tpu-schedule", bench.tpu_schedule, bench.TPU_SCHEDULE, bench.TPU_SCHEDULE_USAGE)
    p.epilog = bench.TPU_SCHEDULE_EPILOG
    bench.add_tpu_schedule_arguments(p)

    p = verb("plan", plan.run, plan.DESCRIPTION, plan.USAGE)
    p.epilog = plan.EPILOG
    plan.add_arguments(p)

    def run_sweep(options: argparse.Namespace, rest: list[str]) -> int:
        return sweep.run(options, rest, parse)

    p = verb("sweep", run_sweep, sweep.DESCRIPTION, sweep.USAGE, takes_command=True)
    p.epilog = sweep.EPILOG
    sweep.add_arguments(p)
    sweep_report.add_status_arguments(verb("sweep status", sweep_report.status, sweep_report.STATUS))
    sweep_report.add_results_arguments(verb("sweep results", sweep_report.results, sweep_report.RESULTS))

    p = verb("launch", lambda options, rest: launch.run(options, parse), launch.DESCRIPTION, takes_command=True)
    p.epilog = launch.EPILOG
    launch.add_arguments(p)
    return parser, verbs


def _with_manual(make: Callable, description: str, epilog: str = "", **names) -> Parser:
    style = argparse.RawDescriptionHelpFormatter
    return make(description=description, epilog=epilog, formatter_class=style, allow_abbrev=False, **names)
