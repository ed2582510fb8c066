"""Write the files of ``ttt train``, ``ttt eval`` and ``ttt inspect`` with made-up numbers, and read figures."""

import json
import math
import re
import unittest.mock

import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.evaluation import evaluations, inspections, statistics
from ttt_jax.models import pattern

WINDOWS = 6  # of an evaluation, a document each


def run(
    workdir,
    *,
    perplexity=10.0,
    context=64,
    flops=1e15,
    parameters=1_234_567,
    noise=0,
    seconds=None,
    bad=(),
    about=None,
    **keys,
):
    """Write a run whose evaluation has exactly this perplexity; return its workdir.

    Args:
      flops, parameters: of training and model, as the evaluation has them.
      noise: the seed of the losses; with equal seeds, documents are equally hard for two runs.
      seconds: per step, one for each record of metrics.jsonl.
      bad: pairs of window and position whose losses are NaN.
      about: more keys of the evaluation.
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
        "model": pattern.describe(config.model),
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
        "windows": WINDOWS,
        "documents": WINDOWS,
        "config": config.to_dict(),
    }
    save_evaluation(workdir, {**known, **(about or {})}, loss=math.log(perplexity), noise=noise, bad=bad)
    return workdir


def save_evaluation(workdir, about, *, loss, noise=0, bad=()):
    """Write an evaluation whose losses fall with the position; windows, a document each, differ in how hard they are.

    Args:
      bad: pairs of window and position whose losses are NaN.
    """
    context, rng = about["context"], np.random.default_rng(noise)
    curve = 1 / np.sqrt(np.arange(1, context + 1)) + rng.normal(0, 0.2, (WINDOWS, context))
    nll = curve + rng.normal(0, 0.1, (WINDOWS, 1))
    counted = np.arange(context) != 10  # a position that does not count
    nll += loss - nll[:, counted].mean()
    for window, position in bad:
        nll[window, position - 1] = np.nan
    segments = [statistics.Segment(i, 0, row, counted) for i, row in enumerate(nll)]
    with unittest.mock.patch.object(statistics, "_REPETITIONS", 20):  # most of the time goes to the bootstrap
        found = statistics.summarise(segments, context)
    tokens, error = int(found.tokens.sum()), float(found.all.standard_error)
    means = {"tokens": tokens, "loss": loss, "loss_standard_error": error, "perplexity": math.exp(loss)}
    if bad:
        unknown = dict.fromkeys(("loss", "loss_standard_error", "loss_low", "loss_high", "perplexity"))
        means |= {**unknown, "not_finite": found.not_finite}
    stem = evaluations.name(about["split"], context, by_document=about["of"] == "documents", carried=about["carried"])
    evaluations.save(evaluations.from_summary({**about, **means}, found), workdir / "eval", stem)


def save_inspection(workdir, losses, *, split="validation", mini_batch=1):
    """Write the files of ``ttt inspect``; ``losses`` are [L, T] each, by name."""
    layers, context = losses["loss_at_w0"].shape
    by_position = {"target_spread": np.ones((layers, context)), "weight_change": np.ones((layers, 1)), **losses}
    by_position["eta"] = np.ones((layers, 2, context))
    errors = {f"{name}_standard_error": np.zeros_like(values) for name, values in by_position.items() if name != "eta"}
    found = inspections.Inspection(
        about={
            "model": "TTT-Linear (Mamba backbone)",
            "step": 100,
            "source": "books/validation",
            "windows": 6,
            "of": "windows",
            "context": context,
        },
        position=np.arange(1, context + 1),
        weight_position=np.array([context]),
        weight_distance=np.ones((layers, 2, 1)),
        w0_norm=np.ones((layers, 2)),
        eta_standard_error=np.zeros((layers, context)),
        position_eta=np.ones((layers, mini_batch)),
        **by_position,
        **errors,
    )
    inspections.save(found, workdir, inspections.name(split, context))


def words(path) -> list[str]:
    """Return the texts of an SVG figure, which Matplotlib writes as comments beside the outlines of letters."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    """Return the drawn lines by label, as pairs of x and y."""
    found = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    return {label: [tuple(pair) for pair in pairs] for label, pairs in found.items() if not label.startswith("_")}
