"""Test the scan over a sequence: against loops, in pieces, and with every way to compile it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_jax.ttt import dual, scan
from ttt_jax.ttt.inner_loop import InnerLoop, initial_state
from ttt_jax.ttt.learner import Learner


def numpy_normalise(z):
    std = np.sqrt(np.mean((z - z.mean()) ** 2) + 1e-6)
    return (z - z.mean()) / std, std


def stepped(weights, gradient, rate):
    """Return W - rate * gradient."""
    return jax.tree.map(lambda w, g: w - rate * g, weights, gradient)


def one_head_by_numpy(scale, bias, w, c, q, k, v, token_eta, position_eta):
    """Compute TTT-Linear for one head of one sequence, token by token: z [T, d], W [d, d], c [d]."""
    d, b = q.shape[-1], len(position_eta)
    z, w_t, c_t = np.zeros_like(q), w, c
    for t in range(len(q)):
        start = t - t % b
        if t == start:
            w, c, gradients = w_t, c_t, []
        x_hat, std = numpy_normalise(k[t] @ w + c)
        jacobian = (np.eye(d) - 1 / d - np.outer(x_hat, x_hat) / d) / std
        gradients.append(jacobian @ (scale * (scale * x_hat + bias - (v[t] - k[t]))))
        w_t, c_t = w.copy(), c.copy()
        for s in range(start, t + 1):
            eta = position_eta[t - start] * token_eta[s]
            w_t -= eta * np.outer(k[s], gradients[s - start])
            c_t -= eta * gradients[s - start]
        z[t] = q[t] + scale * numpy_normalise(q[t] @ w_t + c_t)[0] + bias
    return z, w_t, c_t


@pytest.mark.parametrize(("tokens", "b"), [(12, 4), (7, 3), (5, 1)])
def test_linear_equals_a_float64_loop_over_tokens(make_case, run_scan, assert_close, tokens, b):
    case = make_case(1, tokens, b, seed=3)
    z, state, statistics = run_scan(*case, statistics=True)
    weights = stepped(state.weights, state.pending, case.parameters.position_eta[(tokens - 1) % b])[0]
    (w0, norm, position_eta), inputs = jax.tree.map(lambda x: np.asarray(x, np.float64), case[1:])
    for i in range(2):
        for h in range(2):
            expected = one_head_by_numpy(
                norm["norm_scale"][h, 0],
                norm["norm_bias"][h, 0],
                w0[0].weight[h],
                w0[0].bias[h, 0],
                *(x[i, :, h] for x in inputs[:4]),
                position_eta,
            )
            assert_close((z[i, :, h], weights.weight[i, h], weights.bias[i, h, 0]), expected)
            steps = expected[1] - w0[0].weight[h], expected[2] - w0[0].bias[h, 0]
            distance = np.sqrt(sum((step**2).sum() for step in steps))
            assert statistics.weight_distance[i, -1, h] == pytest.approx(distance, rel=1e-5)


def test_scan_equals_a_loop_over_mini_batches(make_case, run_scan, quick_jit, assert_close):
    loop, (w0, norm, position_eta), tokens = case = make_case(2, 10, 4)
    mini_batch = quick_jit(dual.mini_batch, static_argnames="loop")
    weights, z = initial_state(w0, 2).weights, []
    for first in (0, 4, 8):
        q, k, v, eta = (x[:, first : first + 4].swapaxes(1, 2) for x in tokens[:4])
        piece = tokens._replace(q=q, k=k, v=v, eta=eta[..., None])
        start = dual.Start(weights, None, ())
        z_part, keys = mini_batch(loop, norm, start, piece, position_eta[: q.shape[2]], {})
        z.append(z_part.swapaxes(1, 2))
        if q.shape[2] == 4:
            weights = stepped(weights, dual.gradient(loop, keys), position_eta[-1])
    result = run_scan(*case)
    assert_close(result.z, np.concatenate(z, axis=1))
    assert_close(result.state.weights, weights)
    assert_close(result.state.pending, dual.gradient(loop, keys))


def read_in_pieces(run_scan, case, lengths, state):
    """Return z and statistics of all pieces, joined, and the state after the last piece."""
    results, start = [], 0
    for length in lengths:
        piece = jax.tree.map(lambda x, s=start, n=length: x[:, s : s + n], case.tokens)
        results.append(run_scan(case.loop, case.parameters, piece, state, statistics=True))
        state, start = results[-1].state, start + length
    z = np.concatenate([r.z for r in results], axis=1)
    statistics = zip(*(r.statistics for r in results), strict=True)
    return z, scan.Statistics(*(np.concatenate(s, axis=1) for s in statistics)), state


def assert_same_reading(assert_close, actual, whole):
    z, statistics, state = actual
    assert_close(z, whole.z)
    assert_close(statistics.loss_at_w0, whole.statistics.loss_at_w0)
    assert_close(statistics.loss_before, whole.statistics.loss_before)
    assert_close(state, whole.state)


@st.composite
def pieces(draw, tokens, lengths=(1, 5)):
    """Draw lengths of pieces that add up to the tokens, of few different lengths, because each is compiled."""
    parts = []
    while sum(parts) < tokens:
        parts.append(draw(st.sampled_from([n for n in lengths if n <= tokens - sum(parts)])))
    return parts


@given(seed=st.integers(0, 2**32 - 1), lengths=pieces(11))
@settings(max_examples=4)
def test_pieces_cut_anywhere_equal_the_whole(make_case, run_scan, assert_close, seed, lengths):
    case = make_case(2, 11, 4, seed)
    whole = run_scan(*case, statistics=True)
    actual = read_in_pieces(run_scan, case, lengths, initial_state(case.parameters.w0, 2))
    assert_same_reading(assert_close, actual, whole)
    # In the piece that holds a mini-batch's last token, its step is the whole step.
    last = (3, 7, 10)
    for name in ("loss_after", "weight_distance"):
        assert_close(getattr(actual[1], name)[:, last], getattr(whole.statistics, name)[:, last])


def test_learner_without_a_gradient_at_zeros_is_read_in_pieces(make_case, run_scan, assert_close):
    """Check that empty slots of a window do not hold zeros."""
    loop = InnerLoop(Learner(lambda dense, x: dense(x / jnp.sqrt((x**2).sum(-1, keepdims=True)), 6), 6))
    case = make_case(loop, 6, 4)
    whole = run_scan(*case, statistics=True)
    pieces = read_in_pieces(run_scan, case, [3, 3], initial_state(case.parameters.w0, 2))
    assert_same_reading(assert_close, pieces, whole)


@pytest.mark.parametrize("first", [4, 5])
def test_a_start_without_a_state_can_be_continued(make_case, run_scan, assert_close, first):
    """Cut at the end of a mini-batch and inside one, and read the rest token by token."""
    case = make_case(2, 11, 4)
    whole = run_scan(*case, statistics=True)
    actual = read_in_pieces(run_scan, case, [first] + [1] * (11 - first), None)
    assert_same_reading(assert_close, actual, whole)


@pytest.mark.slow
def test_remat_group_and_unroll_change_nothing(make_case, run_scan, quick_jit, assert_close):
    """Read three mini-batches with a group that does not divide them, and one larger than all of them."""
    case = make_case(1, 6, 2)
    cotangent = np.random.default_rng(1).standard_normal(case.tokens.q.shape).astype(np.float32)

    def outputs_and_gradients(**options):
        def scalar(arguments):
            z = scan.run(case.loop, *arguments, **options).z
            return (z * cotangent).sum(), z

        return quick_jit(jax.grad(scalar, has_aux=True))(case[1:])

    expected = outputs_and_gradients()
    assert_close(outputs_and_gradients(remat_group=2, unroll=2), expected)
    assert_close(run_scan(*case, remat_group=5).z, expected[1])


def test_remat_group_and_unroll_change_nothing_from_a_state(make_case, run_scan, assert_close):
    case = make_case(1, 7, 2)
    state = initial_state(case.parameters.w0, 2)._replace(position=jnp.array([1, 1]))
    assert_close(run_scan(*case, state, remat_group=3, unroll=2), run_scan(*case, state))


def test_statistics_equal_those_of_the_primal_form(make_case, run_scan, run_primal, quick_jit, assert_close):
    """Read two whole mini-batches and half of a third."""
    loop, parameters, tokens = case = make_case(2, 10, 4)
    w0, norm, position_eta = parameters
    actual = run_scan(*case, statistics=True).statistics
    state = initial_state(w0, 2)
    starts = state.weights

    @quick_jit
    def loss_of(weights, k, v):
        return loop.objective(loop.learner.apply(weights, norm, k), v)

    expected = [[], [], [], []]
    for start in (0, 4, 8):
        piece = jax.tree.map(lambda x, s=start: x[:, s : s + 4], tokens)
        before = state.weights
        _, state = run_primal(loop, parameters, piece, state)
        used = piece.q.shape[1]
        after = state.weights if used == 4 else stepped(before, state.pending, position_eta[used - 1])
        for losses, weights in zip(expected, (starts, before, after), strict=False):
            losses.append(loss_of(weights, piece.k.swapaxes(1, 2), piece.v.swapaxes(1, 2)).swapaxes(1, 2))
        changes = [
            np.asarray(new, np.float64) - old for new, old in zip(*map(jax.tree.leaves, (after, starts)), strict=True)
        ]
        distance = np.sqrt(sum((x**2).sum((2, 3)) for x in changes))  # [B, H]
        expected[3].append(np.repeat(distance[:, None], used, axis=1))
    assert_close(actual, scan.Statistics(*(np.concatenate(x, axis=1) for x in expected)))
    assert run_scan(*case).statistics is None


def test_inner_loop_is_float32_whatever_the_input(make_case, run_scan, assert_close):
    """Check that only the outputs are rounded to the dtype of q."""
    case = make_case(1, 7, 3)
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.tokens)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    (z, state, _), (exact_z, exact_state, _) = (run_scan(*case[:2], x) for x in (low, exact))
    assert z.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves((state.weights, state.pending))} == {jnp.dtype("float32")}
    assert_close(state, exact_state)
    np.testing.assert_allclose(np.asarray(z, np.float32), exact_z, rtol=2**-8, atol=1e-5)
