#!/usr/bin/env python
"""Measure how fast text becomes tokens, and tokens become batches.

    python scripts/bench_data.py [FILES ...]

FILES are as for ``ttt tokenize --train``; without them, the Python standard library as JSON lines is used. Each number
is the median of several runs, taken in turns.

- BPE: ``ttt tokenize`` with a tokenizer of 8192 tokens trained on the text, from compressed text to dataset, against
  the tokenizer library alone: ``encode_batch`` and ``encode_batch_fast`` of all texts in memory, on all its threads.
- bytes: ``ttt tokenize`` with the byte tokenizer.
- batches: shuffled windows of 2048 and 32768 tokens of that dataset, and the time to the first batch at step 10^6.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from backports import zstd

from ttt_jax.data import named_sources, pipeline
from ttt_jax.data.prepare import listing, records, tokenizer, train_bpe
from ttt_jax.data.prepare.tokenize_units import Job

_BATCH_TOKENS = 1 << 18


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILES")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most-mb", type=float, default=100.0, help="MB of text for the BPE comparison (default: 100)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        patterns = options.files or [_standard_library(Path(folder))]
        _bpe(patterns, options, Path(folder))
        dataset = _bytes(patterns, options, Path(folder))
        _batches(dataset, options)


def _bpe(patterns: list[str], options: argparse.Namespace, folder: Path) -> None:
    texts: list[str] = []
    size = 0
    for text in _texts(patterns):
        texts.append(text)
        size += len(text.encode())
        if size > options.most_mb * 1e6:
            break
    path = folder / "text.jsonl.zst"
    _write(path, texts)
    found = listing.find("train", [str(path)])
    content = train_bpe.train(found, 8192, Job(tokenizer.byte(), None, None))
    (folder / "tokenizer.json").write_bytes(content)
    library = tokenizers.Tokenizer.from_buffer(content)
    runs = {
        "library, encode_batch": lambda: library.encode_batch(texts, add_special_tokens=False),
        "library, encode_batch_fast": lambda: library.encode_batch_fast(texts, add_special_tokens=False),
        "ttt tokenize": lambda: _tokenize([str(path)], str(folder / "tokenizer.json"), folder / "bpe"),
    }
    times = _in_turns(runs, options.repeats)
    best = min(wall for name, (wall, _) in times.items() if name.startswith("library"))
    least = min(cpu for name, (_, cpu) in times.items() if name.startswith("library"))
    print(f"BPE, {size / 1e6:.0f} MB of text in {len(texts)} documents; in brackets: relative to the library's best")
    for name, (wall, cpu) in times.items():
        print(
            f"  {name:<28} {size / 1e6 / wall:5.2f} MB/s ({best / wall:.2f})  "
            f"{size / 1e6 / cpu:5.2f} MB per second of CPU ({least / cpu:.2f})"
        )


def _bytes(patterns: list[str], options: argparse.Namespace, folder: Path) -> Path:
    times = _in_turns({"bytes": lambda: _tokenize(patterns, "byte", folder / "bytes")}, options.repeats)
    made = json.loads((folder / "bytes" / "dataset.json").read_text())["splits"]["train"]
    print(f"bytes, {made['text_bytes'] / 1e6:.0f} MB of text: {made['text_bytes'] / 1e6 / times['bytes'][0]:.1f} MB/s")
    return folder / "bytes"


def _batches(dataset: Path, options: argparse.Namespace) -> None:
    source = named_sources.load(str(dataset), "train")
    print(f"batches, from {len(source.tokens):,} tokens on disk")
    for length in (2048, 32768):
        rates = []
        for seed in range(options.repeats):
            batches = pipeline.train_batches(
                source, sequence_length=length, batch_size=_BATCH_TOKENS // length, seed=seed
            )
            next(batches)
            start, steps = time.perf_counter(), 200
            for _ in range(steps):
                next(batches)
            rates.append(steps * _BATCH_TOKENS / (time.perf_counter() - start))
        print(f"  windows of {length:>5}: {statistics.median(rates) / 1e6:.1f} M tokens/s")
    start = time.perf_counter()
    next(pipeline.train_batches(source, sequence_length=2048, batch_size=8, seed=0, start=10**6))
    print(f"  first batch at step 10^6: {time.perf_counter() - start:.3f} s")


def _tokenize(patterns: list[str], tokenizer: str, output: Path) -> None:
    """Run the command as a user types it, including the start of Python."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "ttt_jax", "tokenize", "--train", *patterns, "--tokenizer", tokenizer]
    subprocess.run([*command, "--output", str(output)], check=True, capture_output=True)


def _in_turns(runs: dict[str, Callable], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the median seconds of each run, by the clock and of all cores."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start, busy = time.perf_counter(), _cpu_seconds()
            run()
            times[name].append((time.perf_counter() - start, _cpu_seconds() - busy))
    medians = {name: [statistics.median(x) for x in zip(*values, strict=True)] for name, values in times.items()}
    return {name: (wall, cpu) for name, (wall, cpu) in medians.items()}


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of the processes that it has waited for."""
    return sum(os.times()[:4])


def _texts(patterns: list[str]) -> Iterator[str]:
    for _, unit, _ in records.units(listing.find("train", patterns), records.Position(), 1 << 20, "text"):
        for record in records.texts(unit, "text"):
            if isinstance(record, tuple):
                yield record[1]


def _standard_library(folder: Path) -> str:
    tokens = named_sources.embedded_tokens("train")
    starts = np.flatnonzero(tokens == named_sources.EMBEDDED_BOS)
    documents = [part[1:].astype(np.uint8).tobytes().decode(errors="replace") for part in np.split(tokens, starts)[1:]]
    _write(folder / "library.jsonl.zst", documents)
    return str(folder / "library.jsonl.zst")


def _write(path: Path, texts: list[str]) -> None:
    with zstd.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


if __name__ == "__main__":
    main()
