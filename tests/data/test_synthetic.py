"""Check random tokens and the sequences of tasks, and that both are sources like any other."""

import itertools

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
    """Draw a source of the task, an index, and the length of its sequences."""
    items = draw(st.integers(1, 12))
    vocab_size = draw(st.integers(synthetic.TASKS[task].least_vocab_size(items), 80))
    length = draw(st.integers(synthetic.TASKS[task].least_length(items), 150))
    split = draw(st.sampled_from(("train", "test")))
    found = named_sources.load(f"{task}:{items}", split, vocab_size=vocab_size, sequence_length=length)
    return found, draw(st.integers(0, 2**22)), length


def recall_by_lookup(tokens):
    """Predict after each token the token that followed it the last time."""
    seen = {}
    for here, following in itertools.pairwise(tokens):
        yield seen.get(here)
        seen[here] = following


def copy_by_counting(tokens):
    """Remember tokens that are neither noise nor marker, and predict them in order after the marker."""
    symbols, index = [], None
    for token in tokens[:-1]:
        if token == 1:
            index = 0
        elif index is None and token:
            symbols.append(token)
        elif index is not None:
            index += 1
        yield symbols[index] if index is not None else None


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
def test_only_a_program_with_a_memory_solves_a_task(task, program):
    """Check that guessing an answer from the token before it is right about once in as many symbols as there are."""
    data = named_sources.load(f"{task}:6", "validation", vocab_size=33, sequence_length=60)
    right, seen, windows = 0, [], 500
    for index in range(windows):
        tokens, answers, _ = data.example(index)
        predicted = list(program(tokens.tolist()))
        right += sum(predicted[answer - 1] == tokens[answer] for answer in answers)
        seen += [(tokens[answer - 1], tokens[answer]) for answer in answers]
    assert right == windows * 6
    kinds = 16 if task == "associative_recall" else 31
    before, answer = np.array(seen).T
    best = sum(np.bincount(answer[before == token]).max() for token in np.unique(before))
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
def test_windows_and_pieces_count_answers_only(task):
    """Compare windows, and pieces that begin and end anywhere, with a row that is joined here."""
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
def test_a_task_feeds_the_pipeline(task, sent_to_a_process):
    config = config_lib.default()
    config.data.update(source=f"{task}:4", sequence_length=32)
    data = sent_to_a_process(named_sources.from_config(config, "train"))
    token_source.check(data, config.model.vocab_size, 32)
    options = {"sequence_length": 32, "batch_size": 3, "seed": 5}
    batches = pipeline.train_batches(data, **options)
    first, second = next(batches), next(batches)
    later = next(pipeline.train_batches(data, **options, start=1))
    assert first["inputs"].shape == (3, 32)
    assert (first["mask"].sum(1) == 4).all()
    assert first["inputs"].max() > 128  # the vocabulary of 257 is used
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
def test_impossible_tasks_are_refused(location, vocab_size, message):
    with pytest.raises(ConfigError) as error:
        named_sources.load(location, "train", vocab_size=vocab_size)
    assert message in str(error.value)


def test_tasks_are_known_to_need_no_files():
    assert set(TASKS) == set(synthetic.TASKS) < set(config_lib.GENERATED)


# ---- Random tokens


def splitmix64(state: int) -> int:
    """Compute the finaliser in plain integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_random_tokens_are_hashes_of_their_indices():
    source = named_sources.load("synthetic", "train", vocab_size=97)
    start = 5 * 4096 - 3
    expected = [1 if i % 4096 == 0 else splitmix64(i + (1 << 48)) % 97 for i in range(start, start + 50)]
    assert source.tokens[start : start + 50].tolist() == expected


def test_random_tokens_are_uniform_and_differ_between_splits():
    found = {split: synthetic.random_source(split, 16).tokens[0:100_000] for split in ("train", "validation", "test")}
    for tokens in found.values():
        np.testing.assert_allclose(np.bincount(tokens, minlength=16) / 1e5, 1 / 16, rtol=0.06)
    assert (found["train"] == found["validation"]).mean() < 0.08
    assert (found["test"] == found["validation"]).mean() < 0.08


def test_random_documents_begin_with_bos():
    source = synthetic.random_source("train", 97)
    assert len(source.documents) == len(source.tokens) // 4096
    found = source.documents[2:5]
    assert found.tolist() == [8192, 12288, 16384]
    assert [int(source.tokens[start : start + 1][0]) for start in found.tolist()] == [synthetic.RANDOM_BOS] * 3


def test_random_tokens_are_practically_endless():
    source = named_sources.load("synthetic", "train")
    assert source.windows(2048) > 10**8
    last = source.windows(2048) - 1
    assert source.window(last, 2048)["inputs"].shape == (2048,)
