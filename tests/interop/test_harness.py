"""Tasks of lm-evaluation-harness that lie here, against plain float64 log-likelihoods from the logits. No network."""

import json
import math
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import numpy as np
import pytest

from ttt_jax import cli
from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.models.build import language_model

pytest.importorskip("lm_eval", reason="pip install 'ttt_jax[harness]' runs the tests of ttt harness")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from ttt_jax.data.errors import DataError
from ttt_jax.interop import harness

TRAINING, BOS, LONGEST = 16, 256, 64
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " of stone and glass"], "answer": 0},
    {"question": "One, two, three and so on to", "choices": [" ten", " the end"], "answer": 1},
    {"question": "It is ", "choices": ["so", "nobody's business", "no"], "answer": 0},  # spaces go to the answers
    {"question": "", "choices": ["Yes", "No"], "answer": 1},
]
DOCUMENTS = ["It was a bright cold day in April, and the clocks were striking.", "No.", "Où est-il allé hier ?"]
TASKS = {
    "choice": ("multiple_choice", '"{{question}}"', '"{{answer}}"', ["acc", "acc_norm"]),
    "rolling": ("loglikelihood_rolling", '""', '"{{text}}"', ["word_perplexity", "byte_perplexity", "bits_per_byte"]),
    "writing": ("generate_until", '"{{text}}"', '"{{text}}"', ["exact_match"]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, save_run, quick_jit):
    """A workdir, and ``log_likelihoods(tokens)``: of each token but the first, [N - 1], and the likeliest tokens."""
    config = config_lib.default()
    config.model.update(mixer="ttt_linear", width=8, num_layers=1, num_heads=2, mlp_width=8)
    config.model.ttt.mini_batch = 4
    config.data.update(sequence_length=TRAINING, batch_size=2)
    workdir = tmp_path_factory.mktemp("harness") / "run"
    params = save_run(workdir, config, (3, 5))
    model = language_model(config.model)
    forward = quick_jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])

    def log_likelihoods(tokens, step=5):
        padded = np.zeros((1, LONGEST + 2), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(params[step], padded), np.float64)[0, : len(tokens) - 1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return log_p[np.arange(len(tokens) - 1), tokens[1:]], logits.argmax(-1)

    return workdir, log_likelihoods


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks with their data."""
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


@pytest.fixture(scope="module")
def model(run):
    return harness.TTTModel(str(run[0]))


def bytes_of(text):
    return list(text.encode())


def answers(log_likelihoods, question):
    """Log-likelihood of each choice, and whether greedy decoding finds it."""
    found = []
    for choice in question["choices"]:
        context = question["question"].rstrip()
        continuation = bytes_of((question["question"] + choice)[len(context) :])
        tokens = [BOS, *bytes_of(context), *continuation]
        log_p, likeliest = log_likelihoods(tokens)
        n = len(continuation)
        found.append((log_p[-n:].sum(), (likeliest[-n:] == continuation).all()))
    return found


def instances(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_both_kinds_of_tasks(run, tasks, model):
    _, log_likelihoods = run
    results = harness.evaluate(model, ["here_choice", "here_rolling"], include_path=tasks)
    found = harness.by_task(results, model)
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


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_and_greedy_answers(run, batch_size):
    """Also of answers that greedy decoding finds, shorter and longer than the training context, at any batch size."""
    workdir, log_likelihoods = run
    model = get_model("ttt_jax").create_from_arg_string(f"workdir={workdir}", {"batch_size": batch_size})
    greedy = [BOS, *b"Once upon"]
    for _ in range(12):  # crosses the training context
        greedy.append(int(log_likelihoods([*greedy, 0])[1][-1]))
    requests = [((None, None), greedy[1:-n], greedy[-n:]) for n in (3, 1, 12)]
    wrong = [*greedy[:-2], (greedy[-2] + 1) % 256, greedy[-1]]
    requests.append(((None, None), wrong[1:-3], wrong[-3:]))
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, True, True, False]
    for (_, context, continuation), (total, _) in zip(requests, found, strict=True):
        expected = log_likelihoods([BOS, *context, *continuation])[0][-len(continuation) :].sum()
        assert total == pytest.approx(expected, rel=1e-4)

    pairs = [(question["question"], choice) for question in QUESTIONS for choice in question["choices"]]
    expected = [answer for question in QUESTIONS for answer in answers(log_likelihoods, question)]
    found = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4)


def test_whole_documents_and_windows(run, model):
    """Without a limit each token sees all before it; with one, the harness's windows of so many tokens."""
    workdir, log_likelihoods = run
    tokens = bytes_of(DOCUMENTS[0])
    requests = instances("loglikelihood_rolling", (DOCUMENTS[0],), ("",), (DOCUMENTS[1],))
    whole, nothing, short = model.loglikelihood_rolling(requests, disable_tqdm=True)
    assert whole == pytest.approx(log_likelihoods([BOS, *tokens])[0].sum(), rel=1e-5)
    assert nothing == 0

    limited = harness.TTTModel(str(workdir), max_length=10)
    windows, _, same = limited.loglikelihood_rolling(requests, disable_tqdm=True)
    row, expected = [BOS, *tokens], 0.0
    for start in range(0, len(tokens), 10):
        stop = min(start + 10, len(tokens))
        read = row[max(0, stop - 10) : stop + 1]  # ten inputs, also of the last window, and a target for each
        expected += log_likelihoods(read)[0][-(stop - start) :].sum()
    assert windows == pytest.approx(expected, rel=1e-5)
    assert abs(windows - whole) > 0.1
    assert same == pytest.approx(short, rel=1e-5)

    (total, _), *_ = limited.loglikelihood(
        instances("loglikelihood", ("A long beginning of", " it")), disable_tqdm=True
    )
    last = bytes_of("A long beginning of it")[-11:]
    assert total == pytest.approx(log_likelihoods(last)[0][-3:].sum(), rel=1e-5)


def test_the_token_before_a_text(run):
    """BOS by default, as in training; another one; none where there is a context."""
    workdir, log_likelihoods = run
    request = instances("loglikelihood", ("ab", "c"), ("", "abc"))
    for options, with_context, without in (
        ({}, [BOS], [BOS]),
        ({"prefix_token": 7}, [7], [7]),
        ({"add_bos_token": False}, [], [BOS]),
    ):
        found = harness.TTTModel(str(workdir), **options).loglikelihood(request, disable_tqdm=True)
        assert found[0][0] == pytest.approx(log_likelihoods([*with_context, *b"abc"])[0][-1], rel=1e-5)
        assert found[1][0] == pytest.approx(log_likelihoods([*without, *b"abc"])[0].sum(), rel=1e-5)


def test_what_cannot_be_run(run, tasks, model, tmp_path):
    workdir = str(run[0])
    for options, message in (
        ({"step": 4}, "--step 4: no such checkpoint"),
        ({"step": "all"}, "--step all: several checkpoints; expected newest, best or a number"),
        ({"max_length": 0}, "max_length=0: expected 1 or more"),
        ({"tokenizer": "words.txt"}, "--tokenizer words.txt: expected byte"),
    ):
        with pytest.raises(ConfigError, match=message):
            harness.TTTModel(workdir, **options)
    with pytest.raises(
        ConfigError, match=r"--tasks here_writing: text is not generated yet; expected tasks that ask for"
    ):
        harness.evaluate(model, ["here_choice", "here_writing"], include_path=tasks)
    with pytest.raises(NotImplementedError, match="text is not generated yet"):
        model.generate_until([])
    with pytest.raises(ConfigError, match="--include-path nowhere: no such folder"):
        harness.evaluate(model, ["here_choice"], include_path="nowhere")
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere.jsonl}\n")
    with pytest.raises(DataError, match=r"--tasks bad: cannot be loaded: .*nowhere.jsonl"):
        harness.evaluate(model, ["bad"], include_path=tmp_path)
    model.trained.config.model.vocab_size = 90  # of a model of another tokenizer
    try:
        with pytest.raises(ConfigError, match=r"tokenizer byte: token 100 of 'abcd' is not among the 90 of the model"):
            model.tok_encode("abcd")
    finally:
        model.trained.config.model.vocab_size = 257


def test_the_command(run, tasks, tmp_path, capsys):
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


def test_help_and_refusals_do_not_load_jax(in_one_process):
    a_folder = "harness --workdir x --tasks a --output /"
    found = in_one_process(
        ["harness --help", "harness --workdir x", "harness --workdir x --tasks a --limit 0", a_folder]
    )
    status, out, _ = found["harness --help"]
    assert status == 0
    assert all(text in out for text in ("--include-path DIR", "--max-length N", "pip install 'ttt_jax[harness]'"))
    assert "required: --tasks" in found["harness --workdir x"][2]
    assert found["harness --workdir x --tasks a --limit 0"][0] == 2
    assert found[a_folder] == [2, "", "ttt harness: --output /: is a folder; expected a file\n"]
