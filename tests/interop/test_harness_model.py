"""Compare a model of lm-evaluation-harness with float64 log-likelihoods from its logits."""

import math

import numpy as np
import pytest
from harness_data import BOS, DOCUMENTS, QUESTIONS, answers, bytes_of, instances
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from ttt_jax import cli
from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.data.prepare import tokenizer as tokenizer_lib
from ttt_jax.errors import NonFiniteLossError
from ttt_jax.evaluation.losses import Score
from ttt_jax.interop import harness
from ttt_jax.interop.harness import prefix_token_of


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_likelihoods_and_greedy_answers(run, batch_size):
    """Check answers that greedy decoding produces, shorter and longer than the training context, at two batch sizes."""
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


@pytest.mark.slow
def test_whole_documents_and_windows(run, model):
    """Check that each token sees everything before it, or with a limit the harness's windows."""
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
        read = row[max(0, stop - 10) : stop + 1]  # ten inputs, in the last window too, and a target for each
        expected += log_likelihoods(read)[0][-(stop - start) :].sum()
    assert windows == pytest.approx(expected, rel=1e-5)
    assert abs(windows - whole) > 0.1
    assert same == pytest.approx(short, rel=1e-5)

    (total, _), *_ = limited.loglikelihood(
        instances("loglikelihood", ("A long beginning of", " it")), disable_tqdm=True
    )
    last = bytes_of("A long beginning of it")[-11:]
    assert total == pytest.approx(log_likelihoods(last)[0][-3:].sum(), rel=1e-5)


def test_the_prefix_token_of_texts(run):
    """Check BOS, which is the default as in training; another token; and none before texts with a context."""
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
    """Return the model with a tokenizer in which some words are one token, and a snowman has no token."""
    tokens = {"Answer": [1], "Ans": [2, 3, 4], "hello world": [5, 6], "hello wor": [5, 7, 8], "\u2603": []}
    monkeypatch.setattr(model, "_encode", lambda text: np.array(tokens.get(text, [*text.encode()]), np.int64))
    return model


@pytest.mark.parametrize(
    ("pair", "shown"),
    [
        (("Ans", "wer"), "the answer 'wer' after 'Ans'"),
        (("hello wor", "ld"), "the answer 'ld' after 'hello wor'"),
        (("abc", ""), "the answer '' after 'abc'"),
        (("", ""), "the answer '' after ''"),
        (("", "\u2603"), "the answer '\u2603' after ''"),
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


def test_an_answer_after_white_space_alone_is_scored_whole(run):
    workdir, log_likelihoods = run
    model = harness.TTTModel(str(workdir), add_bos_token=False)
    [(total, _)] = model.loglikelihood(instances("loglikelihood", (" ", "x")), disable_tqdm=True)
    assert total == pytest.approx(log_likelihoods([BOS, *b" x"])[0].sum(), rel=1e-5)


def test_an_answer_longer_than_the_windows_is_refused(run):
    workdir, log_likelihoods = run
    limited = harness.TTTModel(str(workdir), max_length=3)
    with pytest.raises(ConfigError) as error:
        limited.loglikelihood(instances("loglikelihood", ("q", "abcd")), disable_tqdm=True)
    assert str(error.value) == ("max_length=3: the answer 'abcd' after 'q' has 4 tokens; expected max_length 4 or more")
    [(total, _)] = limited.loglikelihood(instances("loglikelihood", ("pq", "abc")), disable_tqdm=True)
    assert total == pytest.approx(log_likelihoods([*b"qabc"])[0].sum(), rel=1e-5)


def test_windows_of_one_token(run):
    workdir, log_likelihoods = run
    limited = harness.TTTModel(str(workdir), max_length=1)
    [total] = limited.loglikelihood_rolling(instances("loglikelihood_rolling", ("No.",)), disable_tqdm=True)
    row = [BOS, *b"No."]
    expected = sum(log_likelihoods(row[i : i + 2])[0][0] for i in range(3))
    assert total == pytest.approx(expected, rel=1e-5)


def test_documents_without_tokens_are_refused(joining):
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
        f"{run[0]}, step 5: the log-likelihood of the answer 'b' after 'a' is {value}; expected a model that gives "
        "finite numbers"
    )
    with pytest.raises(NonFiniteLossError, match="the log-likelihood of the document 'No' is"):
        model.loglikelihood_rolling(instances("loglikelihood_rolling", ("No",)), disable_tqdm=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "bos", "expected"),
    [
        ([], None, 256),
        (["--no-bos"], None, 257),
        (["--no-bos", "--no-eos"], None, None),
        (["--no-bos", "--no-eos"], 10, 10),
    ],
)
def test_the_prefix_token_comes_from_the_training_data(tmp_path, options, bos, expected):
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


def test_identity_depends_on_texts_and_options(model):
    def identity(*pairs):
        model.forget_requests()
        model._record([Instance("loglikelihood", {}, pair, 0, ("t", 0, 1)) for pair in pairs])
        return model.identity(["t"])

    assert identity(("a", "b")) == identity(("a", "b"))
    assert len({identity(("a", "b")), identity(("ab", "")), identity(("a", "b"), ("a", "c"))}) == 3
