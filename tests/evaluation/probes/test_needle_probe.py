"""Check the cells of needle probes, that known cells are not computed again, and the scores of answers.

Scores are compared with logits of whole sequences, computed without pieces and without a state.
"""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.data.named_sources import embedded_tokens
from ttt_jax.evaluation.probes import needle, needle_probe, prompt
from ttt_jax.evaluation.probes.needle_probe import Scorer, Scores
from ttt_jax.storage import json_files

RNG = np.random.default_rng(0)
MIXERS = ("ttt_linear", pytest.param("attention", marks=pytest.mark.slow))
T = 61  # one length for all examples, so that little is compiled
HIDDEN = needle.draw(RNG, needle.TASKS["passkey"], 2)


@pytest.fixture
def text(loaded):
    return prompt.texts_of_run(loaded("ttt_linear").config, sorted(needle.TASKS))


@pytest.fixture
def scored(monkeypatch):
    """Replace scores by random numbers; return the list of examples that were scored."""
    seen = []

    def score(self, examples, progress=None):
        seen.append(examples)
        rng = np.random.default_rng(len(examples[0].tokens))
        log_likelihood = rng.normal(-20, 3, (len(examples), len(examples[0].candidates)))
        return Scores(log_likelihood.astype(np.float32), log_likelihood[:, 0] > -20)

    monkeypatch.setattr(Scorer, "score", score)
    return seen


@pytest.fixture
def run(loaded, tmp_path):
    return loaded("ttt_linear")._replace(workdir=tmp_path / "some-run")


def test_texts_of_a_run(text):
    assert (text.tokenizer.kind, text.bos) == ("byte", 256)
    assert text.haystacks["passkey"].name == "noise"
    assert text.haystacks["number"] is text.haystacks["uuid"]
    assert text.haystacks["number"].name == "embedded/validation"
    tokens = embedded_tokens("validation")
    whole = bytes(tokens[tokens < 256].astype(np.uint8)).decode()
    assert "".join(text.haystacks["number"].units(0.3, 5000)) in whole


def test_cells_follow_from_scores(run, text, scored):
    options = {"contexts": [600], "depths": [0.0, 100.0], "samples": 30, "candidates": 4, "seed": 2}
    first, second = needle_probe.probe(run, "number", text, **options)
    rng = np.random.default_rng(600)
    scores = rng.normal(-20, 3, (30, 4)).astype(np.float32).astype(np.float64)
    correct = int((scores[:, 0] > -20).sum())
    first_of_four = np.mean(scores.argmax(1) == 0)
    advantage = scores[:, 0] - scores[:, 1:].mean(1)
    assert 0 < correct < 30
    known = {"context": 600, "depth": 0.0, "samples": 30, "candidates": 4, "seed": 2, "step": 3, "correct": correct}
    assert known.items() <= first.items()
    assert first["accuracy"] == correct / 30
    assert first["low"] < first["accuracy"] < first["high"]
    assert first["ranked_first"] == pytest.approx(first_of_four)
    assert first["log_likelihood"] == pytest.approx(scores[:, 0].mean())
    assert first["log_likelihood_error"] == pytest.approx(scores[:, 0].std(ddof=1) / 30**0.5)
    assert first["advantage"] == pytest.approx(advantage.mean())
    assert first["advantage_error"] == pytest.approx(advantage.std(ddof=1) / 30**0.5)
    assert (first["actual_depth"], second["actual_depth"], second["depth"]) == (0, 100, 100)
    assert [example.needle for example in scored[0]] == [example.needle for example in scored[1]]
    assert {len(example.tokens) for examples in scored for example in examples} == {600}


@pytest.mark.slow
def test_scores_of_the_model_itself(loaded, text):
    """Compute one cell with the model, at chance, as its parameters are random."""
    options = {"contexts": [509], "depths": [50.0], "samples": 4, "candidates": 3, "batch_size": 2}
    (cell,) = needle_probe.probe(loaded("ttt_linear"), "passkey", text, **options)
    assert cell["correct"] == 0
    assert -200 < cell["log_likelihood"] < -7 * np.log(10)
    assert abs(cell["advantage"]) < 60
    assert (loaded("ttt_linear").workdir / "probe" / "needle-passkey.csv").exists()


def test_cells_that_are_known_are_not_computed_again(run, text, scored):
    options = {"depths": [0.0, 50.0], "samples": 2, "candidates": 2}
    once = needle_probe.probe(run, "passkey", text, contexts=[500], **options)
    assert len(scored) == 2
    said = []
    more = needle_probe.probe(run, "passkey", text, contexts=[500, 600], progress=said.append, **options)
    assert len(scored) == 4
    assert more[:2] == once
    assert [(cell["context"], cell["depth"]) for cell in more] == [(500, 0), (500, 50), (600, 0), (600, 50)]
    assert said == [f"passkey, context 600{what}" for what in (": making prompts", ", depth 0 %", ", depth 50 %")]
    for change in ({"seed": 1}, {"samples": 3}, {"candidates": 3}):  # other cells, beside these
        needle_probe.probe(run, "passkey", text, contexts=[500], **{**options, **change})
    assert len(scored) == 10
    needle_probe.probe(run._replace(step=9), "passkey", text, contexts=[500], **options)
    assert len(scored) == 12
    assert needle_probe.probe(run, "passkey", text, contexts=[500, 600], **options) == more
    assert len(scored) == 12


def test_cells_are_kept_when_a_probe_is_stopped(run, text, scored, monkeypatch):
    examples, calls = prompt.examples, []

    def stopped(*args, context, **options):
        if context == 600:
            raise KeyboardInterrupt
        return calls.append(context) or examples(*args, context=context, **options)

    monkeypatch.setattr(prompt, "examples", stopped)
    options = {"depths": [0.0, 50.0], "samples": 2}
    with pytest.raises(KeyboardInterrupt):
        needle_probe.probe(run, "passkey", text, contexts=[500, 600], **options)
    monkeypatch.setattr(prompt, "examples", examples)
    needle_probe.probe(run, "passkey", text, contexts=[500, 600], **options)
    assert len(scored) == 4


def test_files_hold_the_cells(run, text, scored):
    cells = needle_probe.probe(run, "uuid", text, contexts=[700, 800], depths=[0.0, 50.0], samples=2)
    found = json.loads((run.workdir / "probe" / "needle-uuid.json").read_text())
    assert found["cells"] == cells
    known = {key: found[key] for key in ("task", "ruler_task", "workdir", "model", "training_context")}
    assert known == {
        "task": "uuid",
        "ruler_task": "S-NIAH-3",
        "workdir": "some-run",
        "model": "TTT-Linear (Mamba backbone)",
        "training_context": 100,
    }
    assert found["config"]["model"] == run.config.model.to_dict()
    with (run.workdir / "probe" / "needle-uuid.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [cell["accuracy"] for cell in cells]
    assert [(row["context"], row["depth"]) for row in rows] == [
        ("700", "0.0"),
        ("700", "50.0"),
        ("800", "0.0"),
        ("800", "50.0"),
    ]


def test_a_file_without_cells_is_not_overwritten(run, text, scored):
    path = run.workdir / "probe" / "needle-passkey.json"
    path.parent.mkdir(parents=True)
    for content in ("{", "[]", '{"cells": [{"step": 3}]}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"needle-passkey.json: .*; expected what ttt probe wrote, or no file"):
            needle_probe.probe(run, "passkey", text, contexts=[500], depths=[0.0])
        assert path.read_text() == content
    assert not scored


def test_a_tokenizer_with_too_many_tokens_is_refused(run, text):
    small = run.config.copy_and_resolve_references()
    small.model.vocab_size = 100
    with pytest.raises(ConfigError, match=r"--tokenizer byte: has token 256; .* knows 100 tokens; expected the"):
        needle_probe.probe(run._replace(config=small), "passkey", text, contexts=[500], depths=[0.0])


def test_scores_that_are_not_finite_show(run, text, monkeypatch):
    """Expect no share to be known if one of the answers is not, and valid JSON."""
    scores = np.array([[-5.0, -6.0], [np.nan, -6.0], [-5.0, -np.inf]], np.float32)
    monkeypatch.setattr(Scorer, "score", lambda *args: Scores(scores, np.array([True, False, True])))
    [cell] = needle_probe.probe(run, "passkey", text, contexts=[500], depths=[0.0], samples=3, candidates=2)
    unknown = ("correct", "accuracy", "low", "ranked_first", "ranked_high", "log_likelihood", "advantage")
    assert [cell[key] for key in unknown] == [None] * 7
    assert cell["log_likelihood_error"] is None
    assert cell["not_finite"] == 2
    stored = (run.workdir / "probe" / "needle-passkey.json").read_text()
    assert json.loads(stored, parse_constant=pytest.fail)["cells"] == [cell]


def test_cells_depend_on_the_bos_of_prompts(run, text, scored):
    options = {"contexts": [500], "depths": [0.0], "samples": 2, "candidates": 2}
    [with_bos] = needle_probe.probe(run, "passkey", text, **options)
    [without] = needle_probe.probe(run, "passkey", text._replace(bos=None), **options)
    assert (with_bos["bos"], without["bos"], len(scored)) == (256, None, 2)
    path = run.workdir / "probe" / "needle-passkey.json"
    found = json_files.read_object(path)
    del found["cells"][0]["bos"]  # of an earlier version
    path.write_text(json.dumps(found))
    needle_probe.probe(run, "passkey", text, **options)
    assert len(scored) == 2


def example(tokens, candidates):
    """Return an example whose candidates have these tokens."""
    candidates = [np.asarray(candidate, np.int32) for candidate in candidates]
    whole = np.concatenate([tokens[: len(tokens) - len(candidates[0])], candidates[0]]).astype(np.int32)
    return prompt.Example(HIDDEN, whole, candidates, 50.0)


@pytest.fixture(scope="module")
def scorers(loaded):
    """Return ``scorers(mixer)``: a run and its scorer, whose pieces end within mini-batches and within examples."""
    found = {}

    def get(mixer):
        if mixer not in found:
            found[mixer] = loaded(mixer), Scorer(loaded(mixer), batch_size=2, piece_length=23)
        return found[mixer]

    return get


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_scores_are_those_of_plain_logits(mixer, scorers, plain_logits):
    """Score candidates of several lengths, so that prompts end at several positions, and a batch that is not full."""
    run, scorer = scorers(mixer)
    examples = [
        example(RNG.integers(0, 257, T), [RNG.integers(0, 257, n) for n in lengths])
        for lengths in ((3, 5, 1), (7, 7, 2), (1, 3, 4), (5, 1, 8), (4, 4, 4))
    ]
    scores = scorer.score(examples)
    assert scores.log_likelihood.shape == (5, 3)
    for i, one in enumerate(examples):
        question = one.tokens[: T - len(one.candidates[0])]
        for j, candidate in enumerate(one.candidates):
            whole = np.concatenate([question, candidate])[None]
            padded = np.pad(whole, ((0, 0), (0, 70 - whole.shape[1])))  # causal: padding does not matter
            found = log_softmax(plain_logits(run, padded))[0, len(question) - 1 : whole.shape[1] - 1]
            expected = np.take_along_axis(found, candidate[:, None], 1).sum()
            assert scores.log_likelihood[i, j] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_answer_matches_if_greedy_decoding_gives_it(mixer, scorers, plain_logits):
    (run, scorer), n = scorers(mixer), 4
    prompts = RNG.integers(0, 257, (5, T - n))
    decoded = np.pad(prompts, ((0, 0), (0, 70 - T + n)))
    for row in decoded:
        for place in range(T - n, T):  # token by token, from whole sequences
            row[place] = plain_logits(run, row[None])[0, place - 1].argmax()
    answers = decoded[:, T - n : T]
    wrong = answers.copy()
    wrong[range(n), range(n)] = (wrong[range(n), range(n)] + 1) % 257  # one token of each of four
    others = RNG.integers(0, 257, (5, n))
    for given, expected in ((answers, [True] * 5), (wrong, [False] * 4 + [True])):
        examples = [example(decoded[i, :T], [given[i], others[i]]) for i in range(5)]
        assert scorer.score(examples).matched.tolist() == expected


def test_prompts_are_read_in_pieces(scorers, monkeypatch):
    _, scorer = scorers("ttt_linear")
    seen, read = [], scorer._read
    monkeypatch.setattr(scorer, "_read", lambda *args: seen.append(args[2].shape) or read(*args))
    calls = []
    scorer.score([example(RNG.integers(0, 257, T), [[1, 2], [3, 4]])] * 3, calls.append)
    assert seen == [(2, 23), (2, 23), (2, 6)] * 2  # 61 tokens, without those at which an answer may begin
    assert calls == [2, 3]


def test_tokens_after_an_answer_are_not_scored():
    """Expect NaN after an answer to leave its score unchanged, and NaN within it to show."""
    logits = jnp.zeros((1, 4, 3)).at[0, 2:].set(jnp.nan)

    class Model:
        def apply(self, params, inputs, state):
            return logits, state

    class Run:
        model, rows, config = Model(), 1, None

    answer = Scorer(Run, batch_size=1, piece_length=4)._answer
    tokens = jnp.zeros((1, 4), jnp.int32)
    total, matched = answer({}, None, tokens, tokens, jnp.array([[1.0, 1, 0, 0]]))
    assert float(total[0]) == pytest.approx(2 * np.log(1 / 3))
    assert bool(matched[0])
    assert np.isnan(float(answer({}, None, tokens, tokens, jnp.array([[1.0, 1, 1, 0]]))[0][0]))
