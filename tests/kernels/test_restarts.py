"""Test restarts at W0 in the fused kernels, interpreted, against a scan of each document by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels import run
from ttt_jax.kernels.layout import Layout
from ttt_jax.kernels.restarts import flags_by_block, stretches
from ttt_jax.ttt import scan


def flags_of(n, *restarts):
    """Return flags [B, n], true at the given mini-batches of each row."""
    return np.stack([np.isin(np.arange(n), row) for row in restarts])


def patterns(n):
    """Return flags of two rows: drawn; at first, last and neighbouring mini-batches and ends of groups; all; none."""
    return [
        np.random.default_rng(0).random((2, n)) < 0.3,
        flags_of(n, [0, 5, 6, 7], [2, n - 1]),
        np.ones((2, n), bool),
        np.zeros((2, n), bool),
    ]


def documents(flags, b):
    """Return indices of n + 1 documents of each row, of which the first continues and some may be empty.

    These are the tokens of each document and whether they exist, [B, n + 1, T] each; the document of each token and its
    place in it, [B, T] each; and the last document of each row, [B].
    """
    batch, n = flags.shape
    document, place = np.cumsum(flags, 1).repeat(b, 1), np.zeros((batch, n * b), int)
    source, there = np.zeros((2, batch, n + 1, n * b), int)
    for row in range(batch):
        for d in range(n + 1):
            tokens = np.flatnonzero(document[row] == d)
            place[row, tokens] = np.arange(len(tokens))
            source[row, d, : len(tokens)], there[row, d, : len(tokens)] = tokens, 1
    return source, there, document, place, document[:, -1]


def document_by_document(loop, parameters, tokens, start, index):
    """Read each document as its own sequence, filled up with tokens of rate 0; return z and the weights at the end."""
    source, there, document, place, last = index
    batch, count, length = source.shape
    rows = np.arange(batch)[:, None]

    def apart(x):
        x = x[rows[..., None], source]
        return x.reshape(batch * count, *x.shape[2:])

    def of_start(w0, start):
        w0 = jnp.broadcast_to(w0, start.shape)[:, None]
        weights = jnp.concatenate([start[:, None], w0.repeat(count - 1, 1)], 1)
        return weights.reshape(batch * count, *weights.shape[2:])

    documents = jax.tree.map(apart, tokens)
    eta = documents.eta * there.reshape(batch * count, length, 1)
    weights = jax.tree.map(of_start, parameters.w0, start)
    result = scan.run(loop, parameters._replace(w0=weights), documents._replace(eta=eta))

    def per_row(x):
        return x.reshape(batch, count, *x.shape[1:])

    z = per_row(result.z)[rows, document, place]
    return z, jax.tree.map(lambda w: per_row(w)[rows[:, 0], last], result.state.weights)


@pytest.fixture(scope="module")
def solutions(make_problem, quick_jit):
    """Return ``solutions(depth, shape, **options)``: functions from flags to results and gradients, by kernel and scan.

    Each is compiled once. W0 is one for each row for TTT-MLP, and one for all rows for TTT-Linear.
    """

    def make(depth, shape, **options):
        loop, parameters, tokens = make_problem(depth, **{"batch": 2, "tokens": 272, **shape})
        batch, length, b = *tokens.q.shape[:2], len(parameters.position_eta)
        rng = np.random.default_rng(2)

        def near(w):
            return w + 0.1 * rng.standard_normal((batch, *w.shape)).astype(np.float32)

        start = jax.tree.map(near, parameters.w0)
        if depth == 2:
            parameters = parameters._replace(w0=jax.tree.map(near, parameters.w0))

        def by_kernel(parameters, tokens, start, flags):
            return run.run(loop, parameters, start, tokens, flags, interpret=True, **options)

        def by_scan(parameters, tokens, start, index):
            tokens = jax.tree.map(lambda x: x.astype(jnp.float32), tokens)
            return document_by_document(loop, parameters, tokens, start, index)

        def with_gradients(solve):
            def functional(arguments, how):
                results = solve(*arguments, how)
                rng = np.random.default_rng(1)
                drawn = jax.tree.map(lambda x: (x.astype(jnp.float32) * rng.standard_normal(x.shape)).sum(), results)
                return sum(jax.tree.leaves(drawn)), results

            gradients = quick_jit(jax.grad(functional, has_aux=True))
            return lambda how: gradients((parameters, tokens, start), how)

        kernel, scanned = with_gradients(by_kernel), with_gradients(by_scan)
        return kernel, lambda flags: scanned(documents(flags, b)), length // b

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "shape", "options"),
    [
        (1, {"b": 16}, {"unroll": (2, 2)}),
        (1, {"b": 16, "dtype": jnp.bfloat16}, {"unroll": (2, 1), "remat_group": 16}),
        (1, {"b": 8, "tokens": 72, "head_dim": 96}, {"unroll": (1, 2)}),
        (2, {"b": 16}, {}),
        (2, {"b": 16, "dtype": jnp.bfloat16}, {}),
    ],
)
def test_outputs_end_and_gradients_equal_those_of_each_document(solutions, relative_error, depth, shape, options):
    exact = shape.get("dtype") is None
    kernel, scanned, n = solutions(depth, shape, **options)
    for flags in patterns(n):
        (gradients, results), (expected_gradients, expected) = kernel(flags), scanned(flags)
        assert relative_error(results, expected) < (1e-6 if exact else 1e-2)
        assert relative_error(gradients, expected_gradients) < (5e-6 if exact else 2e-2)


@pytest.mark.slow
def test_flags_that_are_not_set_change_nothing(make_problem, by_kernel, quick_jit):
    """Compare exactly."""
    loop, *arguments = make_problem(batch=2, tokens=80, head_dim=16)
    flags = np.zeros((2, 5), bool)
    without, with_flags = (
        quick_jit(lambda *x, each=each: by_kernel(loop, *x, restarts=each))(*arguments) for each in (None, flags)
    )
    jax.tree.map(np.testing.assert_array_equal, with_flags, without)


def stretches_by_hand(flags, per_step, per_group):
    """Return [first, stop, whether it starts at W0] of each stretch of one block, from the definition."""
    found = []
    for start in range(0, len(flags), per_step):
        alone = any(flags[start + 1 : start + per_step])
        for i in range(start, start + per_step):
            if i == start or flags[i] or (alone and i % per_group == 0):
                found.append([i, i, flags[i]])
            found[-1][1] = i + 1
    return found


@pytest.mark.parametrize(("b", "unroll"), [(16, 1), (16, 2), (8, 2), (64, 1), (64, 2)])
def test_stretches_are_whole_steps_or_parts_of_groups(b, unroll):
    layout = Layout(1, 64, b)
    n = 256 // b
    drawn = np.random.default_rng(b).random((9, 2 * n - 3)) < 0.2
    flags = np.concatenate([flags_of(2 * n - 3, [], [0, n - 1], [1]), drawn])
    of_all = jax.tree.map(np.asarray, stretches(layout, flags_by_block(layout, jnp.asarray(flags), 2), unroll))
    padded = np.pad(flags, ((0, 0), (0, 3))).reshape(-1, 2, n)
    for row, block in np.ndindex(*padded.shape[:2]):
        first, stop, fresh = (x[row, block, 0] for x in of_all)
        for start, end, restarts in stretches_by_hand(padded[row, block], unroll * layout.group, layout.group):
            assert set(first[start:end]) == {start}
            assert set(stop[start:end]) == {end}
            assert fresh[start] == restarts
