"""Run ``ttt tokenize``: make a dataset of tokens from files of text."""

import argparse
import dataclasses
import functools
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from ttt_jax import extras
from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir_lock import WorkdirLock
from ttt_jax.terminal.console import StatusLine, counted, duration, positive
from ttt_jax.terminal.stopping import DONE, INTERRUPTED, RESTART, StopSignals

if TYPE_CHECKING:
    from ttt_jax.data.prepare.files import InputFile
    from ttt_jax.storage.store import Store

DESCRIPTION = """\
Tokenizes files of text into a dataset that ttt train reads: a zarr3 array for each split, and dataset.json.

FILES are paths, globs, folders or URLs (gs://, s3://, hf://, ... with the package that fsspec needs for it) of
.jsonl, .ndjson, .json, .txt (one document each) and .parquet files; all but .parquet may also be compressed and end
in .zst, .gz, .xz or .bz2. DIR is a folder or a gs:// URL.

A command that was stopped or killed continues when it is run again, and ends with the same bytes.
"""
EPILOG = """\
examples:
  ttt tokenize --train 'pile/train/*.jsonl.zst' --validation pile/val.jsonl.zst --test pile/test.jsonl.zst \\
      --tokenizer llama-2/tokenizer.model --output gs://bucket/pile-llama-2
  ttt tokenize --train books.jsonl --validation-fraction 0.0005 --train-bpe 8192 --output data/books
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add = parser.add_argument
    for split in ("train", "validation", "test"):
        add(f"--{split}", nargs="+", action="extend", default=[], metavar="FILES", help=f"text of the {split} split")
    add("--output", required=True, metavar="DIR", help="folder of the dataset")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer", metavar="FILE", help="byte, a SentencePiece .model, or a Hugging Face tokenizer.json"
    )
    which.add_argument("--train-bpe", type=int, metavar="N", help="train a BPE of N tokens on the train split")
    add("--text-key", default="text", metavar="KEY", help="key of the text in a record (default: text)")
    add("--bos-token", metavar="TOKEN", help="token that begins a document (default: the tokenizer's BOS)")
    add("--eos-token", metavar="TOKEN", help="token that ends a document (default: the tokenizer's EOS)")
    add("--no-bos", action="store_true", help="put no token before a document")
    add("--no-eos", action="store_true", help="put no token after a document")
    for split in ("validation", "test"):
        help = f"fraction of the train documents, by hash, that go to the {split} split"
        add(f"--{split}-fraction", type=float, default=0.0, metavar="F", help=help)
    add("--split-seed", type=int, default=2357, metavar="N", help="seed of that hash (default: 2357)")
    add(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="stop at a record that cannot be read, or leave it out (default: fail)",
    )
    add("--workers", type=positive, metavar="N", help="number of processes (default: one per core)")
    add(
        "--engine",
        choices=["processes", "ray"],
        default="processes",
        help="tokenize in processes of this machine or on a Ray cluster (default: processes)",
    )
    add("--ray-address", default="auto", metavar="ADDRESS", help="address of the Ray cluster (default: auto)")


def run(options: argparse.Namespace) -> int:
    """Run the verb and return its exit status."""
    from ttt_jax.data.dataset import PROBLEMS
    from ttt_jax.data.prepare import files, listing
    from ttt_jax.storage.store import Store

    _check(options)
    inputs = [
        file
        for split in ("train", "validation", "test")
        for file in listing.find(split, getattr(options, split), options.output)
    ]
    inputs = listing.without_duplicates(inputs)
    if any(file.kind == "parquet" for file in inputs):
        extras.check("parquet", "pyarrow", "reading .parquet")
    if options.engine == "ray":
        extras.check("ray", "ray", "--engine ray")
    output = Store(options.output)
    inputs = files.with_digests(inputs)
    listing.report_copies(inputs)
    with WorkdirLock(options.output, "ttt tokenize", option="--output") as lock:
        description, received = _tokenize(options, inputs, output, lock)
    if description is None:
        received = received or signal.SIGTERM
        print(f"ttt tokenize: stopped by {received.name}; the same command continues here", file=sys.stderr)
        return INTERRUPTED if received == signal.SIGINT else RESTART
    _print_summary(description, options.output, output.path(PROBLEMS))
    return DONE


def _print_summary(description: dict[str, Any], output: str, problems: str) -> None:
    name, vocab_size = description["tokenizer"]["name"], description["vocab_size"]
    special = "; ".join(f"{k} {'none' if description[k] is None else description[k]}" for k in ("bos", "eos"))
    print(f"{output}: {name}, {vocab_size:,} tokens in the vocabulary; {special}")
    for split, counts in description["splits"].items():
        print(
            f"  {split}: {counted(counts['documents'], 'document')}, {counted(counts['tokens'], 'token')}, "
            f"{counted(counts['text_bytes'], 'byte')} of text"
        )
        if empty := counts.get("empty_documents"):
            words = "has no tokens of its own" if empty == 1 else "have no tokens of their own"
            print(f"    {empty:,} of the documents {words}")
        if unknown := counts.get("unknown_tokens"):
            verb = "stands" if unknown == 1 else "stand"
            print(f"    {unknown:,} of the tokens {verb} for characters that the tokenizer does not know")
    if skipped := description["skipped_records"]:
        print(f"  left out: {counted(skipped, 'record')}, listed in {problems}")


def _tokenize(
    options: argparse.Namespace, inputs: "list[InputFile]", output: "Store", lock: WorkdirLock
) -> tuple[dict[str, Any] | None, signal.Signals | None]:
    """Return the description of the dataset, None if a signal stopped the run before its end, and the signal."""
    from ttt_jax.data.prepare import text_fidelity, tokenize, tokenize_units, tokenizer, train_bpe
    from ttt_jax.data.prepare.tokenize_units import Job

    skip = options.on_error == "skip"
    fractions = {"validation_fraction": options.validation_fraction, "test_fraction": options.test_fraction}
    job = Job(tokenizer.byte(), None, None, options.text_key, **fractions, split_seed=options.split_seed)
    if options.train_bpe is None:
        chosen = tokenizer.load(options.tokenizer, bos_token=options.bos_token, eos_token=options.eos_token)
        trained = None
        if lost := text_fidelity.lost_differences(chosen.encoder(), chosen.unknown):
            what = "texts that differ in them alone get the same tokens"
            print(f"--tokenizer {options.tokenizer}: loses {', '.join(lost)}: {what}", file=sys.stderr)
    else:
        chosen = train_bpe.load_or_train(output, inputs, options.train_bpe, job, skip_problems=skip)
        trained = {"vocab_size": options.train_bpe, "most_bytes": train_bpe.MOST_BYTES}
    bos, eos = None if options.no_bos else chosen.bos, None if options.no_eos else chosen.eos
    job = dataclasses.replace(job, tokenizer=chosen, bos=bos, eos=eos)
    if options.engine == "ray":
        engine = tokenize_units.ray(options.ray_address)
    else:
        engine = tokenize_units.processes(options.workers or tokenize_units.cores())
    bar = _Bar(sum(file.size for file in inputs))
    with StopSignals() as signals:
        try:
            description = tokenize.tokenize(
                inputs,
                job,
                output,
                engine,
                skip_problems=skip,
                trained=trained,
                progress=bar,
                warn=functools.partial(print, file=sys.stderr, flush=True),
                stop=lambda: signals.received,
                check=lock.check,
            )
        finally:
            bar.close()
    return description, signals.received


def _check(options: argparse.Namespace) -> None:
    if not options.train + options.validation + options.test:
        raise ConfigError("--train, --validation, --test: expected one of them at least")
    for name in ("validation", "test"):
        fraction = getattr(options, f"{name}_fraction")
        if not 0 <= fraction < 1:
            raise ConfigError(f"--{name}-fraction {fraction}: expected a number from 0 to below 1")
        if fraction and (getattr(options, name) or not options.train):
            raise ConfigError(f"--{name}-fraction: is taken from --train; expected --train, and no --{name}")
    if options.validation_fraction + options.test_fraction >= 1:
        raise ConfigError("--validation-fraction, --test-fraction: expected a sum below 1")
    if not 0 <= options.split_seed < 2**64:
        raise ConfigError(f"--split-seed {options.split_seed}: expected an integer from 0 to 2^64 - 1")
    for key in ("bos", "eos"):
        if getattr(options, f"{key}_token") and (getattr(options, f"no_{key}") or options.train_bpe is not None):
            other = f"--no-{key}" if getattr(options, f"no_{key}") else "--train-bpe"
            raise ConfigError(f"--{key}-token: cannot be given with {other}")


class _Bar:
    """Shows documents, tokens, MB of text per second, and the remaining time."""

    def __init__(self, total: int):
        self._line, self._started = StatusLine(max(total, 1), 0, "starting"), time.monotonic()
        self._first_read: int | None = None

    def __call__(self, now) -> None:
        self._first_read = now.read if self._first_read is None else self._first_read
        seconds = time.monotonic() - self._started
        speed = (now.text_bytes - now.started) / 1e6 / seconds if now.started or now.text_bytes else 0.0
        read = now.read - self._first_read
        left = f"{duration(seconds * (now.total - now.read) / read)} left" if read else "..."
        skipped = f"  {now.skipped:,} left out" if now.skipped else ""
        self._line.show(
            now.read,
            f"{counted(now.documents, 'document')}  {counted(now.tokens, 'token')}{skipped}  {speed:.1f} MB/s  {left}",
        )

    def close(self) -> None:
        self._line.close()
