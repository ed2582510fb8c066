"""Test the layout of tokens in windows against its rules, token by token."""

import functools

import jax
import numpy as np
import pytest

from ttt_jax.ttt import windows

T, b = 9, 4


def places(position, valid, reset):
    """Return for each token of a row: its index, its place, whether it begins a document, and its mini-batch."""
    found, part = [], 0
    for t in np.flatnonzero(valid):
        position = 0 if reset[t] else position
        part += position % b == 0
        found.append((t, position % b, bool(reset[t]), part))
        position += 1
    return found, position


def check(laid, i, position, valid, reset):
    expected, end = places(position, valid, reset)
    assert laid.position[i] == end
    filled, window_of = laid.filled[i], {}
    assert all(list(f) == sorted(f, reverse=True) for f in filled)  # the first slots of each window
    begins = np.zeros_like(filled) if laid.begins is None else laid.begins[i]
    slots = zip(*(x[filled].tolist() for x in (laid.source[i], laid.place[i], begins)), strict=True)
    assert list(slots) == [token[:3] for token in expected]
    where = np.broadcast_to(np.arange(len(filled))[:, None], filled.shape)[filled]
    for window, (t, place, begins_here, part) in zip(where, expected, strict=True):
        assert window_of.setdefault(part, window) == window  # a mini-batch is in one window
        parts = [p for p, w in window_of.items() if w == window]
        assert part == parts[0] or place > 0 or begins_here  # the first mini-batch is followed only by documents,
        assert part == parts[0] or place < b - 1  # which do not fill a mini-batch
        assert laid.target[i, t] // filled.shape[1] == window
    assert (laid.target[i][~valid] >= filled.size).all()


@pytest.mark.parametrize("tokens", [T, 3, 1])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("from_start", [False, True])
def test_each_mini_batch_lies_in_one_window_in_order(tokens, documents, from_start):
    rows = 64
    rng = np.random.default_rng(0)
    lay = jax.jit(functools.partial(windows.lay, tokens, b))
    for density in (0.05, 0.3, 0.9):
        position = None if from_start else rng.integers(0, 3 * b, rows).astype(np.int32)
        valid = rng.random((rows, tokens)) < rng.choice([0.5, 0.9, 1.0], (rows, 1))
        reset = rng.random((rows, tokens)) < density
        laid = jax.tree.map(np.asarray, lay(position, valid, reset if documents else None))
        for i in range(rows):
            check(
                laid, i, 0 if from_start else position[i], valid[i], reset[i] if documents else np.zeros(tokens, bool)
            )
    cells = -(-(tokens + (0 if from_start else b - 1)) // b)
    assert laid.source.shape == (rows, 2 * cells - 1 if documents else cells, min(b, tokens))


def test_values_are_put_into_slots_and_back(quick_jit):
    valid = np.array([[True, False, True, True, True]])

    @quick_jit
    def put_and_back(x):
        laid = windows.lay(5, 2, np.array([1], np.int32), valid)
        return laid.put(x), laid.back(laid.put(x))

    put, back = put_and_back(np.arange(1.0, 6, dtype=np.float32)[None])
    assert put.tolist() == [[1, 0, 3, 4, 5, 0]]
    assert back.tolist() == [[1, 0, 3, 4, 5]]
