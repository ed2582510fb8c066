"""Test rows of different lengths, with padding anywhere and documents that begin anywhere.

Each document must give what it gives when it is read alone: token after token in the primal form, which knows of no
other row or document. Padding holds NaN.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ttt_jax.ttt import learners, objective, primal, scan, update
from ttt_jax.ttt.inner_loop import READINGS, InnerLoop, initial_state
from ttt_jax.ttt.learner import Learner
from ttt_jax.ttt.learners import MLP, Linear, ResidualNorm, SwiGLU
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Decay, Momentum, Muon, Renormalise

B, T, b = 2, 10, 4
LOOPS = {
    "linear": InnerLoop(Learner(ResidualNorm(Linear()), 4)),
    "linear, decay, two momenta": InnerLoop(
        Learner(ResidualNorm(Linear()), 4), update=(Momentum(), Decay(), Momentum(average=False))
    ),
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


# Gradients take long to compile. The fast tests read every causal update with a learner of one matrix, and the largest
# state without gradients in the test of pieces; test_choices.py has gradients of every member.
FAST = ["linear, decay, two momenta"]


def test_these_loops_have_every_choice():
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
    """Reads row after row and document after document, in steps of one token."""

    def __init__(self, case, jit):
        self._loop, self._parameters, self._tokens = case
        self._step = jit(functools.partial(primal.run, case.loop))

    def of(self, tokens):
        """Return a reader of other tokens, without compiling anything."""
        other = copy.copy(self)
        other._tokens = tokens
        return other

    def fresh(self):
        return initial_state(self._parameters.w0, 1, self._loop.update)

    def row(self, i, state, valid, reset):
        """Return z of the valid tokens, 0 elsewhere, and the state after the last token."""
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


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in LOOPS]
)
def problem(request, make_case, quick_jit):
    """Provide a case, its reader, states inside a mini-batch, and a function with its gradients, compiled once."""
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
    """Check outputs and end state, and the gradient of a scalar of both along a random direction by differences."""
    with jax.enable_x64(True):
        case, alone, states, value_and_gradient = problem
        arguments = case.parameters, poisoned(case.tokens, valid), joined(states)
        (_, actual), gradient = value_and_gradient(arguments, valid, reset)
        assert_equal(actual, alone.rows(states, valid, reset))

        of_tokens = jax.tree.map(lambda g: np.where(valid.reshape(B, T, *[1] * (g.ndim - 2)), 0.0, g), gradient[1])
        assert not any(np.any(g) for g in jax.tree.leaves(of_tokens))  # fails at NaN too
        rng = np.random.default_rng(1)
        floats = [i for i, x in enumerate(jax.tree.leaves(arguments)) if x.dtype == np.float64]

        def moved(by):
            leaves, tree = jax.tree.flatten(arguments)
            for i in floats:
                leaves[i] = leaves[i] + by * direction[i]
            return float(value_and_gradient(jax.tree.unflatten(tree, leaves), valid, reset)[0][0])

        direction = [rng.standard_normal(np.shape(x)) for x in jax.tree.leaves(arguments)]
        slope = sum((direction[i] * jax.tree.leaves(gradient)[i]).sum() for i in floats)
        # Newton-Schulz bends sharply at small gradients: with steps of 1e-6 the difference is wrong by 2e-5.
        assert slope == pytest.approx((moved(1e-7) - moved(-1e-7)) / 2e-7, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@given(valid=masks, reset=masks, sparse=masks)
@example(PADDED["left and right"], DOCUMENTS["none"], ~DOCUMENTS["none"])
@example(PADDED["in the middle, and a row without tokens"], DOCUMENTS["none"], ~DOCUMENTS["none"])
@example(~DOCUMENTS["none"], DOCUMENTS["3, 1, 1, 4 and each token one"], ~DOCUMENTS["none"])
@example(~DOCUMENTS["none"], DOCUMENTS["at the first token, for more than a mini-batch"], ~DOCUMENTS["none"])
@settings(max_examples=20)
def test_documents_in_rows_equal_documents_alone(problem, valid, reset, sparse):
    check(problem, valid, reset & sparse)


def test_document_that_decays_to_nothing_leaves_its_neighbours(problem):
    """Read documents of 1, 1 and 2 tokens in one window; the inverse of the decay of the second overflows."""
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
    """Provide a linear case with gates and momenta, and its reader."""
    with jax.enable_x64(True):
        case = make_case(LOOPS["linear, decay, two momenta"], T, b, 5, 0.2, np.float64)
        return case, Alone(case, quick_jit)


@given(valid=masks)
@example(PADDED["left and right"])
@example(PADDED["in the middle, and a row without tokens"])
@settings(max_examples=5)
def test_padding_from_the_start_changes_nothing(gated, run_scan, valid):
    """Read without a state and without documents, which is another program, with fewer windows."""
    with jax.enable_x64(True):
        case, alone = gated
        z, state, _ = run_scan(case.loop, case.parameters, poisoned(case.tokens, valid), valid=valid)
        assert_equal((z, state), alone.rows([alone.fresh()] * B, valid, np.zeros((B, T), bool)))


@pytest.fixture(scope="module")
def deep(make_case, quick_jit):
    """Provide the case with the largest state, and its reader."""
    with jax.enable_x64(True):
        case = make_case(LOOPS["mlp, rates per matrix, decay, two momenta"], T, b, 5, 0.2, np.float64)
        return case, Alone(case, quick_jit)


@given(valid=masks, reset=masks, more=masks, lengths=st.sampled_from([[1, 9], [9, 1]]))
@settings(max_examples=4)
def test_documents_in_pieces_equal_documents_alone(deep, run_scan, valid, reset, more, lengths):
    with jax.enable_x64(True):
        case, alone = deep
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


def test_primal_form_reads_padding_and_documents(gated, quick_jit):
    with jax.enable_x64(True):
        (loop, parameters, tokens), alone = gated
        run = quick_jit(functools.partial(primal.run, loop))
        rng = np.random.default_rng(0)
        for density in (0.1, 0.5):
            valid, reset = rng.random((B, T)) < 0.7, rng.random((B, T)) < density
            actual = run(parameters, tokens, joined([alone.fresh()] * B), valid, reset)
            assert_equal(actual, alone.rows([alone.fresh()] * B, valid, reset))


@pytest.mark.slow
@pytest.mark.parametrize("given_state", [pytest.param(False, marks=pytest.mark.slow), True])
def test_statistics_equal_those_of_documents_alone(gated, run_scan, given_state):
    """Read a first row with padding, and a second row whose first document may begin in an earlier piece."""
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


@pytest.mark.slow
@pytest.mark.parametrize("statistics", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_aligned_changes_nothing(gated, run_scan, statistics):
    """Read from the second mini-batch of one row and the third of the other, with documents at multiples of b."""
    with jax.enable_x64(True):
        case, alone = gated
        states = joined([alone.row(i, alone.fresh(), np.arange(T) < n, np.zeros(T))[1] for i, n in enumerate((4, 8))])
        for reset in ALIGNED:
            expected = run_scan(*case, states, reset=reset, statistics=statistics)
            assert_equal(run_scan(*case, states, reset=reset, statistics=statistics, aligned=True), expected)
        assert_equal(run_scan(*case, states, aligned=True), run_scan(*case, states))


def test_rows_that_break_the_promise_of_aligned_are_nan(gated, run_scan):
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
