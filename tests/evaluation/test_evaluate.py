"""The evaluation of a run against its logits, whatever the batches, pieces and interruptions."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.cli import eval
from ttt_jax.config import ConfigError
from ttt_jax.data.token_source import TokenSource
from ttt_jax.distributed import sharding
from ttt_jax.evaluation import evaluate as evaluate_lib
from ttt_jax.evaluation import evaluations, losses, statistics, trained
from ttt_jax.evaluation.evaluate import What, evaluate
from ttt_jax.evaluation.statistics import Segment
from ttt_jax.models import counts
from ttt_jax.models.language_model import build_model
from ttt_jax.training import compiled_step
from ttt_jax.training.checkpoint import Checkpoints

RNG = np.random.default_rng(0)
LENGTHS = [40, 7, 66, 2, 33, 120, 5, 90]  # of documents, BOS included
PAD = 128  # all forward passes of the tests are as long, so that there is one to compile


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_params):
    """A workdir with two checkpoints of random parameters, the config, and the parameters."""
    config = config_lib.default()
    config.model.update(width=8, num_layers=1, num_heads=2, mlp_width=8)
    config.model.ttt.mini_batch = 4
    config.data.update(sequence_length=16, batch_size=4)
    workdir = tmp_path_factory.mktemp("evaluation") / "some-run"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    abstract = compiled_step.make(config, sharding.make_mesh(config_lib.mesh_shape(config, 1))).abstract_state
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    checkpoints = Checkpoints(workdir, keep_last=2)
    params = {}
    for step in (3, 5):
        params[step] = random_params(build_model(config.model), np.zeros((1, 1), np.int32), seed=step)
        checkpoints.save(step, empty._replace(step=np.int32(step), params=params[step]), {})
    checkpoints.close()
    return workdir, config, params


@pytest.fixture(scope="module")
def model(run):
    """The newest checkpoint, loaded."""
    return trained.load(run[0])


@pytest.fixture
def data(monkeypatch):
    """A split of eight documents that begin with BOS."""
    documents = [np.append(256, RNG.integers(0, 256, n - 1)) for n in LENGTHS]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    source = TokenSource("books/validation", np.concatenate(documents).astype(np.uint16), 257, 256, starts)
    monkeypatch.setattr(evaluate_lib.named_sources, "from_config", lambda config, split: source)
    return source


@pytest.fixture(scope="module")
def nll(run, quick_jit):
    """``nll(tokens, step)``: the loss of each of the tokens but the first, float64, from the logits of one pass."""
    _, config, params = run
    model = build_model(config.model)
    forward = quick_jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])

    def compute(tokens, step=5):
        tokens = np.asarray(tokens, np.int32)
        padded = np.zeros((1, 4 * PAD), np.int32)
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


def of_windows(nll, source, context, windows, step=5):
    """Segments of windows, cut at documents, with plain loops."""
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


@pytest.mark.parametrize(("batch_size", "piece_length"), [(2, None), (5, None), (3, 7), (None, None)])
def test_windows_are_of_the_logits_whatever_the_batch_and_the_pieces(model, data, nll, batch_size, piece_length):
    """The context is longer than that of training, and ends within a mini-batch."""
    calls = []
    found = evaluate(
        model,
        What(22, most=5),
        batch_size=batch_size,
        piece_length=piece_length,
        progress=lambda *done: calls.append(done),
    )
    check_equal(found, of_windows(nll, data, 22, 5), 22)
    assert calls == [(22 * i, 110) for i in range(6)]


def test_what_an_evaluation_says_of_itself(run, model, data):
    _, config, params = run
    found = evaluate(model, What(22, most=5))
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


def test_an_earlier_step(run, data, nll):
    found = evaluate(trained.load(run[0], 3), What(22, most=5))
    assert found.about["step"] == 3
    check_equal(found, of_windows(nll, data, 22, 5, step=3), 22)


@pytest.mark.parametrize("context", [20, 70])  # training context is 16: pieces end within and behind documents
def test_documents_are_read_whole(model, data, nll, context):
    """Expect what one forward pass over each document, from its BOS, gives: the state is carried over the pieces."""
    found = evaluate(model, What(context, by_document=True), batch_size=2)
    segments = []
    for i, (start, n) in enumerate(zip(data.documents, LENGTHS, strict=True)):
        segments.append(Segment(i, 0, nll(data.tokens[start : start + n])[:context]))
    check_equal(found, segments, context)
    assert (found.about["of"], found.about["windows"], found.about["documents"]) == ("documents", 8, 8)


@pytest.mark.parametrize(("context", "batch_size"), [(200, 1), (200, 2), (30, 2)])
def test_the_state_is_carried_from_document_to_document(model, data, nll, context, batch_size):
    """Expect what one pass over a chain of documents (their first ``context`` tokens) gives, from each one's BOS."""
    found = evaluate(model, What(context, chains=2), batch_size=batch_size)
    alone = evaluate(model, What(context, by_document=True))
    segments = []
    for chain in (range(4), range(4, 8)):
        parts = [data.tokens[data.documents[i] :][: min(LENGTHS[i], context)] for i in chain]
        found_losses = nll(np.append(np.concatenate(parts), 0))  # each token but the last predicts the next one read
        place = 0
        for i, part in zip(chain, parts, strict=True):
            counted = min(LENGTHS[i] - 1, context)
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


def test_without_documents_a_window_is_one(model, data, nll, monkeypatch):
    unknown = dataclasses.replace(data, bos=None, documents=None)
    monkeypatch.setattr(evaluate_lib.named_sources, "from_config", lambda config, split: unknown)
    found = evaluate(model, What(22, most=5))
    starts = [22 * (i * 16 // 5) for i in range(5)]
    check_equal(found, [Segment(i, 0, nll(data.tokens[s : s + 23])) for i, s in enumerate(starts)], 22)


def test_another_dataset(model, data, monkeypatch):
    other = dataclasses.replace(data, name="other/test", tokens=data.tokens[::-1].copy(), documents=None)
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return other

    monkeypatch.setattr(evaluate_lib.named_sources, "load", load)
    found = evaluate(model, What(22, "test", most=5, source="far/away"))
    assert asked == [(("far/away", "test"), {"vocab_size": 258, "named_by": "--source "})]
    assert (found.about["source"], found.about["fingerprint"]) == ("other/test", other.fingerprint())
    assert What(22, "test", source="far/away.d/").stem(None) == "away.d-test-22"


# ---- Interruptions


def test_a_stopped_evaluation_goes_on(run, model, data):
    whole = evaluate(model, What(22, most=7), batch_size=1)

    class Stop(Exception):
        pass

    def stop_at(tokens):
        def progress(done, total):
            if done >= tokens:
                raise Stop

        return progress

    folder = run[0] / "eval" / ".validation-22.unfinished"
    with pytest.raises(Stop):
        evaluate(model, What(22, most=7), batch_size=1, progress=stop_at(44))
    with pytest.raises(Stop):
        evaluate(model, What(22, most=7), batch_size=2, progress=stop_at(110))
    assert {path.suffix for path in folder.iterdir()} == {".npy", ".json"}
    calls = []
    found = evaluate(model, What(22, most=7), batch_size=3, progress=lambda *done: calls.append(done))
    assert 22 <= calls[0][0] < 154  # some of it was there
    assert not folder.exists()
    np.testing.assert_allclose(found.document_sums, whole.document_sums, rtol=1e-6)
    np.testing.assert_array_equal(found.document_counts, whole.document_counts)


@pytest.mark.parametrize("changed", ["windows", "checkpoint", "learner", "cut short"])
def test_what_is_of_another_evaluation_is_not_gone_on_with(run, model, data, changed):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    what = What(22, most=7)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, what, batch_size=2, progress=lambda done, total: stop(done // 66, total))
    part = min((run[0] / "eval" / ".validation-22.unfinished").glob("*.npy"))
    if changed == "windows":
        what = What(22, most=6)
    elif changed == "checkpoint":
        model = trained.load(run[0], 3)
    elif changed == "learner":
        config = model.config.copy_and_resolve_references()
        config.model.ttt.learner_source = "0" * 64
        model = model._replace(config=config)
    else:
        part.write_bytes(part.read_bytes()[:-4])
    calls = []
    evaluate(model, what, progress=lambda done, total: calls.append(done))
    assert calls[0] == 0
    if changed == "windows":  # what was found of the other windows stays
        assert part.exists()
        shutil.rmtree(part.parent)
    assert not list((run[0] / "eval").glob(".*.unfinished"))


# ---- What cannot be


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (What(400), "--context 400: books/validation has 363 tokens, which is 0 windows"),
        (What(8, source="nowhere"), "--source 'nowhere': no such folder"),
    ],
)
def test_what_cannot_be_evaluated(model, data, what, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(model, what)


def test_a_transformer_carries_nothing(model, data):
    config = model.config.copy_and_resolve_references()
    config.model.mixer = "attention"
    with pytest.raises(ConfigError, match=r"--carry-state: .*some-run is a Transformer, whose state grows"):
        evaluate(model._replace(config=config, model=build_model(config.model)), What(22, chains=2))


def test_a_split_without_documents(model, data, monkeypatch):
    empty = dataclasses.replace(data, tokens=np.full(50, 256, np.uint16), documents=None)
    monkeypatch.setattr(evaluate_lib.named_sources, "from_config", lambda config, split: empty)
    with pytest.raises(ConfigError, match="books/validation: has no document of 2 tokens or more"):
        evaluate(model, What(22, by_document=True))


# ---- Losses that are not finite, and nothing to predict


def test_losses_that_are_not_finite_show(model, data, monkeypatch):
    """Use a model that gives NaN where it finds byte 7, and at BOS, which is no target."""
    tokens = data.tokens.copy()
    tokens[tokens == 7] = 8
    tokens[[30, 31, 100]] = 7
    object.__setattr__(data, "tokens", tokens)
    whole = evaluate(model, What(22, most=16))
    nll = losses.token_nll

    def broken(logits, targets):
        return jnp.where((targets == 7) | (targets == 256), jnp.nan, nll(logits, targets))

    monkeypatch.setattr(losses, "token_nll", broken)
    found = evaluate(model, What(22, most=16))
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


def test_an_evaluation_that_was_stopped_before_masks_were_apart_goes_on(run, model, data, monkeypatch):
    """Write NaN into its parts where nothing counts; the data says where that is."""
    whole = evaluate(model, What(22, most=7), batch_size=1)

    def stop(done, total):
        if done == 44:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, What(22, most=7), batch_size=1, progress=stop)
    folder = run[0] / "eval" / ".validation-22.unfinished"
    windows = [22 * (i * 16 // 7) for i in range(7)]
    place = 0
    for path in sorted(folder.glob("*.npy")):
        part = np.load(path)
        for begin in range(0, len(part), 22):
            targets = data.tokens[windows[place] + 1 : windows[place] + 23]
            part[begin : begin + 22][targets == 256] = np.nan
            place += 1
        np.save(path, part)
    assert place > 0
    found = evaluate(model, What(22, most=7))
    np.testing.assert_allclose(found.document_sums, whole.document_sums, rtol=1e-6)
    assert (found.about["not_finite"], found.about["tokens"]) == (0, whole.about["tokens"])


def test_windows_with_nothing_to_predict_are_counted_or_refused(model, data, monkeypatch, nll):
    tokens = data.tokens.copy()
    tokens[22:67] = 256  # the second and third window of 22 tokens
    sources = [dataclasses.replace(data, tokens=tokens, documents=None)]
    monkeypatch.setattr(evaluate_lib.named_sources, "from_config", lambda config, split: sources[-1])
    found = evaluate(model, What(22, most=4))  # windows 0, 4, 8 and 12
    assert (found.about["windows"], found.about["skipped"]) == (4, 0)
    found = evaluate(model, What(22, most=16))
    assert (found.about["windows"], found.about["skipped"]) == (14, 2)
    assert found.about["tokens"] == found.count.sum()
    assert eval._words(found).endswith("; 2 windows with nothing to predict left out")
    # Documents: the 45 tokens of 256 begin 44 documents of one token, and one that goes on.
    starts = np.flatnonzero(tokens == 256)
    alone = int((np.diff(starts, append=len(tokens)) == 1).sum())
    found = evaluate(model, What(22, by_document=True))
    assert (found.about["skipped"], found.about["windows"]) == (alone, len(starts) - alone)
    sources.append(dataclasses.replace(data, tokens=np.full(60, 256, np.uint16), documents=None))
    monkeypatch.setattr(evaluate_lib.losses, "of_sequences", None)  # nothing is read
    with pytest.raises(ConfigError, match="books/validation: nothing to predict in its 2 windows "):
        evaluate(model, What(22))


def test_a_perplexity_that_overflows_is_null_and_said(model, data, monkeypatch):
    def of_sequences(trained, source, sequences, **sizes):
        return (np.full(sum(map(len, sequence)), 710.0, np.float32) for sequence in sequences)

    monkeypatch.setattr(evaluate_lib.losses, "of_sequences", of_sequences)
    found = evaluate(model, What(22, most=2))
    assert (found.about["loss"], found.about["perplexity"], found.about["not_finite"]) == (710.0, None, 0)
    assert eval._words(found).endswith("loss 710.0000 +- 0.0000, perplexity too large for a number")
