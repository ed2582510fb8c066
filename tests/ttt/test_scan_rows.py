"""Rows of different lengths, with padding anywhere, and documents that begin anywhere: each as if it were read alone.

Alone is one token after the other in the primal form, which knows of no row or document but its own. Padding holds NaN.
"""

import copy
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ttt_jax.ttt import learners, objective, primal, scan, update
from ttt_jax.ttt.inner_loop import READINGS, InnerLoop, initial_state, ttt_mlp, where
from ttt_jax.ttt.learner import Learner
from ttt_jax.ttt.learners import MLP, Linear, ResidualNorm, SwiGLU
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Decay, Momentum, Muon, Renormalise

B, T, b = 2, 10, 4
LOOPS = {
    "linear": InnerLoop(Learner(ResidualNorm(Linear()), 4)),
    "mlp, rates per matrix, decay, two momenta": InnerLoop(
        Learner(ResidualNorm(MLP(2, 1.5)), 4),
        rate=Rate(per_matrix=True),
        update=(Momentum(), Decay(), Momentum(average=False)),
    ),
    "swiglu, previous, decay and LaCT": InnerLoop(
        Learner(SwiGLU(1.5, False, features_out=3), 4),
        objective.dot_product,
        Rate(per_matrix=True),
        (Decay(0.9), Momentum(), Muon(), Renormalise()),
        "previous",
    ),
    "linear, previous, renormalised before use": InnerLoop(
        Learner(ResidualNorm(Linear()), 4), update=(Momentum(), Renormalise(before_use=True)), reading="previous"
    ),
}


def test_every_choice_is_among_these_loops():
    functions = [getattr(loop.learner.f, "f", loop.learner.f) for loop in LOOPS.values()]
    members = {(type(m), getattr(m, "average", None), getattr(m, "before_use", None)) for m in update.MEMBERS.values()}
    used = [m for loop in LOOPS.values() for m in loop.update]
    assert {type(f) for f in functions} == set(learners.LEARNERS.values())
    assert {loop.objective for loop in LOOPS.values()} == set(objective.OBJECTIVES.values())
    assert {(type(m), getattr(m, "average", None), getattr(m, "before_use", None)) for m in used} == members
    assert {loop.reading for loop in LOOPS.values()} == set(READINGS)


def bits(*rows):
    return np.array([[c == "1" for c in row] for row in rows])


PADDED = {
    "left and right": bits("0001111111", "1111100000"),
    "in the middle, and a row without tokens": bits("1100011011", "0000000000"),
}
DOCUMENTS = {
    "none": bits("0000000000", "0000000000"),
    "3, 1, 1, 4 and each token one": bits("0001110001", "1111111111"),
    "at the first token, for more than a mini-batch": bits("1000000000", "1000010000"),
}
masks = st.integers(0, 2 ** (B * T) - 1).map(lambda x: np.array([x >> i & 1 for i in range(B * T)], bool).reshape(B, T))


class Alone:
    """Reads row after row and document after document, by steps of one token."""

    def __init__(self, case, jit):
        self._loop, self._parameters, self._tokens = case
        self._step = jit(functools.partial(primal.run, case.loop))

    def of(self, tokens):
        """Return what reads other tokens, without compiling anything."""
        other = copy.copy(self)
        other._tokens = tokens
        return other

    def fresh(self):
        return initial_state(self._parameters.w0, 1, self._loop.update)

    def row(self, i, state, valid, reset):
        """z of the tokens that are valid, 0 elsewhere, and the state after the last one."""
        z = np.zeros((len(valid), *self._tokens.v.shape[2:]))
        for t in np.flatnonzero(valid):
            token = jax.tree.map(lambda x, t=t: x[i : i + 1, t : t + 1], self._tokens)
            z_t, state = self._step(self._parameters, token, self.fresh() if reset[t] else state)
            z[t] = z_t[0, 0]
        return z, state

    def rows(self, states, valid, reset):
        read = [self.row(i, states[i], valid[i], reset[i]) for i in range(B)]
        return np.stack([z for z, _ in read]), joined([state for _, state in read])


def joined(states):
    return jax.tree.map(lambda *x: np.concatenate(x), *states)


def assert_equal(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * max(1, np.abs(y).max(initial=0)))


def poisoned(tokens, valid):
    return jax.tree.map(lambda x: np.where(valid.reshape(B, T, *[1] * (x.ndim - 2)), x, np.nan), tokens)


@pytest.fixture(scope="module", params=LOOPS)
def problem(request, make_case, quick_jit):
    """A loop, what reads it alone, states inside a mini-batch, and a function with its gradients, compiled once."""
    with jax.enable_x64(True):
        case = make_case(LOOPS[request.param], T, b, 5, 0.2, np.float64)
        case = case._replace(
            parameters=case.parameters._replace(position_eta=np.array([1, 0.3, 0.5, 0.4]))
        )  # none is 0
        alone = Alone(case, quick_jit)
        states = [alone.row(i, alone.fresh(), np.arange(T) < n, np.zeros(T))[1] for i, n in enumerate((6, 9))]
        rng = np.random.default_rng(0)
        cotangent = rng.standard_normal(case.tokens.v.shape)

        def scalar(arguments, valid, reset):
            parameters, tokens, state = arguments
            z, end, _ = scan.run(case.loop, parameters, tokens, state, valid=valid, reset=reset, remat_group=1)
            ends = (jnp.sin(x + jnp.arange(x.size).reshape(x.shape)).sum() for x in jax.tree.leaves(end))
            return (z * cotangent).sum() + sum(ends), (z, end)

        yield case, alone, states, quick_jit(jax.value_and_grad(scalar, has_aux=True, allow_int=True))


def check(problem, valid, reset):
    """Outputs, end state, and along a random direction the gradient of a scalar of both against differences."""
    with jax.enable_x64(True):
        case, alone, states, value_and_gradient = problem
        arguments = case.parameters, poisoned(case.tokens, valid), joined(states)
        (_, actual), gradient = value_and_gradient(arguments, valid, reset)
        assert_equal(actual, alone.rows(states, valid, reset))

        of_tokens = jax.tree.map(lambda g: np.where(valid.reshape(B, T, *[1] * (g.ndim - 2)), 0.0, g), gradient[1])
        assert not any(np.any(g) for g in jax.tree.leaves(of_tokens))  # NaN is not 0 either
        rng = np.random.default_rng(1)
        floats = [i for i, x in enumerate(jax.tree.leaves(arguments)) if x.dtype == np.float64]

        def moved(by):
            leaves, tree = jax.tree.flatten(arguments)
            for i in floats:
                leaves[i] = leaves[i] + by * direction[i]
            return float(value_and_gradient(jax.tree.unflatten(tree, leaves), valid, reset)[0][0])

        direction = [rng.standard_normal(np.shape(x)) for x in jax.tree.leaves(arguments)]
        slope = sum((direction[i] * jax.tree.leaves(gradient)[i]).sum() for i in floats)
        assert slope == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-5, abs=1e-5)


@given(valid=masks, reset=masks, sparse=masks)
@example(PADDED["left and right"], DOCUMENTS["none"], ~DOCUMENTS["none"])
@example(PADDED["in the middle, and a row without tokens"], DOCUMENTS["none"], ~DOCUMENTS["none"])
@example(~DOCUMENTS["none"], DOCUMENTS["3, 1, 1, 4 and each token one"], ~DOCUMENTS["none"])
@example(~DOCUMENTS["none"], DOCUMENTS["at the first token, for more than a mini-batch"], ~DOCUMENTS["none"])
@settings(max_examples=20)
def test_rows_and_documents_are_as_alone(problem, valid, reset, sparse):
    check(problem, valid, reset & sparse)


def test_documents_beside_one_that_decays_to_nothing(problem):
    """Documents of 1, 1 and 2 tokens in one window, the second with a decay that no exponential may be taken of."""
    case, alone, states, value_and_gradient = problem
    gates = {**case.tokens.gates}
    if "log_decay" in gates:
        gates["log_decay"] = gates["log_decay"].copy()
        gates["log_decay"][[0, 1], [3, 4]] = -1e3
    tokens = case.tokens._replace(gates=gates)
    other = case._replace(tokens=tokens), alone.of(tokens), states, value_and_gradient
    check(other, ~DOCUMENTS["none"], bits("0011101000", "0001110100"))


@pytest.fixture(scope="module")
def gated(make_case, quick_jit):
    """The loop with most to remember, and what reads it alone."""
    with jax.enable_x64(True):
        case = make_case(LOOPS["mlp, rates per matrix, decay, two momenta"], T, b, 5, 0.2, np.float64)
        return case, Alone(case, quick_jit)


@given(valid=masks)
@example(PADDED["left and right"])
@example(PADDED["in the middle, and a row without tokens"])
@settings(max_examples=10)
def test_padding_from_the_start_changes_nothing(gated, run_scan, valid):
    """Without a state and without documents: a program of its own, with fewer windows."""
    with jax.enable_x64(True):
        case, alone = gated
        z, state, _ = run_scan(case.loop, case.parameters, poisoned(case.tokens, valid), valid=valid)
        assert_equal((z, state), alone.rows([alone.fresh()] * B, valid, np.zeros((B, T), bool)))


@given(valid=masks, reset=masks, more=masks, lengths=st.permutations([1, 3, 6]))
@settings(max_examples=15)
def test_pieces_cut_anywhere_are_one_go(gated, run_scan, valid, reset, more, lengths):
    with jax.enable_x64(True):
        case, alone = gated
        state, reset, found = joined([alone.fresh()] * B), reset & more, []
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            piece, v, r = jax.tree.map(
                lambda x, end=end, length=length: x[:, end - length : end],
                (poisoned(case.tokens, valid), valid, reset),
            )
            z, state, _ = run_scan(case.loop, case.parameters, piece, state, valid=v, reset=r)
            found.append(z)
        expected = alone.rows([alone.fresh()] * B, valid, reset)
        assert_equal((np.concatenate(found, 1), state), expected)


def test_the_primal_form_knows_padding_and_documents(gated, quick_jit):
    with jax.enable_x64(True):
        (loop, parameters, tokens), alone = gated
        run = quick_jit(functools.partial(primal.run, loop))
        rng = np.random.default_rng(0)
        for density in (0.1, 0.5):
            valid, reset = rng.random((B, T)) < 0.7, rng.random((B, T)) < density
            actual = run(parameters, tokens, joined([alone.fresh()] * B), valid, reset)
            assert_equal(actual, alone.rows([alone.fresh()] * B, valid, reset))


@pytest.mark.parametrize("given_state", [False, True])
def test_statistics_are_those_of_documents_alone(gated, run_scan, given_state):
    """Of a first row with padding, and of a second whose first document begins in an earlier piece."""
    with jax.enable_x64(True):
        (loop, parameters, tokens), alone = gated
        valid = bits("1011111101", "1111111111")
        reset = bits("0000010000", "0110001000")  # documents of 4, 4 tokens; 1, 1, 4, 4
        documents = [[[0, 2, 3, 4], [5, 6, 7, 9]], [[0], [1], [2, 3, 4, 5], [6, 7, 8, 9]]]
        states = [alone.fresh()] * B
        if given_state:
            states[1] = alone.row(0, alone.fresh(), np.arange(T) < 7, np.zeros(T))[1]
        padded = poisoned(tokens, valid)
        found = run_scan(loop, parameters, padded, joined(states), valid=valid, reset=reset, statistics=True)
        for i, row in enumerate(documents):
            for n, document in enumerate(row):
                of_document = jax.tree.map(lambda x, i=i, d=document: x[i : i + 1, np.array(d)], tokens)
                start = states[i] if n == 0 else alone.fresh()
                expected = run_scan(loop, parameters, of_document, start, statistics=True)
                at = jax.tree.map(lambda x, i=i, d=document: x[i : i + 1, np.array(d)], (found.z, found.statistics))
                assert_equal(at, (expected.z, expected.statistics))
        assert not any(x[~valid].any() for x in found.statistics)


ALIGNED = [bits("1000100010", "0000000000"), bits("0000000010", "1000100000"), bits("0000100000", "0000100010")]


@pytest.mark.parametrize("statistics", [False, True])
def test_aligned_is_the_same(gated, run_scan, statistics):
    """From the second mini-batch of one row and the third of the other on, with documents at multiples of b."""
    with jax.enable_x64(True):
        case, alone = gated
        states = joined([alone.row(i, alone.fresh(), np.arange(T) < n, np.zeros(T))[1] for i, n in enumerate((4, 8))])
        for reset in ALIGNED:
            expected = run_scan(*case, states, reset=reset, statistics=statistics)
            assert_equal(run_scan(*case, states, reset=reset, statistics=statistics, aligned=True), expected)
        assert_equal(run_scan(*case, states, aligned=True), run_scan(*case, states))


def test_rows_that_are_not_aligned_as_promised_are_nan(gated, run_scan):
    with jax.enable_x64(True):
        case, alone = gated
        state, everywhere = joined([alone.fresh()] * B), np.ones((B, T), bool)
        expected = run_scan(*case, state, valid=everywhere, reset=ALIGNED[0], aligned=True)
        assert np.isfinite(expected.z).all()
        inside = state._replace(position=np.array([0, 5], np.int32))
        begun = bits("0000000000", "1000000000")
        assert np.isfinite(run_scan(*case, inside, valid=everywhere, reset=begun, aligned=True).z).all()
        for start, valid, reset in (
            (state, everywhere, ALIGNED[0] | bits("0000000000", "0000010000")),
            (state, bits("1111111111", "1111111110"), ALIGNED[0]),
            (inside, everywhere, ALIGNED[0]),
        ):
            z, end, _ = run_scan(*case, start, valid=valid, reset=reset, aligned=True)
            np.testing.assert_array_equal(z[0], expected.z[0])
            assert np.isnan(z[1]).all()
            assert all(np.isnan(w[1]).all() and np.isfinite(w[0]).all() for w in jax.tree.leaves(end.weights))


class Kernel:
    """Read whole mini-batches as the scan does, in place of a fused kernel, and keep what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, loop, parameters, weights, tokens, restarts=None):
        batch, length = tokens.eta.shape[:2]
        self.calls.append((length, None if restarts is None else restarts.shape))
        state = initial_state(parameters.w0, batch)._replace(weights=weights)
        reset = None if restarts is None else jnp.zeros((batch, length), bool).at[:, ::b].set(restarts)
        z, end, _ = scan.run(loop, parameters, tokens, state, reset=reset, aligned=True)
        return z, end.weights


@pytest.fixture(scope="module")
def whole_mini_batches(make_case, quick_jit):
    """TTT-Linear at 18 tokens, and a function with its gradients, compiled for each structure of its arguments."""
    loop, *arguments = make_case(1, 18, b, 2)
    cotangent = np.random.default_rng(0).standard_normal(arguments[1].q.shape)

    def scalar(arguments, state, masks, aligned, kernel):
        z, end, _ = scan.run(loop, *arguments, state, **masks, aligned=aligned, kernel=kernel)
        return (z * cotangent).sum() + sum(jnp.sin(x).sum() for x in jax.tree.leaves(end.weights)), (z, end)

    return arguments, quick_jit(jax.value_and_grad(scalar, has_aux=True), static_argnums=(3, 4))


RAGGED = np.arange(18) < np.array([[7], [18]])
PADDING = {
    "none": [{}],
    "some": [{"valid": RAGGED}, {"valid": RAGGED[:, ::-1]}, {"valid": np.array([[True], [False]]) & RAGGED[1:]}],
}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("given_state", [False, True])
def test_whole_mini_batches_go_to_a_kernel(whole_mini_batches, assert_close, given_state, padding):
    """From the start or places of a mini-batch; with padding at the end, in front, and of a whole row."""
    arguments, value_and_gradient = whole_mini_batches
    state, kernel = None, Kernel()
    for masks, places in itertools.product(PADDING[padding], ([0, 0], [3, 1]) if given_state else ([0, 0],)):
        if given_state:
            state = initial_state(arguments[0].w0, 2)._replace(position=np.array(places, np.int32))
            state = state._replace(pending=where(state.position > 0, state.weights, state.pending))
        expected = value_and_gradient(arguments, state, masks, False, None)
        assert_close(value_and_gradient(arguments, state, masks, False, kernel), expected)
    assert kernel.calls == [(20 if given_state or padding == "some" else 16, None)]  # also those not whole, at rate 0


def test_a_kernel_gets_a_flag_for_each_mini_batch_that_begins_a_document(whole_mini_batches, assert_close):
    arguments, value_and_gradient = whole_mini_batches
    reset = np.zeros((2, 18), bool)
    reset[0, [0, 8, 16]] = reset[1, 4] = True
    state, kernel = initial_state(jax.tree.map(lambda w: 2 * w, arguments[0].w0), 2), Kernel()
    expected = value_and_gradient(arguments, state, {"reset": reset}, True, None)
    assert_close(value_and_gradient(arguments, state, {"reset": reset}, True, kernel), expected)
    assert kernel.calls == [(16, (2, 4))]
    jax.eval_shape(lambda *a: scan.run(ttt_mlp(6, depth=1), *a, reset=reset, kernel=kernel), *arguments, state)
    assert len(kernel.calls) == 1  # documents may begin anywhere: not by a kernel
