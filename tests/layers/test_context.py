"""Check the positions and documents of tokens against counts written out token by token."""

import jax
import numpy as np
import pytest

from ttt_jax.layers.context import Context, gather_valid, places

ROWS, TOKENS = 4, 7


def masks(seed):
    rng = np.random.default_rng(seed)
    valid, reset = rng.random((2, ROWS, TOKENS)) < rng.random((2, ROWS, 1))
    return valid, reset, rng.integers(0, 4, ROWS).astype(np.int32)


def counted(valid, reset, start):
    """Return the position and document of each valid token, and the position at the end of each row."""
    position, document, end = np.zeros(valid.shape, int), np.zeros(valid.shape, int), []
    for row in range(ROWS):
        p, d = start[row], 0
        for t in range(TOKENS):
            if valid[row, t]:
                p, d = (0, d + 1) if reset[row, t] else (p, d)
                position[row, t], document[row, t] = p, d
                p += 1
        end.append(p)
    return position, document, end


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("seed", range(8))
def test_positions_count_the_valid_tokens_of_the_document(seed, given):
    valid, reset, start = masks(seed)
    context = Context(valid if given[0] else None, reset if given[1] else None)
    valid, reset = valid | (not given[0]), reset & given[1]
    found = jax.jit(places, static_argnums=1)(context, TOKENS, start)
    position, document, end = counted(valid, reset, start)
    np.testing.assert_array_equal(np.where(valid, found.position, 0), position)
    np.testing.assert_array_equal(np.where(valid, found.document, 0), document)
    np.testing.assert_array_equal(found.end, end)
    if any(given):  # from the start of sequences
        found, zero = places(context, TOKENS, None), places(context, TOKENS, 0 * start)
        jax.tree.map(np.testing.assert_array_equal, found, zero)


def test_whole_sequences_of_one_document_have_no_places():
    assert places(Context(), TOKENS, None) is None


def test_valid_tokens_are_gathered_and_taken_back():
    """Check that tokens keep their order and resets; padding comes after them, without resets, and is 0 at the end."""
    valid, reset, _ = masks(1)
    x = 1.0 + np.arange(ROWS * TOKENS).reshape(ROWS, TOKENS, 1)
    gathered = gather_valid(valid, Context(valid, reset))
    for row in range(ROWS):
        n = valid[row].sum()
        assert gathered.counts[row] == n
        np.testing.assert_array_equal(gathered.context.valid[row], np.arange(TOKENS) < n)
        np.testing.assert_array_equal(gathered.take(x)[row, :n], x[row][valid[row]])
        np.testing.assert_array_equal(gathered.context.reset[row, :n], reset[row][valid[row]])
        assert not gathered.context.reset[row, n:].any()
    np.testing.assert_array_equal(gathered.back(gathered.take(x)), np.where(valid[..., None], x, 0))
