"""Run tasks of lm-evaluation-harness from local files, without a network, and check results and files."""

import json
import math
import runpy

import numpy as np
import pytest
from harness_data import BOS, DOCUMENTS, QUESTIONS, TRAINING, answers, bytes_of
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api import registry

from ttt_jax import cli
from ttt_jax.config import ConfigError
from ttt_jax.errors import DataError
from ttt_jax.interop import harness, harness_tasks
from ttt_jax.storage import json_files


@pytest.mark.slow
def test_metrics_of_both_kinds_of_tasks(run, tasks, model):
    _, log_likelihoods = run
    results = harness_tasks.evaluate(model, ["here_choice", "here_rolling"], include_path=tasks)
    found = harness_tasks.by_task(results, model)
    right, right_by_length = [], []
    for question in QUESTIONS:
        scores = np.array([score for score, _ in answers(log_likelihoods, question)])
        lengths = [len(choice) for choice in question["choices"]]
        right.append(np.argmax(scores) == question["answer"])
        right_by_length.append(np.argmax(scores / lengths) == question["answer"])
    choice = found["here_choice"]
    assert choice["metrics"]["acc"]["value"] == pytest.approx(np.mean(right))
    assert choice["metrics"]["acc"]["standard_error"] == pytest.approx(np.std(right, ddof=1) / 2)
    assert choice["metrics"]["acc_norm"]["value"] == pytest.approx(np.mean(right_by_length))
    assert choice["documents"] == {"original": 4, "effective": 4}
    assert (choice["model_workdir"], choice["model_step"], choice["training_context"]) == ("run", 5, TRAINING)

    total = sum(log_likelihoods([BOS, *bytes_of(text)])[0].sum() for text in DOCUMENTS)
    words = sum(len(text.split()) for text in DOCUMENTS)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    rolling = {name: metric["value"] for name, metric in found["here_rolling"]["metrics"].items()}
    assert rolling["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert rolling["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert rolling["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)


def test_a_perplexity_that_overflows_is_infinite_and_null_in_json(model):
    with harness_tasks._overflow_is_infinite():
        perplexity = lm_eval_metrics.weighted_perplexity([(-2000.0, 1)])
    assert perplexity == math.inf
    assert lm_eval_metrics.math is math
    results = {"results": {"t": {"word_perplexity,none": perplexity, "word_perplexity_stderr,none": math.nan}}}
    assert harness_tasks.by_task(results, model)["t"]["metrics"] == {
        "word_perplexity": {"value": None, "standard_error": None, "not_finite": "inf"}
    }


def test_results_of_other_options_are_kept_beside_one_another(tmp_path):
    names = [
        harness_tasks.file_name("a/b", **options)
        for options in ({}, {"num_fewshot": 0}, {"max_length": 64}, {"prefix_token": 0}, {"tokenizer": "0123456789"})
    ]
    assert names == ["a_b", "a_b-0-shot", "a_b-windows-64", "a_b-prefix-0", "a_b-tokenizer-01234567"]
    about = {"task": "a/b", "max_length": None, "num_fewshot": 0, "identity": "11", "model_step": 5}
    other = {**about, "task": "a_b", "identity": "22"}
    assert harness_tasks.save(tmp_path, "a_b", about) == str(tmp_path / "a_b.json")
    note = " (beside a_b.json, which has other options or texts)"
    assert harness_tasks.save(tmp_path, "a_b", other) == f"{tmp_path / 'a_b-22.json'}{note}"
    replaced = {**about, "model_step": 9}
    note = " (in place of the result of step 5)"
    assert harness_tasks.save(tmp_path, "a_b", replaced) == f"{tmp_path / 'a_b.json'}{note}"
    assert json_files.read_object(tmp_path / "a_b.json") == replaced
    assert json_files.read_object(tmp_path / "a_b-22.json") == other
    (tmp_path / "a_b.json").write_text("{")
    note = " (beside a_b.json, which is damaged)"
    assert harness_tasks.save(tmp_path, "a_b", about) == f"{tmp_path / 'a_b-11.json'}{note}"


@pytest.mark.slow
def test_wrong_options_and_tasks_are_refused(run, tasks, model, tmp_path):
    workdir = str(run[0])
    for options, message in (
        ({"step": 4}, "--step 4: no such checkpoint"),
        ({"step": "all"}, "--step all: several checkpoints; expected newest, best or a number"),
        ({"max_length": 0}, "max_length=0: expected 1 or more"),
        ({"max_length": "x"}, "max_length=x: expected 1 or more"),
        ({"prefix_token": 258}, "prefix_token=258: expected a token of the model, below 258"),
        ({"tokenizer": "words.txt"}, "--tokenizer words.txt: expected byte"),
    ):
        with pytest.raises(ConfigError, match=message):
            harness.TTTModel(workdir, **options)
    with pytest.raises(
        ConfigError, match=r"--tasks here_writing: generation of text is not supported; expected tasks that ask for"
    ):
        harness_tasks.evaluate(model, ["here_choice", "here_writing"], include_path=tasks)
    with pytest.raises(NotImplementedError, match="generation of text is not supported"):
        model.generate_until([])
    with pytest.raises(ConfigError, match="--include-path nowhere: no such folder"):
        harness_tasks.evaluate(model, ["here_choice"], include_path="nowhere")
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere.jsonl}\n")
    with pytest.raises(DataError, match=r"--tasks bad: cannot be loaded: .*nowhere.jsonl"):
        harness_tasks.evaluate(model, ["bad"], include_path=tmp_path)
    model.trained.config.model.vocab_size = 90  # as if the model had another tokenizer
    try:
        with pytest.raises(ConfigError, match=r"tokenizer byte: token 100 of 'abcd' is not among the 90 of the model"):
            model.tok_encode("abcd")
    finally:
        model.trained.config.model.vocab_size = 258


def test_the_command_writes_and_prints_results(run, tasks, tmp_path, capsys):
    workdir, log_likelihoods = run
    command = f"harness --workdir {workdir} --include-path {tasks} --tasks here_rolling --step 3 --limit 2"
    assert cli.main([*command.split(), "--output", str(tmp_path / "new" / "all.json")]) == 0
    out = capsys.readouterr().out
    path = workdir / "harness" / "here_rolling-at-3-first-2.json"
    assert str(path) in out
    about = json.loads(path.read_text())
    assert about["documents"] == {"original": 3, "effective": 2}
    total = sum(log_likelihoods([BOS, *bytes_of(text)], step=3)[0].sum() for text in DOCUMENTS[:2])
    size = sum(len(text.encode()) for text in DOCUMENTS[:2])
    assert about["metrics"]["bits_per_byte"]["value"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert f"{about['metrics']['bits_per_byte']['value']:.4f}" in out
    samples = json.loads((tmp_path / "new" / "all.json").read_text())["samples"]["here_rolling"]
    assert len(samples) == 2


def test_the_command_of_the_harness_makes_the_model(run, monkeypatch):
    """Run the module as ``python -m`` does, with a command of the harness that only makes the model."""
    registered, made = [], []
    monkeypatch.setattr(registry, "register_model", lambda name: lambda kind: registered.append(kind) or kind)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: made.append(registered[0](str(run[0]))))
    runpy.run_path(harness.__file__, run_name="__main__")
    assert made[0].eot_token_id == BOS


def test_a_missing_harness_is_named_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main("harness --workdir nowhere --tasks a".split()) == 2
    message = "lm-evaluation-harness is not installed; pip install 'lm-eval>=0.4.13'"
    assert capsys.readouterr().err == f"ttt harness: {message}\n"


def test_help_and_refusals_do_not_load_jax(in_one_process):
    a_folder = "harness --workdir x --tasks a --output /"
    found = in_one_process(
        ["harness --help", "harness --workdir x", "harness --workdir x --tasks a --limit 0", a_folder]
    )
    status, out, _ = found["harness --help"]
    assert status == 0
    assert all(text in out for text in ("--include-path DIR", "--max-length N", "pip install 'lm-eval>=0.4.13'"))
    assert "required: --tasks" in found["harness --workdir x"][2]
    assert found["harness --workdir x --tasks a --limit 0"][0] == 2
    assert found[a_folder] == [2, "", "ttt harness: --output /: is a folder; expected a file\n"]
