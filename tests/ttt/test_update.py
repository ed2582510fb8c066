"""Test the members of an update against NumPy in float64, and the chains that are refused."""

import functools

import jax
import numpy as np
import pytest

from ttt_jax.ttt import scan
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens
from ttt_jax.ttt.learner import Affine, Learner
from ttt_jax.ttt.learners import Linear
from ttt_jax.ttt.objective import dot_product
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Decay, Momentum, Muon, Renormalise, orthogonalise

POLYNOMIALS = (  # a x + b x^3 + c x^5 of each singular value, as LaCT's specification has them
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
SHAPES = [(2, 8), (8, 2), (3, 4, 4), (3, 8, 2)]
LOWEST, HIGHEST = 0.977, 1.032  # singular values at the end


def through_polynomials(singular_values):
    x = singular_values
    for a, b, c in POLYNOMIALS:
        x = a * x + b * x**3 + c * x**5
    return x


def by_svd(g):
    """Compute Newton-Schulz by its polynomials of the singular values."""
    g = np.asarray(g, np.float64)
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = through_polynomials(s / (np.sqrt((s**2).sum(-1, keepdims=True)) + 1e-7))
    return (u * s[..., None, :]) @ vt


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class TestNewtonSchulz:
    def test_singular_values_above_a_hundredth_of_the_norm_end_near_1(self):
        end = through_polynomials(np.linspace(0.01, 1, 100_000))
        assert LOWEST < end.min() < end.max() < HIGHEST

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_orthogonalise_equals_polynomials_of_singular_values_at_any_scale(self, shape, assert_close):
        """Check stacks too, in which one matrix is a hundred times as large as another."""
        g = draw(shape)
        if len(shape) == 3:
            g *= np.float32([1, 10, 100])[:, None, None]
        found = orthogonalise(g)
        assert_close(found, by_svd(g), 1e-5)
        s = np.linalg.svd(np.asarray(found, np.float64), compute_uv=False)
        assert np.all((s > LOWEST) & (s < HIGHEST))
        for scale in (1e9, 1e-3):
            assert_close(orthogonalise(np.float32(scale) * g), found, 1e-3 if scale < 1 else 1e-5)

    def test_each_matrix_of_a_stack_is_orthogonalised_alone(self, assert_close):
        g = draw((3, 2, 8))
        for i in range(3):
            assert_close(orthogonalise(g)[i], orthogonalise(g[i]), 1e-6)

    @pytest.mark.parametrize("shape", [(2, 8), (8, 2)], ids=str)
    def test_zeros_stay_zeros_with_finite_gradients(self, quick_jit, shape):
        value, gradient = quick_jit(value_and_gradient)(np.zeros(shape, np.float32), draw(shape))
        assert not value.any()
        assert np.isfinite(gradient).all()

    def test_zeros_in_a_stack_leave_the_gradients_of_the_others(self, quick_jit, assert_close):
        g, cotangent = draw((3, 4, 4)), draw((3, 4, 4), seed=1)
        others = quick_jit(value_and_gradient)(g, cotangent)[1][::2]
        g[1] = 0
        gradient = quick_jit(value_and_gradient)(g, cotangent)[1]
        assert np.isfinite(gradient).all()
        assert_close(gradient[::2], others, 1e-6)


def value_and_gradient(g, cotangent):
    value, pullback = jax.vjp(orthogonalise, g)
    return value, pullback(cotangent)[0]


def affine(d_in, d_out, seed, batch=(2, 2)):
    return Affine(draw((*batch, d_in, d_out), seed), draw((*batch, 1, d_out), seed + 1))


def renormalised(w, w0):
    w, w0 = np.asarray(w, np.float64), np.asarray(w0, np.float64)
    norm, norm0 = (np.sqrt((x**2).sum(-2, keepdims=True)) for x in (w, w0))
    return w / (norm + 1e-5) * norm0


class TestRenormalise:
    def test_after_each_step_features_have_the_norms_of_w0(self, assert_close):
        w, w0 = (affine(5, 3, 0),), (affine(5, 3, 10),)
        member = Renormalise()
        (settled,) = member.settle(w, w0)
        assert_close(settled.weight, renormalised(w[0].weight, w0[0].weight), 1e-6)
        np.testing.assert_array_equal(settled.bias, w[0].bias)
        assert member.weights(w, w0) is w

    def test_before_use_changes_the_used_weights_alone(self, assert_close):
        w, w0 = (affine(5, 3, 0),), (affine(5, 3, 10, batch=(2,)),)  # W0 of all sequences
        member = Renormalise(before_use=True)
        (used,) = member.weights(w, w0)
        assert_close(used.weight, renormalised(w[0].weight, w0[0].weight), 1e-6)
        np.testing.assert_array_equal(used.bias, w[0].bias)
        assert member.settle(w, w0) is w

    def test_before_the_first_step_w0_is_used_unchanged(self):
        """Check features of small norm, for which norm / (norm + 1e-5) is far from 1."""
        w0 = (Affine(1e-4 * draw((2, 5, 3)), None),)
        w = jax.tree.map(lambda x: np.broadcast_to(x, (4, *x.shape)), w0)
        np.testing.assert_array_equal(Renormalise(before_use=True).weights(w, w0)[0].weight, w[0].weight)

    @pytest.mark.parametrize("before_use", [False, True])
    def test_gradients_are_finite_where_features_are_zero(self, quick_jit, before_use):
        """Check a feature that is zero in W, one in W0, and one in both."""
        w, w0, cotangent = draw((5, 4)), draw((5, 4), 1), draw((5, 4), 2)
        w[:, [0, 2]] = w0[:, [1, 2]] = 0
        member = Renormalise(before_use)

        def total(w, w0):
            w, w0 = (Affine(w, None),), (Affine(w0, None),)
            return (member.settle(member.weights(w, w0), w0)[0].weight * cotangent).sum()

        assert all(np.isfinite(g).all() for g in quick_jit(jax.grad(total, (0, 1)))(w, w0))


def problem(tokens=9, b=4, d_k=4, d_v=3):
    """Draw one sequence and one head for a linear learner with a bias."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    parameters = Parameters(
        (Affine(normal(1, d_k, d_v), normal(1, 1, d_v)),), {}, np.linspace(0.5, 1, b, dtype=np.float32)
    )
    gates = {"momentum": rng.random((1, tokens, 1)), "log_decay": -rng.random((1, tokens, 1))}
    return parameters, Tokens(
        normal(1, tokens, 1, d_k),
        normal(1, tokens, 1, d_k),
        normal(1, tokens, 1, d_v),
        rng.random((1, tokens, 1)).astype(np.float32),
        {name: x.astype(np.float32) for name, x in gates.items()},
    )


def loop_with(*chain):
    learner = Learner(Linear(features_out=3), 4)
    return InnerLoop(learner, dot_product, Rate(), chain, "previous")


def by_numpy(parameters, tokens, *, decay=False, average=True, muon=False, before_use=False):
    """Loop over mini-batches of a linear learner with the dot product: gradients are -k v^T and -v at any W."""
    (w0, c0), p = (np.asarray(x[0], np.float64) for x in parameters.w0[0]), parameters.position_eta
    q, k, v, eta = (np.asarray(x[0, :, 0], np.float64) for x in tokens[:4])
    mu, log_decay = (np.asarray(tokens.gates[name][0, :, 0], np.float64) for name in ("momentum", "log_decay"))
    w, c, m, n, z = w0, c0[0], np.zeros_like(w0), np.zeros_like(c0[0]), []
    for start in range(0, len(q), len(p)):
        t = slice(start, start + len(p))
        used = renormalised(w, w0) if before_use and start else w
        z.append(q[t] @ used + c)
        since = np.exp(np.cumsum(log_decay[t][::-1])[::-1] - log_decay[t]) if decay else np.ones(len(q[t]))
        rate = eta[t] * since
        memory = mu[t].mean() if average else mu[t][-1]
        m, n = memory * m - (k[t].T * rate) @ v[t], memory * n - rate @ v[t]
        factor = np.exp(log_decay[t].sum()) if decay else 1.0
        w, c = factor * w - p[-1] * (by_svd(m) if muon else m), factor * c - p[-1] * n
        if not before_use:
            w = renormalised(w, w0)
    return np.concatenate(z)


CHAINS = {
    "momentum_per_token": ((Momentum(average=False), Renormalise()), {"average": False}),
    "all_members": ((Decay(), Momentum(), Muon(), Renormalise()), {"decay": True, "muon": True}),
    "all_members_before_use": (
        (Decay(), Momentum(), Muon(), Renormalise(before_use=True)),
        {"decay": True, "muon": True, "before_use": True},
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_equals_a_loop_over_mini_batches(name, quick_jit, assert_close):
    parameters, tokens = problem()
    chain, what = CHAINS[name]
    z = quick_jit(functools.partial(scan.run, loop_with(*chain)))(parameters, tokens).z
    assert_close(z[0, :, 0], by_numpy(parameters, tokens, **what), 1e-5)


@pytest.mark.parametrize("place", [4, 7])
def test_reading_previous_hides_a_mini_batch_from_itself(quick_jit, place):
    """Check that a changed key and value affect the next mini-batch, and a changed query its own output alone."""
    parameters, tokens = problem()
    run = quick_jit(functools.partial(scan.run, loop_with(Momentum(), Muon(), Renormalise())))

    def changed(x):
        x = np.array(x)
        x[:, place] += 1
        return x

    before = run(parameters, tokens).z[0, :, 0]
    written = tokens._replace(k=changed(tokens.k), v=changed(tokens.v), eta=changed(tokens.eta))
    after = run(parameters, written).z[0, :, 0]
    np.testing.assert_array_equal(after[:8], before[:8])
    assert np.abs(after[8] - before[8]).max() > 1e-2
    asked = run(parameters, tokens._replace(q=changed(tokens.q))).z[0, :, 0]
    assert (asked != before).any(-1).tolist() == [t == place for t in range(9)]


def test_reading_causal_names_members_that_are_not_linear():
    with pytest.raises(ValueError, match="muon and renormalise is not linear"):
        InnerLoop(Learner(Linear(), 4), update=(Momentum(), Muon(), Renormalise()))


def test_missing_gate_of_momentum_is_an_error():
    parameters, tokens = problem()
    with pytest.raises(ValueError, match=r"Momentum reads the gate momentum of each token; given are \[\]"):
        scan.run(loop_with(Momentum()), parameters, tokens._replace(gates=None))
