"""The dual form against the primal form, which takes its gradients by autodiff and forms every W_t."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_jax.ttt import dual, primal, scan
from ttt_jax.ttt.learner import Dense, LayerNormParams, Learner
from ttt_jax.ttt.state import initial_state

# depth, T, b: with a partial mini-batch at the end, online, one batch, and less than one mini-batch
SHAPES = [(1, 7, 3), (1, 5, 1), (1, 4, 4), (1, 3, 8), (2, 7, 3), (2, 4, 4), (3, 7, 3), (3, 5, 1)]
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("depth", "tokens", "b"), SHAPES)
@given(seed=SEEDS, rate=st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=15)
def test_outputs_and_state_are_those_of_the_primal_form(
    make_case, run_scan, run_primal, assert_close, depth, tokens, b, seed, rate
):
    case = make_case(depth, tokens, b, seed, rate)
    z, state, _ = run_scan(*case)
    expected_z, expected_state = run_primal(case.learner, case.norm, initial_state(case.w0, 2), *case[3:])
    assert_close(z, expected_z, 1e-4)
    assert_close(state, expected_state, 1e-4)
    assert state.position == tokens


@pytest.mark.parametrize("depth", [1, 2])
@given(seed=SEEDS)
@settings(max_examples=15)
def test_the_bare_learner(make_case, run_scan, run_primal, assert_close, depth, seed):
    """Without LN, residual and biases."""
    case = make_case(depth, 7, 3, seed, 0.05)
    bare = dataclasses.replace(case.learner, norm_residual=False, bias=False)
    case = case._replace(learner=bare, w0=tuple(Dense(layer.weight, None) for layer in case.w0))
    z, state, _ = run_scan(*case)
    expected_z, expected_state = run_primal(case.learner, case.norm, initial_state(case.w0, 2), *case[3:])
    assert_close(z, expected_z, 1e-4)
    assert_close(state, expected_state, 1e-4)


def test_the_inner_steps_of_these_cases_matter(make_case, run_scan):
    """The comparison above would be empty if the learning rates were too small to be seen."""
    case = make_case(1, 7, 3)
    still = run_scan(*case._replace(token_eta=0 * case.token_eta)).z
    assert np.abs(run_scan(*case).z - still).max() > 0.1


@pytest.mark.parametrize(("depth", "tokens", "b"), [(1, 5, 2), (2, 4, 2), (3, 4, 2)])
def test_gradients_are_those_of_the_primal_form(make_case, quick_jit, assert_close, depth, tokens, b):
    """Of a scalar of z, with respect to w0, norm, q, k, v, token_eta and position_eta."""
    case = make_case(depth, tokens, b)
    cotangent = np.random.default_rng(1).standard_normal(case.q.shape).astype(np.float32)

    def of_dual(norm, w0, *rest):
        return (scan.run(case.learner, norm, w0, *rest).z * cotangent).sum()

    def of_primal(norm, w0, *rest):
        return (primal.run(case.learner, norm, initial_state(w0, 2), *rest)[0] * cotangent).sum()

    arguments = case[1:]
    actual, expected = (quick_jit(jax.grad(f, range(len(arguments))))(*arguments) for f in (of_dual, of_primal))
    assert_close(actual, expected, 1e-4)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(expected))


def test_hand_written_back_propagation_is_that_of_autodiff(make_case, quick_jit, assert_close):
    """G of every layer: the gradient with respect to a perturbation of that layer's outputs."""
    case = make_case(3, 4, 4)
    k, v = (x.swapaxes(1, 2) for x in (case.k, case.v))
    weights = initial_state(case.w0, 2).weights

    def total_loss(perturbations):
        moved = tuple(Dense(layer.weight, layer.bias + p) for layer, p in zip(weights, perturbations, strict=True))
        return dual.learner_lib.loss(case.learner, case.norm, moved, k, v).sum()

    zeros = tuple(np.zeros((2, 2, 4, n), np.float32) for n in case.learner.widths[1:])
    forward_backward = quick_jit(dual.forward_backward, static_argnums=0)
    token_eta = case.token_eta.swapaxes(1, 2)[..., None]
    scaled = forward_backward(case.learner, case.norm, weights, k, v, token_eta).scaled
    assert_close(scaled, tuple(token_eta * g for g in quick_jit(jax.grad(total_loss))(zeros)))


def test_theorem_1_batch_gradient_descent_is_linear_attention(assert_close):
    """Linear learner without LN, residual and bias, W0 = 0, b = T. The paper's loss has no 1/2, so its eta = 1/2 is
    our eta = 1. Then z_t = sum over s <= t of v_s (k_s . q_t)."""
    tokens, width = 9, 4
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, tokens, 3, width))
    learner = Learner((width, width), norm_residual=False, bias=False)
    norm = LayerNormParams(np.ones((3, 1, width), np.float32), np.zeros((3, 1, width), np.float32))
    w0 = (Dense(np.zeros((3, width, width), np.float32), None),)
    ones = np.ones((2, tokens, 3), np.float32)
    inputs = (x.astype(np.float32) for x in (q, k, v))
    result = scan.run(learner, norm, w0, *inputs, ones, np.ones(tokens, np.float32))

    expected = np.zeros_like(q)
    for t in range(tokens):
        for s in range(t + 1):
            expected[:, t] += v[:, s] * (k[:, s] * q[:, t]).sum(-1, keepdims=True)
    assert_close(result.z, expected, 1e-6)
    assert_close(result.state.weights[0].weight, np.einsum("bthi,bthj->bhij", k, v), 1e-6)
