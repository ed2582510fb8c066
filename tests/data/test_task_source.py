"""Synthetic tasks: what a sequence is, who can solve it and who cannot, and that it is a source like any other."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.data import pipeline, source, sources, task_source

TASKS = ("associative_recall", "selective_copying")


@st.composite
def drawn(draw, task):
    """A source of the task, an index, and a length that its sequences fit."""
    items = draw(st.integers(1, 12))
    vocab_size = draw(st.integers(task_source.TASKS[task].least_vocab_size(items), 80))
    length = draw(st.integers(task_source.TASKS[task].least_length(items) - 1, 150))
    found = sources.load(f"{task}:{items}", draw(st.sampled_from(("train", "test"))), vocab_size=vocab_size)
    return found, draw(st.integers(0, 2**33)), length


def recall_by_lookup(tokens):
    """Predictions of a program that reads from the left: the token that followed this one the last time."""
    seen = {}
    for here, following in itertools.pairwise(tokens):
        yield seen.get(here)
        seen[here] = following


def copy_by_counting(tokens):
    """Predictions of a program that remembers what is neither noise nor marker, and tells it behind the marker."""
    kept, told = [], None
    for token in tokens[:-1]:
        if token == 1:
            told = 0
        elif told is None and token:
            kept.append(token)
        elif told is not None:
            told += 1
        yield kept[told] if told is not None else None


@given(drawn("associative_recall"))
def test_recall_is_pairs_then_queries_of_their_keys(given_source):
    data, index, length = given_source
    tokens, answers, repeated = data.example(index, length)
    n, half = data.items, (data.vocab_size - 1) // 2
    assert tokens.shape == (length + 1,)
    keys, values = tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2]
    assert len(set(keys.tolist())) == n
    assert ((keys >= 1) & (keys <= half)).all()
    assert ((values > half) & (values < data.vocab_size)).all()
    rest = tokens[2 * n :]
    assert set(rest.tolist()) <= {0, *keys.tolist(), *values.tolist()}
    assert len(answers) == n
    np.testing.assert_array_equal(tokens[answers], dict_of(keys, values, tokens[answers - 1]))
    np.testing.assert_array_equal(np.flatnonzero(tokens > half)[n:], answers)
    for answer, place in zip(answers, repeated, strict=True):
        asked = tokens[answer - 1]
        assert place - 1 == np.flatnonzero(tokens[: answer - 1] == asked).max()
    assert (np.diff(answers) > 0).all()


def dict_of(keys, values, asked):
    pairs = dict(zip(keys.tolist(), values.tolist(), strict=True))
    return [pairs[key] for key in asked.tolist()]


@given(drawn("selective_copying"))
def test_copying_is_symbols_among_noise_then_the_same_in_order(given_source):
    data, index, length = given_source
    tokens, answers, repeated = data.example(index, length)
    marker = length - data.items
    assert np.flatnonzero(tokens == 1).tolist() == [marker]
    np.testing.assert_array_equal(tokens[:marker][tokens[:marker] > 0], tokens[marker + 1 :])
    np.testing.assert_array_equal(answers, np.arange(marker + 1, length + 1))
    np.testing.assert_array_equal(repeated, np.flatnonzero(tokens[:marker]))
    assert tokens.max() < data.vocab_size


@pytest.mark.parametrize(("task", "program"), [(TASKS[0], recall_by_lookup), (TASKS[1], copy_by_counting)])
def test_a_program_with_a_memory_solves_it_and_none_without(task, program):
    """The best guess at an answer from the token before it, and its place, is right once in as many as there are."""
    data, length = sources.load(f"{task}:6", "validation", vocab_size=33), 60
    right, seen, windows = 0, [], 500
    for index in range(windows):
        tokens, answers, _ = data.example(index, length)
        told = list(program(tokens.tolist()))
        right += sum(told[answer - 1] == tokens[answer] for answer in answers)
        seen += [(tokens[answer - 1], tokens[answer]) for answer in answers]
    assert right == windows * 6
    kinds = 16 if task == "associative_recall" else 31
    before, answer = np.array(seen).T
    best = sum(np.bincount(answer[before == token]).max() for token in np.unique(before))  # fitted, so a bit above it
    assert 1 / kinds <= best / len(answer) < 3 / kinds


@pytest.mark.parametrize("task", TASKS)
def test_windows_are_functions_of_their_index(task):
    here, again = (sources.load(task, "train", vocab_size=64) for _ in range(2))
    assert (here.name, here.fingerprint()) == (f"{task}:8/train", f"{task}:8-train-64")
    windows = [here.window(index, 64) for index in (0, 1, 2**32)]
    for index, window in zip((2**32, 1, 0), windows[::-1], strict=True):
        for key, value in again.window(index, 64).items():
            np.testing.assert_array_equal(value, window[key])
    assert len({window["inputs"].tobytes() for window in windows}) == 3
    assert here.windows(64) > 10**10
    splits = [sources.load(task, split, vocab_size=64) for split in ("train", "validation", "test")]
    firsts = {data.window(index, 64)["inputs"].tobytes() for data in splits for index in range(200)}
    assert len(firsts) == 600
    assert len({data.fingerprint() for data in splits}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_on_answers_alone(task):
    data = sources.load(f"{task}:5", "train", vocab_size=64)
    window, (tokens, answers, _) = data.window(7, 40), data.example(7, 40)
    assert {key: (value.shape, value.dtype.name) for key, value in window.items()} == {
        "inputs": ((40,), "int32"),
        "targets": ((40,), "int32"),
        "mask": ((40,), "float32"),
    }
    np.testing.assert_array_equal(np.append(window["inputs"], window["targets"][-1]), tokens)
    np.testing.assert_array_equal(window["targets"][:-1], window["inputs"][1:])
    np.testing.assert_array_equal(np.flatnonzero(window["mask"]), answers - 1)


@pytest.mark.parametrize("task", TASKS)
def test_it_feeds_the_pipeline(task):
    config = config_lib.default()
    config.data.update(source=f"{task}:4", sequence_length=32)
    data = pickle.loads(pickle.dumps(sources.from_config(config, "train")))
    source.check(data, config.model.vocab_size, 32)
    options = {"sequence_length": 32, "batch_size": 3, "seed": 5}
    batches = pipeline.train_batches(data, **options)
    first, second = next(batches), next(batches)
    later = next(pipeline.train_batches(data, **options, start=1))
    assert first["inputs"].shape == (3, 32)
    assert (first["mask"].sum(1) == 4).all()
    assert first["inputs"].max() > 128  # all of the vocabulary, 257
    for key in second:
        np.testing.assert_array_equal(second[key], later[key])
    assert (first["inputs"] != second["inputs"]).any()
    held_out = list(pipeline.evaluation_batches(data, sequence_length=32, batch_size=2, most_windows=3))
    assert [batch["mask"].sum() for batch in held_out] == [8, 4]


@pytest.mark.parametrize(
    ("location", "vocab_size", "message"),
    [
        ("associative_recall:x", 64, "data.source='associative_recall:x': expected a number of pairs after the colon"),
        ("selective_copying:0", 64, "expected a number of symbols after the colon, such as 8"),
        ("associative_recall:16", 32, "model.vocab_size=32: associative_recall of 16 pairs needs 33 tokens or more"),
        ("selective_copying", 3, "model.vocab_size=3: selective_copying of 8 symbols needs 4 tokens or more"),
        (
            "associative_recal",
            64,
            "no such folder; expected embedded, synthetic, associative_recall, selective_copying",
        ),
    ],
)
def test_what_there_is_not(location, vocab_size, message):
    with pytest.raises(ConfigError) as error:
        sources.load(location, "train", vocab_size=vocab_size)
    assert message in str(error.value)


@pytest.mark.parametrize(("task", "least"), [("associative_recall", 31), ("selective_copying", 16)])
def test_a_sequence_that_does_not_fit(task, least):
    data = sources.load(f"{task}:8", "train", vocab_size=64)
    data.window(0, least)
    with pytest.raises(ConfigError, match=f"8 .* do not fit {least - 1} tokens; expected {least} tokens or more"):
        data.window(0, least - 1)
    with pytest.raises(ConfigError, match="is sequences, not one long row of tokens"):
        data.piece(0, 10)
