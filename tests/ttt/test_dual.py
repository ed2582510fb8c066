"""Test the dual form against the primal form, which takes its gradients by autodiff and forms every W_t."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_jax.ttt import dual, learners, objective, primal, scan, update
from ttt_jax.ttt.inner_loop import InnerLoop, initial_state
from ttt_jax.ttt.learner import Affine, Dense, Learner
from ttt_jax.ttt.learners import MLP, Linear, ResidualNorm, SwiGLU
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Decay, Momentum, Muon, Renormalise

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# depth, T, b: with a partial mini-batch at the end, mini-batches of one token, a single one, and less than one
SHAPES = [(1, 5, 1), (1, 3, 8), (3, 7, 3)]
SHAPES += [slow(*shape) for shape in [(1, 7, 3), (1, 4, 4), (2, 4, 4), (2, 7, 3), (3, 5, 1)]]
SEEDS = st.integers(0, 2**32 - 1)


def gated(dense, x):
    """Compute a learner with parameters of the outer loop, a norm and a skip connection between two matrices."""
    d = x.shape[-1]
    hidden = learners.normalise(dense(x, d + 1, bias=False)) * dense.param("gain", (d + 1,))
    return x * dense.param("skip") + dense(jax.nn.silu(hidden), d)


PER_MATRIX = Rate(per_matrix=True)
LOOPS = {
    "linear, decay": InnerLoop(Learner(ResidualNorm(Linear()), 6), update=(Decay(),)),
    "linear without bias, decay": InnerLoop(Learner(Linear(bias=False, features_out=4), 6), update=(Decay(),)),
    "linear, dot product, momentum of the last token": InnerLoop(
        Learner(ResidualNorm(Linear()), 6), objective.dot_product, update=(Momentum(average=False),)
    ),
    "mlp, rates per matrix, momentum, fixed decay": InnerLoop(
        Learner(ResidualNorm(MLP(2, 1.5)), 6), rate=PER_MATRIX, update=(Momentum(), Decay(0.9))
    ),
    "mlp, previous": InnerLoop(Learner(ResidualNorm(MLP(2, 1.5)), 6), reading="previous"),
    "swiglu": InnerLoop(Learner(ResidualNorm(SwiGLU(1.5)), 6)),
    "swiglu, dot product, rates per matrix, decay, two momenta": InnerLoop(
        Learner(SwiGLU(1.5, False), 6),
        objective.dot_product,
        PER_MATRIX,
        (Momentum(), Decay(), Momentum(average=False)),
    ),
    "swiglu, previous, decay": InnerLoop(
        Learner(SwiGLU(1.5, features_out=3), 6), update=(Decay(),), reading="previous"
    ),
    "swiglu, previous, LaCT": InnerLoop(
        Learner(SwiGLU(1.5, False), 6),
        objective.dot_product,
        PER_MATRIX,
        (Momentum(), Muon(), Renormalise()),
        "previous",
    ),
    "linear, previous, renormalised before use": InnerLoop(
        Learner(ResidualNorm(Linear()), 6), update=(Momentum(), Renormalise(before_use=True)), reading="previous"
    ),
    "a user's own": InnerLoop(Learner(ResidualNorm(gated), 6), rate=PER_MATRIX),
    "a user's own, momentum": InnerLoop(Learner(gated, 6), update=(Momentum(),)),
}
# Every name of a registry is compared in test_choices.py; these are combinations of several choices.
QUICK = [
    "linear without bias, decay",
    "swiglu, dot product, rates per matrix, decay, two momenta",
]


@pytest.mark.parametrize(("depth", "tokens", "b"), SHAPES)
@given(seed=SEEDS, rate=st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=4)
def test_outputs_and_state_equal_the_primal_form(
    make_case, run_scan, run_primal, assert_close, depth, tokens, b, seed, rate
):
    case = make_case(depth, tokens, b, seed, rate)
    z, state, _ = run_scan(*case)
    expected_z, expected_state = run_primal(*case, initial_state(case.parameters.w0, 2))
    assert_close(z, expected_z, 1e-4)
    assert_close(state, expected_state, 1e-4)
    assert state.position.tolist() == [tokens, tokens]


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in LOOPS])
@given(seed=SEEDS, first=st.sampled_from([0, 4]))
@settings(max_examples=4)
def test_every_choice_equals_the_primal_form_in_float64(make_case, run_scan, run_primal, name, seed, first):
    """Read the tokens at once, or in two pieces cut inside a mini-batch, with a partial mini-batch at the end."""
    with jax.enable_x64(True):
        loop, parameters, tokens = case = make_case(LOOPS[name], 8, 3, seed, 0.2, np.float64)
        start = initial_state(parameters.w0, 2, loop.update)
        expected = run_primal(*case, start)
        if first:
            before, after = (jax.tree.map(lambda x, s=s: x[:, s], tokens) for s in (slice(first), slice(first, None)))
            one = run_scan(loop, parameters, before, start)
            two = run_scan(loop, parameters, after, one.state)
            actual = jnp.concatenate([one.z, two.z], axis=1), two.state
        else:
            actual = run_scan(*case)[:2]
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * max(1, np.abs(y).max(initial=0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["swiglu, dot product, rates per matrix, decay, two momenta", "swiglu, previous, LaCT"]
)
def test_gradients_of_every_choice_equal_the_primal_form(make_case, quick_jit, name):
    """Compare gradients of a scalar of z with respect to all parameters, tokens, rates and gates, in float64."""
    with jax.enable_x64(True):
        loop, parameters, tokens = make_case(LOOPS[name], 8, 3, 1, 0.2, np.float64)
        cotangent = np.random.default_rng(1).standard_normal(tokens.v.shape)

        def of_dual(*arguments):
            return (scan.run(loop, *arguments).z * cotangent).sum()

        def of_primal(parameters, tokens):
            return (
                primal.run(loop, parameters, tokens, initial_state(parameters.w0, 2, loop.update))[0] * cotangent
            ).sum()

        actual, expected = (quick_jit(jax.grad(f, (0, 1)))(parameters, tokens) for f in (of_dual, of_primal))
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-7 * max(1, np.abs(y).max()))
            assert np.abs(y).max() > 1e-4


def test_inner_steps_of_these_cases_change_the_outputs(make_case, run_scan):
    """Check that the comparisons above are not empty because learning rates are too small."""
    case = make_case(1, 7, 3)
    still = run_scan(*case[:2], case.tokens._replace(eta=0 * case.tokens.eta)).z
    assert np.abs(run_scan(*case).z - still).max() > 0.1


@pytest.mark.parametrize(("depth", "tokens", "b"), [slow(1, 5, 2), slow(2, 4, 2), slow(3, 4, 2)])
def test_gradients_equal_the_primal_form(make_case, quick_jit, assert_close, depth, tokens, b):
    """Compare gradients of a scalar of z with respect to w0, norm, q, k, v, token_eta and position_eta.

    The tests of test_choices.py compare gradients, too, and are not slow.
    """
    loop, *arguments = make_case(depth, tokens, b)
    cotangent = np.random.default_rng(1).standard_normal(arguments[1].q.shape).astype(np.float32)

    def of_dual(parameters, tokens):
        return (scan.run(loop, parameters, tokens).z * cotangent).sum()

    def of_primal(parameters, tokens):
        return (primal.run(loop, parameters, tokens, initial_state(parameters.w0, 2))[0] * cotangent).sum()

    actual, expected = (quick_jit(jax.grad(f, (0, 1)))(*arguments) for f in (of_dual, of_primal))
    assert_close(actual, expected, 1e-4)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(expected))


@pytest.mark.parametrize("name", ["mlp", "swiglu"])
def test_gradient_of_a_pass_is_the_gradient_of_the_losses(make_case, quick_jit, assert_close, name):
    """Compare X^T (eta * G) of each matrix with the gradient of the losses, each weighted by its rate."""
    loop = InnerLoop(Learner(ResidualNorm(MLP(3, 1.5) if name == "mlp" else SwiGLU(1.5)), 6))
    _, (w0, constants, _), tokens = make_case(loop, 4, 4)
    weights = initial_state(w0, 2).weights
    q, k, v = (x.swapaxes(1, 2) for x in tokens[:3])
    by_head = tokens._replace(q=q, k=k, v=v, eta=tokens.eta.swapaxes(1, 2)[..., None])

    def total_loss(weights):
        return (by_head.eta[..., 0] * loop.objective(loop.learner.f(Dense(weights, constants), k), v)).sum()

    def step(weights):
        start = dual.Start(weights, None, ())
        return dual.gradient(loop, dual.pass_over_keys(loop, constants, start, by_head))

    assert_close(quick_jit(step)(weights), quick_jit(jax.grad(total_loss))(weights))


def test_reading_previous_hides_the_mini_batch_of_a_token_and_later_ones(make_case, run_scan):
    loop, parameters, tokens = make_case(LOOPS["swiglu, previous, LaCT"], 8, 3)
    z = run_scan(loop, parameters, tokens).z
    moved = run_scan(loop, parameters, tokens._replace(k=tokens.k.copy(), v=1 * tokens.v))
    np.testing.assert_array_equal(moved.z, z)
    k = tokens.k.copy()
    k[:, 4] += 1  # the second token of the second mini-batch
    other = run_scan(loop, parameters, tokens._replace(k=k)).z
    np.testing.assert_array_equal(other[:, :6], z[:, :6])
    assert np.abs(other[:, 6:] - z[:, 6:]).min(axis=(0, 2, 3)).max() > 1e-4


def test_reading_causal_refuses_updates_that_are_not_linear():
    for chain in ((Muon(),), (Momentum(), Renormalise())):
        with pytest.raises(ValueError, match=r"is not linear in the gradients.*expected the reading 'previous'"):
            InnerLoop(Learner(Linear(), 6), update=chain)
        InnerLoop(Learner(Linear(), 6), update=chain, reading="previous")
    with pytest.raises(ValueError, match="decay twice"):
        InnerLoop(Learner(Linear(), 6), update=(Decay(), Decay(0.9)))
    with pytest.raises(ValueError, match="reading 'next': expected one of causal, previous"):
        InnerLoop(Learner(Linear(), 6), reading="next")


def test_missing_gate_of_decay_is_an_error(make_case):
    loop, parameters, tokens = make_case(LOOPS["linear, decay"], 4, 2)
    with pytest.raises(ValueError, match="Decay reads the gate log_decay of each token; given are \\[\\]"):
        scan.run(loop, parameters, tokens._replace(gates=None))


def test_parse_returns_the_chain_of_a_text():
    assert update.parse("sgd") == ()
    assert update.parse("momentum + muon+renormalise") == (Momentum(), Muon(), Renormalise())
    assert update.parse("decay=0.9 + momentum_per_token") == (Decay(0.9), Momentum(average=False))
    assert update.parse("renormalise_before_use") == (Renormalise(before_use=True),)
    for text in ("", "adam", "sgd + muon", "decay=0", "decay=1.5", "decay=1.2.3", "momentum(0.9)"):
        with pytest.raises(ValueError, match="is no update; expected sgd, or some of decay, momentum"):
            update.parse(text)


def test_each_sequence_may_have_its_own_w0(make_case, run_scan, assert_close):
    """Check that W0 may be [B, H, ...]."""
    loop, parameters, tokens = make_case(2, 7, 3)
    own = jax.tree.map(lambda w: np.stack([w, 2 * w]), parameters.w0)
    both = run_scan(loop, parameters._replace(w0=own), tokens)
    for i in range(2):
        w0 = tuple(Affine(*(x[i] for x in affine)) for affine in own)
        alone = run_scan(loop, parameters._replace(w0=w0), jax.tree.map(lambda x, i=i: x[i : i + 1], tokens))
        assert_close(both.z[i : i + 1], alone.z)
