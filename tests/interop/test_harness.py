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
from ttt_jax.models.language_model import build_model
from ttt_jax.storage import json_files

pytest.importorskip("lm_eval", reason="pip install 'lm-eval>=0.4.13' runs the tests of ttt harness")

from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from ttt_jax.data.prepare import tokenizer as tokenizer_lib
from ttt_jax.errors import DataError, NonFiniteLossError
from ttt_jax.evaluation.losses import Score
from ttt_jax.interop import harness, harness_tasks
from ttt_jax.interop.harness import prefix_token_of

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
    model = build_model(config.model)
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


@pytest.mark.slow
def test_both_kinds_of_tasks(run, tasks, model):
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


@pytest.fixture
def joining(model, monkeypatch):
    """The model with a tokenizer in which some words are one token, and for which a snowman is none."""
    tokens = {"Answer": [1], "Ans": [2, 3, 4], "hello world": [5, 6], "hello wor": [5, 7, 8], "\u2603": []}
    monkeypatch.setattr(model, "_encode", lambda text: np.array(tokens.get(text, [*text.encode()]), np.int64))
    return model


@pytest.mark.parametrize(
    ("pair", "shown"),
    [
        (("Ans", "wer"), "the answer 'wer' behind 'Ans'"),
        (("hello wor", "ld"), "the answer 'ld' behind 'hello wor'"),
        (("abc", ""), "the answer '' behind 'abc'"),
        (("", ""), "the answer '' behind ''"),
        (("", "\u2603"), "the answer '\u2603' behind ''"),
    ],
)
def test_an_answer_without_tokens_is_refused(joining, pair, shown):
    with pytest.raises(ConfigError) as error:
        joining.loglikelihood(instances("loglikelihood", pair), disable_tqdm=True)
    assert str(error.value).startswith(f"tokenizer byte: {shown} has no token of its own; expected")
    assert "\n" not in str(error.value)


def test_answers_are_encoded_as_the_harness_encodes_them(model):
    for pair in (("The sky is", " blue"), ("It is  ", "so"), ("It is ", ""), ("  ", "x")):
        expected = harness.TemplateLM._encode_pair(model, *pair)
        assert model._encode_pair(*pair) == expected


def test_an_answer_behind_white_space_alone_is_scored_whole(run):
    workdir, log_likelihoods = run
    model = harness.TTTModel(str(workdir), add_bos_token=False)
    [(total, _)] = model.loglikelihood(instances("loglikelihood", (" ", "x")), disable_tqdm=True)
    assert total == pytest.approx(log_likelihoods([BOS, *b" x"])[0].sum(), rel=1e-5)


def test_an_answer_longer_than_the_windows_is_refused(run):
    workdir, log_likelihoods = run
    limited = harness.TTTModel(str(workdir), max_length=3)
    with pytest.raises(ConfigError) as error:
        limited.loglikelihood(instances("loglikelihood", ("q", "abcd")), disable_tqdm=True)
    assert str(error.value) == (
        "max_length=3: the answer 'abcd' behind 'q' has 4 tokens; expected max_length 4 or more"
    )
    [(total, _)] = limited.loglikelihood(instances("loglikelihood", ("pq", "abc")), disable_tqdm=True)
    assert total == pytest.approx(log_likelihoods([*b"qabc"])[0].sum(), rel=1e-5)


def test_windows_of_one_token(run):
    workdir, log_likelihoods = run
    limited = harness.TTTModel(str(workdir), max_length=1)
    [total] = limited.loglikelihood_rolling(instances("loglikelihood_rolling", ("No.",)), disable_tqdm=True)
    row = [BOS, *b"No."]
    expected = sum(log_likelihoods(row[i : i + 2])[0][0] for i in range(3))
    assert total == pytest.approx(expected, rel=1e-5)


def test_documents_without_tokens(joining):
    with pytest.raises(ConfigError, match="tokenizer byte: the document '\u2603' has no tokens; expected documents"):
        joining.loglikelihood_rolling(instances("loglikelihood_rolling", ("\u2603",)), disable_tqdm=True)
    empty = [Instance("loglikelihood_rolling", {}, ("",), 0, ("blank", 0, 1))]
    with pytest.raises(ConfigError, match="--tasks blank: all of its documents are empty; expected some text"):
        joining.loglikelihood_rolling(empty, disable_tqdm=True)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_scores_that_are_not_finite_are_errors(run, model, monkeypatch, value):
    monkeypatch.setattr(model._scorer, "score", lambda texts, progress: [Score(value, True)] * len(texts))
    with pytest.raises(NonFiniteLossError) as error:
        model.loglikelihood(instances("loglikelihood", ("a", "b")), disable_tqdm=True)
    assert str(error.value) == (
        f"{run[0]}, step 5: the log-likelihood of the answer 'b' behind 'a' is {value}; expected a model that gives "
        "finite numbers"
    )
    with pytest.raises(NonFiniteLossError, match="the log-likelihood of the document 'No' is"):
        model.loglikelihood_rolling(instances("loglikelihood_rolling", ("No",)), disable_tqdm=True)


def test_a_perplexity_that_overflows_is_infinite_and_null_in_json(model):
    with harness_tasks._overflow_is_infinite():
        perplexity = lm_eval_metrics.weighted_perplexity([(-2000.0, 1)])
    assert perplexity == math.inf
    assert lm_eval_metrics.math is math
    results = {"results": {"t": {"word_perplexity,none": perplexity, "word_perplexity_stderr,none": math.nan}}}
    assert harness_tasks.by_task(results, model)["t"]["metrics"] == {
        "word_perplexity": {"value": None, "standard_error": None, "not_finite": "inf"}
    }


@pytest.mark.parametrize(
    ("options", "bos", "expected"),
    [
        ([], None, 256),
        (["--no-bos"], None, 257),
        (["--no-bos", "--no-eos"], None, None),
        (["--no-bos", "--no-eos"], 10, 10),
    ],
)
def test_the_prefix_token_is_one_of_the_training_data(tmp_path, options, bos, expected):
    (tmp_path / "t.jsonl").write_text('{"text": "one two"}\n' * 3)
    files = ["--train", str(tmp_path / "t.jsonl"), "--output", str(tmp_path / "data")]
    assert cli.main(["tokenize", *files, "--tokenizer", "byte", *options]) == 0
    config = config_lib.default()
    config.data.source = str(tmp_path / "data")
    config.model.vocab_size = 258
    if bos is not None:
        config.data.bos = bos
    byte = tokenizer_lib.byte()
    assert prefix_token_of(config, byte, 7) == 7
    with pytest.raises(ConfigError, match="prefix_token=258: expected a token of the model, below 258"):
        prefix_token_of(config, byte, 258)
    if expected is not None:
        assert prefix_token_of(config, byte) == expected
        return
    with pytest.raises(ConfigError, match=r"no token begins or ends its documents; expected prefix_token=ID"):
        prefix_token_of(config, byte)


def test_results_of_other_options_are_kept_beside_one_another(tmp_path):
    names = [
        harness_tasks.file_name("a/b", **options)
        for options in ({}, {"num_fewshot": 0}, {"max_length": 64}, {"prefix_token": 0}, {"tokenizer": "0123456789"})
    ]
    assert names == ["a_b", "a_b-0-shot", "a_b-windows-64", "a_b-prefix-0", "a_b-tokenizer-01234567"]
    about = {"task": "a/b", "max_length": None, "num_fewshot": 0, "identity": "11", "model_step": 5}
    other = {**about, "task": "a_b", "identity": "22"}
    assert harness_tasks.save(tmp_path, "a_b", about) == str(tmp_path / "a_b.json")
    note = " (beside a_b.json, which is of other options or texts)"
    assert harness_tasks.save(tmp_path, "a_b", other) == f"{tmp_path / 'a_b-22.json'}{note}"
    replaced = {**about, "model_step": 9}
    note = " (in place of the result of step 5)"
    assert harness_tasks.save(tmp_path, "a_b", replaced) == f"{tmp_path / 'a_b.json'}{note}"
    assert json_files.read_object(tmp_path / "a_b.json") == replaced
    assert json_files.read_object(tmp_path / "a_b-22.json") == other
    (tmp_path / "a_b.json").write_text("{")
    note = " (beside a_b.json, which is damaged)"
    assert harness_tasks.save(tmp_path, "a_b", about) == f"{tmp_path / 'a_b-11.json'}{note}"


def test_identity_is_of_texts_and_options(model):
    def identity(*pairs):
        model.forget_requests()
        model._note([Instance("loglikelihood", {}, pair, 0, ("t", 0, 1)) for pair in pairs])
        return model.identity(["t"])

    assert identity(("a", "b")) == identity(("a", "b"))
    assert len({identity(("a", "b")), identity(("ab", "")), identity(("a", "b"), ("a", "c"))}) == 3


def test_what_cannot_be_run(run, tasks, model, tmp_path):
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
        ConfigError, match=r"--tasks here_writing: text is not generated yet; expected tasks that ask for"
    ):
        harness_tasks.evaluate(model, ["here_choice", "here_writing"], include_path=tasks)
    with pytest.raises(NotImplementedError, match="text is not generated yet"):
        model.generate_until([])
    with pytest.raises(ConfigError, match="--include-path nowhere: no such folder"):
        harness_tasks.evaluate(model, ["here_choice"], include_path="nowhere")
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere.jsonl}\n")
    with pytest.raises(DataError, match=r"--tasks bad: cannot be loaded: .*nowhere.jsonl"):
        harness_tasks.evaluate(model, ["bad"], include_path=tmp_path)
    model.trained.config.model.vocab_size = 90  # of a model of another tokenizer
    try:
        with pytest.raises(ConfigError, match=r"tokenizer byte: token 100 of 'abcd' is not among the 90 of the model"):
            model.tok_encode("abcd")
    finally:
        model.trained.config.model.vocab_size = 258


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


def test_without_the_harness_nothing_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main("harness --workdir nowhere --tasks a".split()) == 2
    said = "lm-evaluation-harness is not installed; pip install 'lm-eval>=0.4.13'"
    assert capsys.readouterr().err == f"ttt harness: {said}\n"


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
