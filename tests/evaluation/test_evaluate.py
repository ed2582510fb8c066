"""Compare the evaluation of a run with its logits, for all batch sizes and pieces, and check what it refuses."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.cli import eval
from ttt_jax.config import ConfigError
from ttt_jax.evaluation import evaluate as evaluate_lib
from ttt_jax.evaluation import evaluations, losses, statistics
from ttt_jax.evaluation.evaluate import Selection, evaluate
from ttt_jax.evaluation.statistics import Segment
from ttt_jax.models import counts
from ttt_jax.models.language_model import build_model

pytestmark = pytest.mark.usefixtures("shared_programs")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
PADDED = 512  # tokens of all forward passes, so that there is one to compile


@pytest.fixture(scope="module")
def nll(run, quick_jit):
    """Return ``nll(tokens, step)``: the loss of each token but the first, float64, from the logits of one pass."""
    _, config, params = run
    model = build_model(config.model)
    forward = quick_jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])

    def compute(tokens, step=5):
        tokens = np.asarray(tokens, np.int32)
        padded = np.zeros((1, PADDED), np.int32)
        padded[0, : len(tokens) - 1] = tokens[:-1]
        logits = np.asarray(forward(params[step], padded), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -log_p[np.arange(len(tokens) - 1), tokens[1:]]

    return compute


def check_equal(actual, segments, context):
    expected = statistics.summarise(segments, context)
    pairs = {
        "loss": expected.loss,
        "standard_error": expected.standard_error,
        "count": expected.tokens,
        "bin_loss": expected.bins.mean,
        "bin_standard_error": expected.bins.standard_error,
        "bin_low": expected.bins.low,
        "bin_high": expected.bins.high,
        "bin_count": expected.bins.tokens,
        "document_sums": expected.document_sums,
        "document_counts": expected.document_counts,
    }
    for name, value in pairs.items():
        np.testing.assert_allclose(getattr(actual, name), value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert actual.about["loss"] == pytest.approx(float(expected.all.mean), rel=1e-6)
    assert actual.position.tolist() == list(range(1, context + 1))


def lengths_of(source):
    return np.diff(source.documents, append=len(source.tokens)).tolist()


def of_windows(nll, source, context, windows, step=5):
    """Return the segments of windows, cut at documents, with plain loops."""
    tokens, total = source.tokens.astype(np.int64), (len(source.tokens) - 1) // context
    found = []
    for i in range(windows):
        start = context * (i * total // windows)
        window = tokens[start : start + context + 1]
        found_losses = nll(window, step)
        for place in range(context):
            if window[place + 1] == 256:
                continue
            document = sum(start + place >= first for first in source.documents) - 1
            found.append(Segment(document, place, found_losses[place : place + 1]))
    return found


@pytest.mark.parametrize(("batch_size", "piece_length"), [slow(2, None), (3, 7), slow(None, None)])
def test_losses_of_windows_are_those_of_logits_for_any_batch_and_piece(model, data, nll, batch_size, piece_length):
    """Read a context that is longer than that of training, and ends within a mini-batch."""
    calls = []
    found = evaluate(
        model,
        Selection(22, most=5),
        batch_size=batch_size,
        piece_length=piece_length,
        progress=lambda *done: calls.append(done),
    )
    check_equal(found, of_windows(nll, data, 22, 5), 22)
    assert calls == [(22 * i, 110) for i in range(6)]


def test_about_holds_model_data_and_means(run, model, data):
    _, config, params = run
    found = evaluate(model, Selection(22, most=5))
    about = dict(found.about)
    assert about.pop("config") == config.to_dict()
    assert len(about.pop("checkpoint")) == 16
    assert about == {
        "workdir": "some-run",
        "model": "TTT-Linear (Mamba backbone)",
        "parameters": sum(x.size for x in jax.tree.leaves(params[5])),
        "step": 5,
        "training_tokens": 5 * 4 * 16,
        "training_flops": 5 * counts.flops_per_step(config.model, 16, 4),
        "source": "books/validation",
        "source_path": "embedded",
        "fingerprint": data.fingerprint(),
        "split": "validation",
        "of": "windows",
        "carried": False,
        "chains": 0,
        "context": 22,
        "training_context": 16,
        "windows": 5,
        "max_windows": 5,
        "documents": len(found.document_sums),
        "tokens": found.count.sum(),
        "not_finite": 0,
        "skipped": 0,
        "loss": pytest.approx(np.nansum(found.loss * found.count) / found.count.sum(), rel=1e-9),
        "loss_standard_error": about["loss_standard_error"],
        "loss_low": about["loss_low"],
        "loss_high": about["loss_high"],
        "perplexity": math.exp(about["loss"]),
        "perplexity_low": math.exp(about["loss_low"]),
        "perplexity_high": math.exp(about["loss_high"]),
    }
    assert about["loss_low"] < about["loss"] < about["loss_high"]


def test_an_earlier_step(earlier_model, data, nll):
    found = evaluate(earlier_model, Selection(22, most=5))
    assert found.about["step"] == 3
    check_equal(found, of_windows(nll, data, 22, 5, step=3), 22)


# The training context is 16: pieces end within and behind documents.
@pytest.mark.parametrize("context", [20, pytest.param(70, marks=pytest.mark.slow)])
def test_documents_are_read_whole(model, data, nll, context):
    """Expect the losses of one forward pass over each document from its BOS: the state is carried over the pieces."""
    found = evaluate(model, Selection(context, by_document=True), batch_size=2)
    segments = []
    for i, (start, n) in enumerate(zip(data.documents, lengths_of(data), strict=True)):
        segments.append(Segment(i, 0, nll(data.tokens[start : start + n])[:context]))
    check_equal(found, segments, context)
    assert (found.about["of"], found.about["windows"], found.about["documents"]) == ("documents", 8, 8)


LONG = [pytest.param(200, n, marks=pytest.mark.slow) for n in (1, 2)]


@pytest.mark.parametrize(("context", "batch_size"), [*LONG, (30, 2)])
def test_the_state_is_carried_from_document_to_document(model, data, nll, context, batch_size):
    """Expect the losses of one pass over a chain of documents (their first ``context`` tokens), from each BOS on."""
    found = evaluate(model, Selection(context, chains=2), batch_size=batch_size)
    alone = evaluate(model, Selection(context, by_document=True))
    segments = []
    lengths = lengths_of(data)
    for chain in (range(4), range(4, 8)):
        parts = [data.tokens[data.documents[i] :][: min(lengths[i], context)] for i in chain]
        found_losses = nll(np.append(np.concatenate(parts), 0))  # each token but the last predicts the next one read
        place = 0
        for i, part in zip(chain, parts, strict=True):
            counted = min(lengths[i] - 1, context)
            of_part = found_losses[place : place + counted].copy()
            if counted == len(part):  # cut short: its last target is not what is read next
                everything = np.append(
                    np.concatenate(parts)[: place + counted], data.tokens[data.documents[i] + counted]
                )
                of_part[-1] = nll(everything)[-1]
            segments.append(Segment(i, 0, of_part))
            place += len(part)
    check_equal(found, segments, context)
    assert found.about["carried"]
    np.testing.assert_array_equal(found.document_counts, alone.document_counts)  # so that both can be compared
    first_in_chain = [0, 4]
    np.testing.assert_allclose(found.document_sums[first_in_chain], alone.document_sums[first_in_chain], rtol=1e-4)
    later = [1, 2, 5, 7]
    assert (np.abs(found.document_sums - alone.document_sums).sum(1)[later] > 0.01).all()


def test_without_documents_each_window_counts_as_one(model, books, nll, read_from):
    data = read_from(dataclasses.replace(books, bos=None, documents=None))
    found = evaluate(model, Selection(22, most=5))
    starts = [22 * (i * 16 // 5) for i in range(5)]
    check_equal(found, [Segment(i, 0, nll(data.tokens[s : s + 23])) for i, s in enumerate(starts)], 22)


def test_another_dataset(model, data, monkeypatch):
    other = dataclasses.replace(data, name="other/test", tokens=data.tokens[::-1].copy(), documents=None)
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return other

    monkeypatch.setattr(evaluate_lib.named_sources, "load", load)
    found = evaluate(model, Selection(22, "test", most=5, source="far/away"))
    assert asked == [(("far/away", "test"), {"vocab_size": 258, "named_by": "--source "})]
    assert (found.about["source"], found.about["fingerprint"]) == ("other/test", other.fingerprint())
    assert Selection(22, "test", source="far/away.d/").stem(None) == "away.d-test-22"


# ---- What cannot be evaluated


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (Selection(400), "--context 400: books/validation has 363 tokens, which is 0 windows"),
        (Selection(8, source="nowhere"), "--source 'nowhere': no such folder"),
    ],
)
def test_missing_data_is_refused(model, data, what, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(model, what)


def test_a_transformer_cannot_carry_its_state(model, data):
    config = model.config.copy_and_resolve_references()
    config.model.mixer = "attention"
    with pytest.raises(ConfigError, match=r"--carry-state: .*some-run is a Transformer, whose state grows"):
        evaluate(model._replace(config=config, model=build_model(config.model)), Selection(22, chains=2))


def test_a_split_without_documents_is_refused(model, books, read_from):
    read_from(dataclasses.replace(books, tokens=np.full(50, 256, np.uint16), documents=None))
    with pytest.raises(ConfigError, match="books/validation: has no document of 2 tokens or more"):
        evaluate(model, Selection(22, by_document=True))


# ---- Losses that are not finite, and nothing to predict


def test_losses_that_are_not_finite_show(model, books, read_from, monkeypatch):
    """Use a model that gives NaN at byte 7, and at BOS, which is not a target."""
    tokens = books.tokens.copy()
    tokens[tokens == 7] = 8
    tokens[[30, 31, 100]] = 7
    read_from(dataclasses.replace(books, tokens=tokens))
    whole = evaluate(model, Selection(22, most=16))
    nll = losses.token_nll

    def broken(logits, targets):
        return jnp.where((targets == 7) | (targets == 256), jnp.nan, nll(logits, targets))

    monkeypatch.setattr(losses, "token_nll", broken)
    found = evaluate(model, Selection(22, most=16))
    assert (found.about["not_finite"], found.about["tokens"]) == (3, whole.about["tokens"])
    np.testing.assert_array_equal(found.count, whole.count)
    expected = whole.loss.copy()
    expected[[29 - 22, 30 - 22, 99 - 88]] = np.nan  # token 30 is predicted at place 7 of the second window
    np.testing.assert_array_equal(found.loss, expected)
    for key in ("loss", "loss_standard_error", "loss_low", "loss_high", "perplexity", "perplexity_low"):
        assert found.about[key] is None
    said = eval._words(found)
    assert said.endswith(f": loss not finite: 3 of {found.about['tokens']} tokens have a loss that is NaN or infinite")
    path = evaluations.save(found, model.workdir / "eval", "broken")
    text = path.with_suffix(".json").read_text()
    stored = json.loads(text, parse_constant=pytest.fail)
    assert {key: stored[key] for key in found.about} == found.about
    again = evaluations.read_file(path)
    np.testing.assert_array_equal(np.isnan(again.loss), np.isnan(expected))
    np.testing.assert_array_equal(again.document_sums, found.document_sums)


def test_windows_with_nothing_to_predict_are_counted_or_refused(model, books, read_from, monkeypatch):
    tokens = books.tokens.copy()
    tokens[22:67] = 256  # the second and third window of 22 tokens
    read_from(dataclasses.replace(books, tokens=tokens, documents=None))
    found = evaluate(model, Selection(22, most=4))  # windows 0, 4, 8 and 12
    assert (found.about["windows"], found.about["skipped"]) == (4, 0)
    found = evaluate(model, Selection(22, most=16))
    assert (found.about["windows"], found.about["skipped"]) == (14, 2)
    assert found.about["tokens"] == found.count.sum()
    assert eval._words(found).endswith("; 2 windows with nothing to predict left out")
    # Documents: the 45 BOS in a row begin 44 documents of one token and a longer one.
    starts = np.flatnonzero(tokens == 256)
    alone = int((np.diff(starts, append=len(tokens)) == 1).sum())
    found = evaluate(model, Selection(22, by_document=True))
    assert (found.about["skipped"], found.about["windows"]) == (alone, len(starts) - alone)
    read_from(dataclasses.replace(books, tokens=np.full(60, 256, np.uint16), documents=None))
    monkeypatch.setattr(evaluate_lib.losses, "of_sequences", None)  # nothing is read
    with pytest.raises(ConfigError, match="books/validation: nothing to predict in its 2 windows "):
        evaluate(model, Selection(22))


def test_a_perplexity_that_overflows_is_null(model, data, monkeypatch):
    def of_sequences(trained, source, sequences, **sizes):
        return (np.full(sum(map(len, sequence)), 710.0, np.float32) for sequence in sequences)

    monkeypatch.setattr(evaluate_lib.losses, "of_sequences", of_sequences)
    found = evaluate(model, Selection(22, most=2))
    assert (found.about["loss"], found.about["perplexity"], found.about["not_finite"]) == (710.0, None, 0)
    assert eval._words(found).endswith("loss 710.0000 +- 0.0000, perplexity too large for a number")
