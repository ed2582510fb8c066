"""Compare padding, documents and pieces with the plain program of training, for every mixer.

That program reads each document alone, from its first token and without a state.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixer_cases import (
    COTANGENT,
    MASKS,
    PIECE,
    ROWS,
    TOKENS,
    WIDTH,
    Masks,
    X,
    mixer,
    mostly_fast,
    one_that_learns,
    position,
)

from ttt_jax.mixers.mixer import Context


def with_gradients(run):
    """Return a function that returns outputs, gradients of their weighted sum, and what else ``run`` returns.

    Gradients are with respect to the parameters and the input.
    """

    def function(params, *arrays):
        def loss(params, x):
            y, more = run(params, x, *arrays)
            return (y * COTANGENT).sum(), (y, more)

        gradients, (y, more) = jax.grad(loss, (0, 1), has_aux=True)(params, X)
        return y, gradients, more

    return function


@pytest.fixture(scope="module")
def alone(quick_jit, params_of):
    """Return a function that reads each document by itself, from its first token and without a state; 0 at padding."""

    def compiled(case):
        def run(params, x, places):  # places: [N, T], indices of tokens
            flat = jnp.concatenate([x.reshape(-1, WIDTH), jnp.ones((1, WIDTH))])  # and a token to fill rows with
            y, _ = mixer(case).apply({"params": params}, flat[places])
            return jnp.zeros_like(flat).at[places].set(y)[:-1].reshape(x.shape), None

        return quick_jit(with_gradients(run))

    compiled = functools.cache(compiled)

    def expected(case, masks):
        places = np.full((ROWS * TOKENS, TOKENS), ROWS * TOKENS)
        for i, document in enumerate(masks.documents()):
            places[i, : len(document)] = [row * TOKENS + t for row, t in document]
        return compiled(case)(params_of(case), places)

    return expected


@pytest.fixture(scope="module")
def read(quick_jit, params_of):
    """Return a function that reads the rows as they are, in one call without a state."""

    def compiled(case, remat):
        def whole(params, x, valid, reset):
            return mixer(case).apply({"params": params}, x, None, Context(valid, reset))

        return quick_jit(with_gradients(jax.checkpoint(whole) if remat else whole))

    compiled = functools.cache(compiled)
    return lambda case, masks, remat=False: compiled(case, remat)(params_of(case), *masks)


@pytest.fixture(scope="module")
def read_in_pieces(quick_jit, params_of):
    """Return a function that reads the rows in two pieces, and also returns the positions at the ends of the pieces.

    The backward pass goes through the state by hand, so that both pieces and both passes are one compiled program.
    """

    def compiled(case):
        def piece(params, x, state, valid, reset, y_cotangent, state_cotangent):
            def run(params, x, floats):
                y, after = mixer(case).apply({"params": params}, x, _merged(floats, state), Context(valid, reset))
                return (y, _floats_of(after)), after

            (y, _), pull, after = jax.vjp(run, params, x, _floats_of(state), has_aux=True)
            return y, after, pull((y_cotangent, state_cotangent))

        return quick_jit(piece)

    compiled = functools.cache(compiled)

    def read(case, masks):
        def piece(at, state, state_cotangent):
            inputs = (mask if mask is None else mask[at] for mask in masks)
            return compiled(case)(params_of(case), X[at], state, *inputs, COTANGENT[at], state_cotangent)

        first, second = np.s_[:, :PIECE], np.s_[:, PIECE:]
        begin = mixer(case).initial_state(ROWS, WIDTH, TOKENS)
        nothing = jax.tree.map(jnp.zeros_like, _floats_of(begin))
        y_first, middle, _ = piece(first, begin, nothing)
        y_second, end, (params_second, x_second, to_middle) = piece(second, middle, nothing)
        _, _, (params_first, x_first, _) = piece(first, begin, to_middle)
        gradients = jax.tree.map(np.add, params_first, params_second), np.concatenate([x_first, x_second], 1)
        return np.concatenate([y_first, y_second], 1), gradients, (position(middle), position(end))

    return read


def _floats_of(state):
    """Return the state with None in place of integers, which have no gradient."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, state)


def _merged(floats, state):
    """Return the state with other floating point numbers."""
    return jax.tree.map(lambda x, new: x if new is None else new, state, floats, is_leaf=lambda x: x is None)


def assert_same(found, expected):
    """Compare outputs and gradients, relative to the largest value of each array.

    Gradients are also compared relative to 1 % of the largest one: those of Muon's rates are nearly zero, differences
    of larger numbers.
    """
    y, gradients, _ = expected
    least = max(np.abs(g).max() for g in jax.tree.leaves(gradients)) / 100

    def check(found, expected, least=0.0):
        size = max(np.abs(expected).max(), least)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * size, equal_nan=False)

    check(found[0], y)
    jax.tree.map(functools.partial(check, least=least), found[1], gradients)


@pytest.mark.parametrize("masks", MASKS)
@mostly_fast
def test_pieces_with_padding_and_documents_match_each_document_alone(alone, read_in_pieces, case, masks):
    """Compare outputs, which are 0 at padding, and gradients; the cut is within documents.

    Positions at the ends of pieces are those in the last document.
    """
    found = read_in_pieces(case, MASKS[masks])
    assert_same(found, alone(case, MASKS[masks]))
    for positions, end in zip(found[2], (PIECE, TOKENS), strict=True):
        np.testing.assert_array_equal(positions, MASKS[masks].positions(end))


@pytest.mark.parametrize("masks", MASKS)
@mostly_fast
def test_sequences_with_padding_and_documents_match_each_document_alone(alone, read, case, masks):
    """Read whole sequences without a state, as in training."""
    assert_same(read(case, MASKS[masks]), alone(case, MASKS[masks]))


@pytest.mark.slow
@pytest.mark.parametrize("only", Masks._fields)
@pytest.mark.parametrize("pieces", [False, True])
@one_that_learns
def test_padding_without_documents_and_documents_without_padding(alone, read, read_in_pieces, case, only, pieces):
    """Check that None stands for no padding, or for no beginnings of documents."""
    one = MASKS["any, 1"]._replace(**{"reset" if only == "valid" else "valid": None})
    assert_same((read_in_pieces if pieces else read)(case, one), alone(case, one))


@mostly_fast
def test_bfloat16_is_near_float32(params_of, read, quick_jit, case):
    masks = MASKS["any, 0"]

    @quick_jit
    def in_bfloat16(params, x):
        module = mixer(case, "bfloat16")
        return module.apply({"params": params}, x, module.initial_state(ROWS, WIDTH, TOKENS), Context(*masks))[0]

    exact, found = read(case, masks)[0], in_bfloat16(params_of(case), X)
    assert found.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((found.astype(np.float32) - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.1


@pytest.mark.slow
@one_that_learns
def test_remat_does_not_change_results(read, case):
    masks = MASKS["any, 2"]
    assert_same(read(case, masks, remat=True), read(case, masks))
