"""Provide a run with random parameters, and tasks in files, for the tests of the harness."""

import json
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import numpy as np
import pytest
from harness_data import DOCUMENTS, LONGEST, QUESTIONS, TRAINING

from ttt_jax import config as config_lib
from ttt_jax.models.language_model import build_model

TASKS = {
    "choice": ("multiple_choice", '"{{question}}"', '"{{answer}}"', ["acc", "acc_norm"]),
    "rolling": ("loglikelihood_rolling", '""', '"{{text}}"', ["word_perplexity", "byte_perplexity", "bits_per_byte"]),
    "writing": ("generate_until", '"{{text}}"', '"{{text}}"', ["exact_match"]),
}


@pytest.fixture(scope="session")
def shared_scorers():
    """Let models of one checkpoint share the programs that they compile."""
    from ttt_jax.interop import harness

    known, make = {}, harness.Scorer

    def scorer(trained, rows):
        key = trained.workdir, trained.step, rows
        return known[key] if key in known else known.setdefault(key, make(trained, rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "Scorer", scorer)
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory, save_run, quick_jit, shared_scorers):
    """Return a workdir, and a function for log-likelihoods of all tokens but the first, and the likeliest tokens.

    Both results of the function have shape [N - 1].
    """
    config = config_lib.default()
    config.model.update(mixer="ttt_linear", width=8, num_layers=1, num_heads=2, mlp_width=8)
    config.model.ttt.mini_batch = 4
    config.data.update(sequence_length=TRAINING, batch_size=2)
    workdir = tmp_path_factory.mktemp("harness") / "run"
    params = save_run(workdir, config, (3, 5))
    model = build_model(config.model)
    forward = quick_jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])

    def log_likelihoods(tokens, step=5):
        padded = np.zeros((1, LONGEST + 2), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(params[step], padded), np.float64)[0, : len(tokens) - 1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return log_p[np.arange(len(tokens) - 1), tokens[1:]], logits.argmax(-1)

    return workdir, log_likelihoods


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """Return a folder of tasks with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.jsonl").write_text("".join(json.dumps(x) + "\n" for x in QUESTIONS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in DOCUMENTS))
    for name, (kind, text, target, metrics) in TASKS.items():
        data = folder / ("choice.jsonl" if name == "choice" else "texts.jsonl")
        (folder / f"{name}.yaml").write_text(
            f"task: here_{name}\ndataset_path: json\ntest_split: test\noutput_type: {kind}\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}\n"
            f"doc_to_text: {text}\ndoc_to_target: {target}\n"
            + 'doc_to_choice: choices\ntarget_delimiter: ""\n' * (name == "choice")
            + "metric_list:\n"
            + "".join(f"  - metric: {metric}\n" for metric in metrics)
        )
    return folder


@pytest.fixture(scope="session")
def model(run):
    """Return the newest checkpoint of the run as a model of the harness."""
    from ttt_jax.interop import harness

    return harness.TTTModel(str(run[0]))
