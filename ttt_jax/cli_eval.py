"""``ttt eval``: loss and perplexity of trained models, by token index."""

import argparse
import sys

from ttt_jax import workdir as workdir_lib
from ttt_jax.cli_types import SPLITS, positive
from ttt_jax.exit_status import DONE

DESCRIPTION = """\
Loss and perplexity of a trained model on windows of a split, and loss by token index with its standard error over
windows. Writes DIR/eval/SPLIT-T.npz, .csv and .json. The context may be longer than that of training.

With --by-document, of each document from its beginning to its end, or to T tokens: they are read in pieces of the
training context, the state carried on, so that TTT reads a book of any length in the same memory.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ttt eval``."""
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="of a run")
    add("--context", type=positive, default=2048, metavar="T", help="tokens per window (default: 2048)")
    add("--split", default="validation", choices=SPLITS, help="(default: validation)")
    add("--max-windows", type=positive, default=256, metavar="N", help="at most so many (default: 256)")
    add("--by-document", action="store_true", help="whole documents, each from its beginning, not windows")
    add("--step", type=int, help="which checkpoint (default: the newest)")
    add("--batch-size", type=positive, metavar="B", help="windows at a time (default: as in training)")


def run(options: argparse.Namespace) -> int:
    """``ttt eval``"""
    workdir = workdir_lib.at(options.workdir)
    from ttt_jax.evaluation import loss_by_position
    from ttt_jax.parallel import startup

    startup.use_compilation_cache()

    def progress(done, total):
        if sys.stderr.isatty():
            print(f"\r{done}/{total} windows", end="" if done < total else "\n", file=sys.stderr, flush=True)

    result, about = loss_by_position.evaluate(
        workdir,
        context=options.context,
        split=options.split,
        most_windows=options.max_windows,
        by_document=options.by_document,
        step=options.step,
        batch_size=options.batch_size,
        progress=progress,
    )
    path = loss_by_position.save(result, about, workdir / "eval")
    print(
        f"{about['model']}, step {about['step']}, {about['source']}, {result.windows} {about['of']} of "
        f"{'up to ' * options.by_document}{options.context} tokens: "
        f"loss {result.mean:.4f} +- {result.mean_standard_error:.4f}, perplexity {result.perplexity:.4f}"
    )
    print(f"  {path} (and .csv, .json)")
    return DONE
