"""Write small files of every kind that the package writes: of a run, a dataset, an evaluation and a sweep."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import saved_runs

from ttt_jax import config as config_lib
from ttt_jax.data.prepare import listing, tokenize_units, tokenizer, train_bpe
from ttt_jax.data.prepare.files import InputFile
from ttt_jax.data.prepare.tokenize import tokenize
from ttt_jax.evaluation.probes.cells import Cells
from ttt_jax.evaluation.result_files import PartialResults
from ttt_jax.storage.store import Store
from ttt_jax.sweep import files as sweep_files
from ttt_jax.sweep import points
from ttt_jax.training import loop

BYTES = tokenize_units.Job(tokenizer.byte(), None, None)
SMALL = {"shard": 1024, "chunk": 256, "unit_bytes": 1500, "save_seconds": -1}
IDENTITY = {"of": "windows", "windows": 6}
LENGTHS = [8] * 6
UNFINISHED = "sweep/a/eval/.validation-32.unfinished"


def make(root: Path) -> None:
    """Write a run that is a point of a sweep, with its results, a finished and an unfinished dataset."""
    make_without_training(root)
    loop.train(config_of(root), root / "sweep" / "a")


def make_without_training(root: Path) -> None:
    """Write the files of :func:`make` that a run does not leave by itself."""
    texts = inputs(root)
    trained = train_bpe.train(texts[:1], 300, BYTES)
    (root / "bpe.json").write_bytes(trained)
    tokenize(texts, tokenize_job(root), Store(root / "dataset"), tokenize_units.processes(1), **SMALL)
    stopped(root, "unfinished", **SMALL)
    train_bpe.load_or_train(Store(root / "begun"), texts, 300, BYTES)

    workdir = root / "sweep" / "a"
    workdir.mkdir(parents=True)
    sweep_files.write_sweep(
        root / "sweep",
        sweep_files.Sweep(
            {"training.duration": "4 steps"},
            [points.Point("a", "configs/quickstart.py", {"training.seed": 1}, 4)],
        ),
    )
    sweep_files.write_record(workdir, sweep_files.Record(sweep_files.DONE, 4, 0, ended=5.0))
    saved_runs.save_evaluation(workdir, {**_about(), "config": config_of(root).to_dict()}, loss=2.0)
    ones = {name: np.ones((2, 64)) for name in ("loss_at_w0", "loss_before", "loss_after")}
    saved_runs.save_inspection(workdir, ones)
    cells = Cells(workdir, "needle", ["context", "depth"])
    for depth in (0.0, 0.5):
        cells.add(
            {"context": 64, "depth": depth, "share": 0.25, "asked": [{"answer": "7", "right": True}]}, {"step": 4}
        )
    half = PartialResults(root / UNFINISHED, IDENTITY, LENGTHS)
    for i in range(4):
        half.add(np.arange(8.0) + i)
        half.flush()


def inputs(root: Path) -> list[InputFile]:
    rng = np.random.default_rng(0)
    words = ["loss", "of", "a", "small", "model", "whose", "weights", "learn", "été", "\n"]
    for split, count in (("train", 40), ("validation", 8)):
        path = root / f"{split}.jsonl"
        if not path.exists():
            texts = [" ".join(rng.choice(words, 30)) for _ in range(count)]
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [found for split in ("train", "validation") for found in listing.find(split, [str(root / f"{split}.jsonl")])]


def tokenize_job(root: Path) -> tokenize_units.Job:
    kept = tokenizer.load(str(root / "bpe.json"), bos_token="<s>", eos_token="</s>")
    return tokenize_units.Job(kept, kept.bos, kept.eos)


def stopped(root: Path, name: str, **sizes: Any) -> None:
    """Tokenize half of the texts, and stop."""
    units = iter(range(100))
    store = Store(root / name)
    tokenize(
        inputs(root), tokenize_job(root), store, tokenize_units.processes(1), stop=lambda: next(units) > 3, **sizes
    )


SETTINGS = {
    "model.vocab_size": 300,
    "model.width": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.mlp_width": 16,
    "data.sequence_length": 32,
    "data.batch_size": 1,
    "training.duration": "4 steps",
    "checkpoint.every": "2 steps",
    "checkpoint.keep_last": 2,
    "evaluation.every": "2 steps",
    "evaluation.windows": 1,
    "log.every": "1 step",
}


def config_of(root: Path) -> Any:
    """Return the config of the run."""
    config = config_lib.default()
    for key, value in {**SETTINGS, "data.source": str(root / "dataset")}.items():
        config_lib.set_value(config, key, value)
    config_lib.validate(config)
    return config


def _about() -> dict[str, Any]:
    return {
        "workdir": "sweep/a",
        "model": "TTT-Linear (Mamba backbone)",
        "parameters": 5,
        "step": 4,
        "training_tokens": 128,
        "training_flops": 1e9,
        "source": "dataset/validation",
        "fingerprint": "f1",
        "split": "validation",
        "of": "windows",
        "carried": False,
        "context": 32,
        "training_context": 32,
        "windows": saved_runs.WINDOWS,
        "documents": saved_runs.WINDOWS,
    }
