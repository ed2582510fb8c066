"""``ttt tokenize``: from files of text to a dataset of tokens."""

import argparse
import dataclasses
import functools
import signal
import sys
import time
from typing import TYPE_CHECKING

from ttt_jax import extras
from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir_lock import WorkdirLock
from ttt_jax.terminal.console import counted, duration
from ttt_jax.terminal.status_line import StatusLine
from ttt_jax.terminal.stopping import StopSignals

if TYPE_CHECKING:
    from ttt_jax.storage.store import Store

DESCRIPTION = """\
Tokenizes files of text into a dataset that ttt train reads: a zarr3 array for each split, and dataset.json.

FILES are paths, globs, folders or URLs (gs://, s3://, hf://, ... with the package that fsspec needs for it) of
.jsonl, .ndjson, .json, .txt (a document each) and .parquet, all but the last also with .zst, .gz, .xz or .bz2.
DIR is a folder or a gs:// URL.

A command that was stopped or killed goes on where it was when it is run again, and ends with the same bytes.
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
    add("--output", required=True, metavar="DIR", help="where the dataset is made")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer", metavar="FILE", help="byte, a SentencePiece .model, or a Hugging Face tokenizer.json"
    )
    which.add_argument("--train-bpe", type=int, metavar="N", help="train one of N tokens on the train split")
    add("--text-key", default="text", metavar="KEY", help="of a record (default: text)")
    add("--bos-token", metavar="TOKEN", help="begins a document (default: what the tokenizer calls so)")
    add("--eos-token", metavar="TOKEN", help="ends a document (default: what the tokenizer calls so)")
    add("--no-bos", action="store_true", help="nothing before a document")
    add("--no-eos", action="store_true", help="nothing behind a document")
    add("--validation-fraction", type=float, default=0.0, metavar="F", help="of the train documents, by their hash")
    add("--test-fraction", type=float, default=0.0, metavar="F", help="of the train documents, by their hash")
    add("--split-seed", type=int, default=2357, metavar="N", help="of that hash (default: 2357)")
    add("--on-error", choices=["fail", "skip"], default="fail", help="at a record that cannot be read (default: fail)")
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    add(
        "--engine",
        choices=["processes", "ray"],
        default="processes",
        help="where (default: processes, of this machine)",
    )
    add("--ray-address", default="auto", metavar="ADDRESS", help="of a Ray cluster (default: auto)")


def run(options: argparse.Namespace) -> int:
    """Run the verb and return its exit status."""
    from ttt_jax.data.prepare import files, listing
    from ttt_jax.storage.store import Store

    _check(options)
    found = [
        file
        for split in ("train", "validation", "test")
        for file in listing.find(split, getattr(options, split), options.output)
    ]
    found = listing.without_duplicates(found)
    if any(file.kind == "parquet" for file in found):
        extras.check("parquet", "pyarrow", "reading .parquet")
    if options.engine == "ray":
        extras.check("ray", "ray", "--engine ray")
    output = Store(options.output)
    found = files.with_digests(found)
    listing.report_copies(found)
    with WorkdirLock(options.output, "ttt tokenize", option="--output") as lock:
        about, received = _tokenize(options, found, output, lock)
    if about is None:
        received = received or signal.SIGTERM
        print(f"ttt tokenize: stopped by {received.name}; the same command goes on here", file=sys.stderr)
        return 128 + received
    print(f"{options.output}: {about['tokenizer']['name']}, {about['vocab_size']:,} tokens in the vocabulary", end="; ")
    print("; ".join(f"{key} {'none' if about[key] is None else about[key]}" for key in ("bos", "eos")))
    for split, counts in about["splits"].items():
        print(
            f"  {split}: {counted(counts['documents'], 'document')}, {counted(counts['tokens'], 'token')}, "
            f"{counted(counts['text_bytes'], 'byte')} of text"
        )
        if counts.get("empty_documents"):
            words = "has no tokens of its own" if counts["empty_documents"] == 1 else "have no tokens of their own"
            print(f"    {counts['empty_documents']:,} of the documents {words}")
        if counts.get("unknown_tokens"):
            verb = "stands" if counts["unknown_tokens"] == 1 else "stand"
            print(
                f"    {counts['unknown_tokens']:,} of the tokens {verb} for characters that the tokenizer does not know"
            )
    if about["skipped_records"]:
        print(f"  left out: {counted(about['skipped_records'], 'record')}, listed in {output.path('problems.jsonl')}")
    return 0


def _tokenize(
    options: argparse.Namespace, found: list, output: "Store", lock: WorkdirLock
) -> tuple[dict | None, signal.Signals | None]:
    """Return what the dataset is, None where a signal stopped the run before its end, and the signal."""
    from ttt_jax.data.prepare import engines, text_fidelity, tokenize, tokenizer, train_bpe
    from ttt_jax.data.prepare.job import Job

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
        chosen = train_bpe.kept_or_trained(output, found, options.train_bpe, job, skip_problems=skip)
        trained = {"vocab_size": options.train_bpe, "most_bytes": train_bpe.MOST_BYTES}
    bos, eos = None if options.no_bos else chosen.bos, None if options.no_eos else chosen.eos
    job = dataclasses.replace(job, tokenizer=chosen, bos=bos, eos=eos)
    if options.engine == "ray":
        engine = engines.ray(options.ray_address)
    else:
        engine = engines.processes(options.workers or engines.cores())
    bar = _Bar(sum(file.size for file in found))
    with StopSignals() as signals:
        try:
            about = tokenize.tokenize(
                found,
                job,
                output,
                engine,
                skip_problems=skip,
                trained=trained,
                progress=bar,
                tell=functools.partial(print, file=sys.stderr, flush=True),
                stop=lambda: signals.received,
                check=lock.check,
            )
        finally:
            bar.close()
    return about, signals.received


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
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: expected 1 or more")
    for key in ("bos", "eos"):
        if getattr(options, f"{key}_token") and (getattr(options, f"no_{key}") or options.train_bpe is not None):
            other = f"--no-{key}" if getattr(options, f"no_{key}") else "--train-bpe"
            raise ConfigError(f"--{key}-token: has no place beside {other}")


class _Bar:
    """Shows documents, tokens, MB of text per second, and the time that is left."""

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
