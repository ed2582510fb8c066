"""Synthetic tasks: what a sequence is, who can solve it and who cannot, and that it is a source like any other."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.data import named_sources, pipeline, sequences, synthetic, token_source

TASKS = ("associative_recall", "selective_copying")


@st.composite
def drawn(draw, task):
    """A source of the task, an index, and a length that its sequences fit."""
    items = draw(st.integers(1, 12))
    vocab_size = draw(st.integers(synthetic.TASKS[task].least_vocab_size(items), 80))
    length = draw(st.integers(synthetic.TASKS[task].least_length(items), 150))
    split = draw(st.sampled_from(("train", "test")))
    found = named_sources.load(f"{task}:{items}", split, vocab_size=vocab_size, sequence_length=length)
    return found, draw(st.integers(0, 2**22)), length


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
    tokens, answers, repeated = data.example(index)
    n, half = data.items, (data.vocab_size - 1) // 2
    assert tokens.shape == (length,)
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
    tokens, answers, repeated = data.example(index)
    marker = length - data.items - 1
    assert np.flatnonzero(tokens == 1).tolist() == [marker]
    np.testing.assert_array_equal(tokens[:marker][tokens[:marker] > 0], tokens[marker + 1 :])
    np.testing.assert_array_equal(answers, np.arange(marker + 1, length))
    np.testing.assert_array_equal(repeated, np.flatnonzero(tokens[:marker]))
    assert tokens.max() < data.vocab_size


@pytest.mark.parametrize(("task", "program"), [(TASKS[0], recall_by_lookup), (TASKS[1], copy_by_counting)])
def test_a_program_with_a_memory_solves_it_and_none_without(task, program):
    """The best guess at an answer from the token before it, and its place, is right once in as many as there are."""
    data = named_sources.load(f"{task}:6", "validation", vocab_size=33, sequence_length=60)
    right, seen, windows = 0, [], 500
    for index in range(windows):
        tokens, answers, _ = data.example(index)
        told = list(program(tokens.tolist()))
        right += sum(told[answer - 1] == tokens[answer] for answer in answers)
        seen += [(tokens[answer - 1], tokens[answer]) for answer in answers]
    assert right == windows * 6
    kinds = 16 if task == "associative_recall" else 31
    before, answer = np.array(seen).T
    best = sum(np.bincount(answer[before == token]).max() for token in np.unique(before))  # fitted, so a bit above it
    assert 1 / kinds <= best / len(answer) < 3 / kinds


@pytest.mark.parametrize("task", TASKS)
def test_sequences_are_functions_of_their_index(task):
    here, again = (named_sources.load(task, "train", vocab_size=64) for _ in range(2))
    assert (here.name, here.fingerprint()) == (f"{task}:8/train", f"{task}:8-train-64-64")
    indices = (0, 1, 2**32)
    found = [here.example(index).tokens for index in indices]
    for index, tokens in list(zip(indices, found, strict=True))[::-1]:
        np.testing.assert_array_equal(again.example(index).tokens, tokens)
    assert len({tokens.tobytes() for tokens in found}) == 3
    assert here.windows(64) > 10**10
    splits = [named_sources.load(task, split, vocab_size=64) for split in ("train", "validation", "test")]
    assert len({data.example(index).tokens.tobytes() for data in splits for index in range(200)}) == 600
    assert len({data.fingerprint() for data in splits}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_a_row_of_sequences_in_which_answers_count(task):
    """Windows, and pieces that begin and end anywhere, against a row that is joined here."""
    data = named_sources.load(f"{task}:5", "train", vocab_size=64, sequence_length=40)
    examples = [data.example(index) for index in range(5)]
    row = np.concatenate([example.tokens for example in examples])
    counts = np.concatenate([[place in example.answers for place in range(40)] for example in examples])
    for start, stop in ((0, 40), (40, 80), (3, 17), (39, 41), (17, 130), (80, 80), (0, 199)):
        piece = data.piece(start, stop)
        assert [value.dtype.name for value in piece.values()] == ["int32", "int32", "float32"]
        np.testing.assert_array_equal(piece["inputs"], row[start:stop])
        np.testing.assert_array_equal(piece["targets"], row[start + 1 : stop + 1])
        np.testing.assert_array_equal(piece["mask"], counts[start + 1 : stop + 1])
        np.testing.assert_array_equal(data.tokens[start:stop], row[start:stop])
    window = data.window(3, 40)
    np.testing.assert_array_equal(window["inputs"], examples[3].tokens)
    assert window["mask"].sum() == 5
    assert data.window(1, 80)["mask"].sum() == 10


@pytest.mark.parametrize("task", TASKS)
def test_it_feeds_the_pipeline(task):
    config = config_lib.default()
    config.data.update(source=f"{task}:4", sequence_length=32)
    data = pickle.loads(pickle.dumps(named_sources.from_config(config, "train")))
    token_source.check(data, config.model.vocab_size, 32)
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
    held_out = sequences.pieces(data, sequences.windows(data, 32, 3), piece_length=32, batch_size=2)
    assert [piece.batch["mask"].sum() for piece in held_out] == [8, 4]


@pytest.mark.parametrize(
    ("location", "vocab_size", "message"),
    [
        ("associative_recall:x", 64, "data.source='associative_recall:x': expected a number of pairs after the colon"),
        ("selective_copying:0", 64, "expected a number of symbols after the colon, such as 8"),
        ("associative_recall:16", 32, "model.vocab_size=32: associative_recall of 16 pairs needs 33 or more"),
        ("selective_copying", 3, "model.vocab_size=3: selective_copying of 8 symbols needs 4 or more"),
        ("associative_recall:17", 64, "data.sequence_length=64: associative_recall of 17 pairs needs 68 or more"),
        ("selective_copying:32", 64, "data.sequence_length=64: selective_copying of 32 symbols needs 65 or more"),
        ("associative_recal", 64, "no such folder; expected embedded, synthetic, associative_recall, selective"),
    ],
)
def test_what_there_is_not(location, vocab_size, message):
    with pytest.raises(ConfigError) as error:
        named_sources.load(location, "train", vocab_size=vocab_size)
    assert message in str(error.value)


def test_tasks_are_known_to_need_no_files():
    assert set(TASKS) == set(synthetic.TASKS) < set(config_lib.GENERATED)
