"""Check which windows are in which batch, from any step on, on any number of hosts."""

import itertools
import time

import grain
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ttt_jax.data import pipeline, sequences
from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import DataError

T = 3


def numbered(windows: int) -> TokenSource:
    """Return a source whose window i is tokens 3 i, ..., 3 i + 3, with one token more. BOS is token 5."""
    return TokenSource("numbers/train", np.arange(windows * T + 2, dtype=np.uint32), vocab_size=10**6, bos=5)


def train(windows, batch_size, seed=0, start=0):
    return pipeline.train_batches(numbered(windows), sequence_length=T, batch_size=batch_size, seed=seed, start=start)


def slow_but(quick, values):
    """Return all values for parametrize, of which those that are not in ``quick`` are for the slow tests."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def rows(batches, count) -> list[int]:
    """Return the windows in the rows of ``count`` batches, in order."""
    found = []
    for batch in itertools.islice(batches, count):
        np.testing.assert_array_equal(batch["inputs"], batch["inputs"][:, :1] + np.arange(T))
        np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
        np.testing.assert_array_equal(batch["mask"], batch["targets"] != 5)
        found += (batch["inputs"][:, 0] // T).tolist()
    return found


def test_batches_have_the_right_shapes_and_types():
    batch = next(train(7, 4))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "inputs": ((4, T), np.int32),
        "targets": ((4, T), np.int32),
        "mask": ((4, T), np.float32),
    }


@pytest.mark.slow
@hypothesis.given(
    windows=st.integers(1, 12), batch_size=st.integers(2, 5), seed=st.integers(0, 2**32 - 1), start=st.integers(1, 15)
)
@hypothesis.settings(max_examples=15)
def test_epochs_are_whole_and_any_step_can_be_the_first(windows, batch_size, seed, start):
    """Check also batch sizes that do not divide the number of windows, or exceed it."""
    count = start + 3
    order = rows(train(windows, batch_size, seed), count)
    assert len(order) == count * batch_size
    for epoch in range(len(order) // windows):
        assert sorted(order[epoch * windows : (epoch + 1) * windows]) == list(range(windows))
    rest = order[len(order) // windows * windows :]
    assert len(set(rest)) == len(rest)
    assert rows(train(windows, batch_size, seed, start), 3) == order[start * batch_size :]


def test_batches_of_one_row_follow_the_same_order():
    order = rows(train(5, 1, seed=3), 10)
    assert order == rows(train(5, 2, seed=3), 5)
    assert rows(train(5, 1, seed=3, start=4), 6) == order[4:]


def test_a_late_start_is_quick_and_exact():
    """Start at step 10^6 of batches of 4 from 10 windows, which is the start of epoch 400 000."""
    begun = time.perf_counter()
    order = rows(train(10, 4, start=10**6 - 5), 10)
    assert time.perf_counter() - begun < 5
    assert sorted(order[:10]) == sorted(order[10:20]) == sorted(order[20:30]) == sorted(order[30:]) == list(range(10))
    assert rows(train(10, 4, start=10**6), 5) == order[20:]


@pytest.mark.parametrize("k", slow_but((3, 16, 18), range(2, 25)))
@pytest.mark.parametrize("seed", slow_but([0], [0, 7]))
def test_windows_near_powers_of_two_are_read_once(k, seed):
    """Check the first and the last index, which grain gives the same window where it fails, and a sample of others."""
    for windows in range((1 << k) - 2, (1 << k) + 4):
        order = pipeline._order(windows, seed)
        places = {0, 1, windows // 2, windows - 2, windows - 1, *range(0, windows, max(1, windows // 64))}
        found = [order[place] for place in places if place < windows]
        assert len(set(found)) == len(found)
        assert all(0 <= window < windows for window in found)


def test_other_counts_keep_the_order_of_grain():
    for windows in (1, 2, 5, 1 << 16, (1 << 16) + 2, (1 << 17) + 1):
        expected = grain.MapDataset.range(windows).shuffle(seed=3).repeat()
        order = pipeline._order(windows, seed=3)
        assert [order[i] for i in range(windows - 1, windows + 9)] == [
            expected[i] for i in range(windows - 1, windows + 9)
        ]


def test_every_epoch_has_its_own_order():
    order = rows(train(20, 5), 4 * 6)
    epochs = [tuple(order[i : i + 20]) for i in range(0, 120, 20)]
    assert len(set(epochs)) == 6
    assert tuple(range(20)) not in epochs


def test_seeds_give_different_orders_that_repeat():
    orders = [tuple(rows(train(20, 5, seed), 4)) for seed in (0, 1, 2, 2**32 - 1)]
    assert len(set(orders)) == 4
    assert orders[1] == tuple(rows(train(20, 5, 1), 4))


def test_the_order_does_not_depend_on_the_batch_size():
    assert rows(train(7, 2, seed=3), 12) == rows(train(7, 3, seed=3), 8) == rows(train(7, 24, seed=3), 1)


# ---- Hosts


def on_hosts(hosts, steps, windows, batch_size, seed, start=0) -> list[dict[str, np.ndarray]]:
    """Return the global batches: the rows of all hosts, in order."""
    of_each = [
        itertools.islice(
            pipeline.train_batches(
                numbered(windows),
                sequence_length=T,
                batch_size=batch_size,
                seed=seed,
                start=start,
                rows=range(host * batch_size // hosts, (host + 1) * batch_size // hosts),
            ),
            steps,
        )
        for host in range(hosts)
    ]
    return [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*of_each, strict=True)
    ]


def assert_identical(actual, desired):
    assert len(actual) == len(desired)
    for a, b in zip(actual, desired, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.slow
@hypothesis.given(
    windows=st.integers(1, 60),
    rows_per_host=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    parts=st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3)), min_size=1, max_size=3),
)
@hypothesis.settings(max_examples=10)
def test_batches_do_not_depend_on_hosts_or_interruptions(windows, rows_per_host, seed, parts):
    """Run on some hosts for some steps, stop, and resume on others; ``parts`` lists hosts and steps."""
    batch_size = 8 * rows_per_host
    total = sum(steps for _, steps in parts)
    found = []
    for hosts, steps in parts:
        found += on_hosts(hosts, steps, windows, batch_size, seed, start=len(found))
    assert_identical(found, on_hosts(1, total, windows, batch_size, seed))


def test_hosts_agree_far_into_the_run():
    assert_identical(on_hosts(8, 2, 1000, 16, 3, start=10**6), on_hosts(1, 2, 1000, 16, 3, start=10**6))


def test_any_rows_of_a_batch_can_be_read():
    options = {"sequence_length": T, "batch_size": 6, "seed": 1, "start": 2}
    whole = next(pipeline.train_batches(numbered(30), **options))
    some = next(pipeline.train_batches(numbered(30), **options, rows=[1, 2, 5]))
    assert_identical([some], [{name: x[[1, 2, 5]] for name, x in whole.items()}])


@pytest.mark.parametrize("rows", [[], [0, 8], [-1, 2]])
def test_rows_outside_the_batch_are_refused(rows):
    with pytest.raises(ValueError, match="expected some from 0 to below the batch size, 8"):
        pipeline.train_batches(numbered(9), sequence_length=T, batch_size=8, seed=0, rows=rows)


@pytest.mark.slow
def test_worker_processes_read_the_same():
    options = {"sequence_length": T, "batch_size": 4, "seed": 5, "start": 3}
    here = pipeline.train_batches(numbered(30), **options)
    there = pipeline.train_batches(numbered(30), **options, worker_processes=2)
    assert rows(there, 20) == rows(here, 20)


@pytest.mark.slow
@pytest.mark.parametrize("worker_processes", [0, 1])
def test_a_token_outside_the_vocabulary_is_an_error_at_its_batch(worker_processes):
    tokens = np.arange(40, dtype=np.uint16) % 10
    tokens[23] = 10  # in window 7
    source = TokenSource("some/train", tokens, vocab_size=10, bos=None)
    batches = pipeline.train_batches(source, sequence_length=T, batch_size=1, seed=1, worker_processes=worker_processes)
    read = 0
    with pytest.raises(DataError, match="some/train: token 10 at offset 23; expected ids below the vocabulary of 10"):  # noqa: PT012
        for _ in range(13):
            next(batches)
            read += 1
    order = rows(train(13, 1, seed=1), 13)
    assert read == order.index(7)


def test_a_feed_reads_one_batch_ahead():
    def batches():
        yield {"x": 1}
        yield {"x": 2}
        raise DataError("the third cannot be read")

    feed = pipeline.Feed(batches())
    assert feed.problem is None
    assert feed.take() == {"x": 1}
    assert feed.problem is None
    assert feed.take() == {"x": 2}  # it knows that there is no third batch
    assert str(feed.problem) == "the third cannot be read"
    with pytest.raises(AssertionError):
        feed.take()


def test_a_source_shorter_than_a_window_is_refused():
    empty = TokenSource("some/train", np.zeros(3, np.uint16), vocab_size=10, bos=None)
    with pytest.raises(DataError, match="some/train: 3 tokens do not fill a window of 3 and one more"):
        pipeline.train_batches(empty, sequence_length=3, batch_size=1, seed=0)


# ---- Evaluation


def evaluation(windows, batch_size, most):
    source = numbered(windows)
    chosen = sequences.windows(source, T, most)
    return [piece.batch for piece in sequences.pieces(source, chosen, piece_length=T, batch_size=batch_size)]


@pytest.mark.parametrize(
    ("windows", "most", "chosen"),
    [
        (10, 10, range(10)),
        (10, 99, range(10)),
        (10, 5, [0, 2, 4, 6, 8]),
        (10, 4, [0, 2, 5, 7]),
        (10, 1, [0]),
        (1000, 3, [0, 333, 666]),
        (1, 1, [0]),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_evaluation_windows_are_spread_whatever_the_batch_size(windows, most, chosen, batch_size):
    batches = evaluation(windows, batch_size, most)
    count = len(chosen)
    assert len(batches) == -(-count // batch_size)
    stacked = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert {x.shape for x in stacked.values()} == {(len(batches) * batch_size, T)}
    np.testing.assert_array_equal(stacked["inputs"][:count, 0], T * np.array(chosen))
    np.testing.assert_array_equal(stacked["targets"][:count], stacked["inputs"][:count] + 1)
    np.testing.assert_array_equal(stacked["mask"][:count], stacked["targets"][:count] != 5)
    assert not any(x[count:].any() for x in stacked.values())


@hypothesis.given(windows=st.integers(1, 200), most=st.integers(1, 250), batch_size=st.integers(1, 9))
@hypothesis.settings(max_examples=30)
def test_evaluation_reads_distinct_windows_at_even_distances(windows, most, batch_size):
    batches = evaluation(windows, batch_size, most)
    firsts = np.concatenate([batch["inputs"][:, 0] for batch in batches])[: min(windows, most)] // T
    steps = np.diff(firsts)
    assert firsts[0] == 0
    assert firsts[-1] < windows
    assert windows - firsts[-1] >= windows // len(firsts)
    assert (steps >= 1).all()
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


@pytest.mark.parametrize(
    "windows",
    slow_but((1, 2, 3, 17, 257), [1, 2, 3, 5, 17, 257, 4097, 65535, 65536, 65537, 65538]),
)
def test_an_epoch_reads_every_window_once(windows):
    """Check also 2^16 + 1 windows, for which grain's shuffle reads one twice."""
    order = pipeline._order(windows, 3)
    for epoch in (0, 1) if windows < 5000 else (1,):
        read = sorted(order[epoch * windows + i] for i in range(windows))
        assert read == list(range(windows))


def test_the_order_that_replaces_grains_changes_with_seed_and_epoch():
    windows = 65537
    by_seed = [[pipeline._order(windows, seed)[i] for i in range(20)] for seed in (0, 1, 0)]
    assert by_seed[0] == by_seed[2] != by_seed[1]
    assert by_seed[0] != [pipeline._order(windows, 0)[windows + i] for i in range(20)]
