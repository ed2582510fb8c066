"""Runs as they look after ``ttt train``, ``ttt eval`` and ``ttt inspect``, made up; and what a picture says."""

import json
import math
import re

import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.models import build

DOCUMENTS = 8


def run(
    workdir, *, perplexity=10.0, context=64, flops=1e15, parameters=1_234_567, seed=0, seconds=None, about=None, **keys
):
    """The workdir of a run whose evaluation has exactly this perplexity.

    Args:
      flops, parameters: of training and model, as they are written down.
      seed: of the noise of its documents; equal ones are equally hard for two runs.
      seconds: per step, a record of metrics.jsonl each.
      about: what else the evaluation says.
      keys: of the config, with __ for a dot.
    """
    config = config_lib.default()
    config.data.sequence_length = context
    for key, value in keys.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    if seconds is not None:
        records = [{"step": step, "loss": 2.0, "seconds_per_step": each} for step, each in enumerate(seconds, 1)]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    known = {
        "workdir": workdir.name,
        "model": build.describe(config.model),
        "parameters": parameters,
        "step": 100,
        "training_tokens": 1e6,
        "training_flops": flops,
        "source": "books/validation",
        "fingerprint": "f1",
        "split": "validation",
        "of": "windows",
        "carried": False,
        "context": context,
        "training_context": context,
        "windows": 6,
        "documents": DOCUMENTS,
        "config": config.to_dict(),
    }
    save_evaluation(workdir, {**known, **(about or {})}, loss=math.log(perplexity), seed=seed)
    return workdir


def save_evaluation(workdir, about, *, loss, seed=0):
    """Three files, but for the table: losses fall with the position, and documents differ in how hard they are."""
    context = about["context"]
    rng = np.random.default_rng(seed)
    position = np.arange(1, context + 1)
    curve = 1 / np.sqrt(position)
    mean = curve + loss - curve.mean()
    edges = sorted({1, *(round(2 ** (k / 4)) for k in range(4 * 12)), context + 1})
    edges = [edge for edge in edges if edge <= context + 1]
    first, last = np.array(edges[:-1]), np.array(edges[1:]) - 1
    counts = np.tile((last - first + 1).astype(float), (DOCUMENTS, 1))
    bins = np.array([mean[a - 1 : b].mean() for a, b in zip(first, last, strict=True)])
    hard = rng.normal(0, 0.1, (DOCUMENTS, 1))
    hard -= hard.mean()
    sums = (bins + hard) * counts
    residuals = (sums.sum(1) / context) - loss
    error = math.sqrt((residuals**2).sum() / (DOCUMENTS - 1) / DOCUMENTS)
    about = {**about, "tokens": DOCUMENTS * context, "loss": loss, "loss_standard_error": error}
    about = {**about, "perplexity": math.exp(loss)}
    folder = workdir / "eval"
    folder.mkdir(exist_ok=True)
    of = "documents-" if about["of"] == "documents" else ""
    stem = folder / f"{about['split']}-{of}{context}"
    stem.with_suffix(".json").write_text(json.dumps(about))
    arrays = {
        "position": position,
        "loss": mean + rng.normal(0, 0.05, context),
        "standard_error": np.full(context, 0.05),
        "count": np.full(context, DOCUMENTS),
        "bin_first": first,
        "bin_last": last,
        "bin_loss": bins,
        "bin_standard_error": np.full(len(bins), 0.03),
        "bin_low": bins - 0.06,
        "bin_high": bins + 0.06,
        "bin_count": counts.sum(0),
        "document_sums": sums,
        "document_counts": counts,
    }
    np.savez(stem.with_suffix(".npz"), **arrays)


def save_inspection(workdir, losses, *, split="validation", **about):
    """What ``ttt inspect`` writes; ``losses`` are [L, T] each, by name."""
    context = losses["loss_at_w0"].shape[1]
    folder = workdir / "inspect"
    folder.mkdir(parents=True, exist_ok=True)
    known = {"model": "TTT-Linear (Mamba backbone)", "source": "books/validation", "windows": 6, "context": context}
    (folder / f"{split}-{context}.json").write_text(json.dumps({**known, "split": split, **about}))
    np.savez(folder / f"{split}-{context}.npz", position=np.arange(1, context + 1), **losses)


def words(path) -> list[str]:
    """The texts of a drawing, which Matplotlib leaves as comments beside the outlines of their letters."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())
