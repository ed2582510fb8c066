"""Compare scores of answers with logits of whole sequences, computed without pieces and without a state."""

import numpy as np
import pytest

from ttt_jax.evaluation.probes import needle, prompt
from ttt_jax.evaluation.probes.scoring import Scorer

RNG = np.random.default_rng(0)
MIXERS = ("ttt_linear", "attention")
T = 61  # one length for all examples, so that little is compiled
HIDDEN = needle.draw(RNG, needle.TASKS["passkey"], 2)


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
    import jax.numpy as jnp

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
