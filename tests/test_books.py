"""Tokenize, train, evaluate and plot real books with ``configs/books.py``, as a user types it.

The books are those of ``../shared/data/books``. Without them, they are the beginnings of four novels (George Eliot,
Melville, Austen, Wells; in the public domain) in the Pile's record layout.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from backports import zstd

from ttt_jax import cli

ROOT = Path(__file__).parents[1]
BOOKS = ROOT.parent / "shared" / "data" / "books" / "tiny.jsonl.zst"
SMALL = [
    *("--config.model.width=32", "--config.model.num_heads=2", "--config.model.mlp_width=48"),
    *("--config.data.sequence_length=128", "--config.data.batch_size=2"),
    *("--config.training.duration=12 steps", "--config.optimizer.warmup=2 steps", "--config.checkpoint.every=50%"),
    "--config.optimizer.peak_lr=1e-2",
]


def typed(*arguments) -> str:
    """Run a command in another process, and return what it printed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "ttt_jax", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def here(monkeypatch, capsys):
    """Return ``here(*arguments)``, which runs a command in this process and returns what it printed."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        assert cli.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> tuple[Path, list[str]]:
    """Return a compressed file of books, and their texts."""
    path = tmp_path_factory.mktemp("books") / "books.jsonl.zst"
    if BOOKS.exists():
        path.write_bytes(BOOKS.read_bytes())
    else:
        path.write_bytes(zstd.compress((ROOT / "tests" / "books.jsonl").read_bytes()))
    return path, [json.loads(line)["text"] for line in zstd.decompress(path.read_bytes()).splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokenize_train_evaluate_plot(books, tmp_path, here, kind):
    """Run with bytes in this process, and with a trained tokenizer in other processes."""
    path, texts = books
    ttt = here if kind == "byte" else typed
    dataset = tmp_path / "dataset"
    how = ["--tokenizer", "byte"] if kind == "byte" else ["--train-bpe", 400]
    copy = tmp_path / "validation.jsonl.zst"
    copy.write_bytes(path.read_bytes())
    ttt("tokenize", "--train", path, "--validation", copy, *how, "--output", dataset)

    description = json.loads((dataset / "dataset.json").read_text())
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{dataset}/train/"}}
    tokens = ts.open(spec).result().read().result()
    starts = np.flatnonzero(tokens == description["bos"])
    ends = np.flatnonzero(tokens == description["eos"])
    assert len(starts) == len(ends) == len(texts) == description["splits"]["train"]["documents"]
    assert description["vocab_size"] == (258 if kind == "byte" else 400)
    if kind == "byte":
        found = [tokens[start + 1 : end].astype(np.uint8).tobytes().decode() for start, end in zip(starts, ends)]  # noqa: B905
        assert found == texts

    vocabulary = description["vocab_size"]
    config = ["--config", f"configs/books.py:ttt_linear,{kind}", "--config.data.source", dataset, *SMALL]
    config += ["--config.model.vocab_size", vocabulary]
    workdir = tmp_path / "run"
    ttt("train", *config, "--workdir", workdir)
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert abs(losses[0] - np.log(vocabulary)) < 0.2  # uniform before training
    assert losses[-1] < losses[0] - 0.3

    printed = ttt("eval", "--workdir", workdir, "--context", 300, "--by-document")
    assert f"dataset/validation, {len(texts)} documents of up to 300 tokens: loss" in printed
    about = json.loads((workdir / "eval" / "validation-documents-300.json").read_text())
    assert about["loss"] < losses[0] - 0.3
    with (workdir / "eval" / "validation-documents-300.csv").open(newline="") as file:
        assert [int(row["count"]) for row in csv.DictReader(file)] == [len(texts)] * 300  # every book is longer
    ttt("plot", "loss-by-position", workdir, "--by-document", "--output", tmp_path / "books.png")
    assert (tmp_path / "books.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_config_and_the_data_must_agree(books, tmp_path, here, capsys):
    dataset = tmp_path / "dataset"
    here("tokenize", "--train", books[0], "--tokenizer", "byte", "--output", dataset)
    command = ["train", "--config", "configs/books.py:ttt_linear", *SMALL]
    command += ["--config.data.source", str(dataset), "--workdir", str(tmp_path / "run")]
    for option, message in [
        ("--config.data.tokenizer=llama", f"data.tokenizer='llama': {dataset}/train was made by byte byte"),
        (
            "--config.model.vocab_size=257",
            f"model.vocab_size=257: {dataset}/train has 258 tokens; expected 258 or more",
        ),
        ("--config.data.sequence_length=8388608", f"data.sequence_length=8388608: {dataset}/train has"),
        ("--config.data.batch_size=1048576", f"data.sequence_length=128: {dataset}/train has"),
    ]:
        assert cli.main([*command, option]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ttt train: ")]
        assert len(lines) == 1
        assert lines[0].startswith(f"ttt train: {message}")
    assert not (tmp_path / "run").exists()
