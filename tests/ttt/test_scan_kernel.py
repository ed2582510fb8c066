"""Test that whole mini-batches go to a kernel, where one is given, and that all else is read by the scan."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.ttt import scan
from ttt_jax.ttt.inner_loop import initial_state, ttt_linear, where

b = 4


class Kernel:
    """Stands for a fused kernel: reads whole mini-batches by the scan, and records the shapes it is called with."""

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
    """Provide TTT-Linear at 18 tokens, and a function of it: with its gradients, and without."""
    loop, *arguments = make_case(1, 18, b, 2)
    cotangent = np.random.default_rng(0).standard_normal(arguments[1].q.shape)

    def scalar(arguments, state, masks, aligned, kernel):
        z, end, _ = scan.run(loop, *arguments, state, **masks, aligned=aligned, kernel=kernel)
        return (z * cotangent).sum() + sum(jnp.sin(x).sum() for x in jax.tree.leaves(end.weights)), (z, end)

    with_gradients = quick_jit(jax.value_and_grad(scalar, has_aux=True), static_argnums=(3, 4))
    return arguments, with_gradients, quick_jit(scalar, static_argnums=(3, 4))


RAGGED = np.arange(18) < np.array([[7], [18]])
PADDING = {
    "none": [{}],
    "some": [{"valid": RAGGED}, {"valid": RAGGED[:, ::-1]}, {"valid": np.array([[True], [False]]) & RAGGED[1:]}],
}


@pytest.mark.parametrize(
    ("given_state", "padding"),
    [
        pytest.param(True, "some", marks=pytest.mark.slow),
        (False, "none"),
        pytest.param(True, "none", marks=pytest.mark.slow),
        pytest.param(False, "some", marks=pytest.mark.slow),
    ],
)
def test_whole_mini_batches_go_to_a_kernel(whole_mini_batches, assert_close, given_state, padding):
    """Read from the start or inside a mini-batch; with padding at the end, at the start, and in a whole row.

    Gradients are compared where there is most to do, with a state and padding.
    """
    arguments, with_gradients, without = whole_mini_batches
    read = with_gradients if given_state and padding == "some" else without
    state, kernel = None, Kernel()
    for masks, places in itertools.product(PADDING[padding], ([0, 0], [3, 1]) if given_state else ([0, 0],)):
        if given_state:
            state = initial_state(arguments[0].w0, 2)._replace(position=np.array(places, np.int32))
            state = state._replace(pending=where(state.position > 0, state.weights, state.pending))
        expected = read(arguments, state, masks, False, None)
        assert_close(read(arguments, state, masks, False, kernel), expected)
    # The kernel gets unfinished mini-batches too, at rate 0, where rows have different numbers of whole ones.
    assert kernel.calls == [(20 if given_state or padding == "some" else 16, None)]


def test_kernel_gets_a_flag_for_each_mini_batch_that_begins_a_document(whole_mini_batches, assert_close):
    arguments, _, read = whole_mini_batches
    reset = np.zeros((2, 18), bool)
    reset[0, [0, 8, 16]] = reset[1, 4] = True
    state, kernel = initial_state(jax.tree.map(lambda w: 2 * w, arguments[0].w0), 2), Kernel()
    expected = read(arguments, state, {"reset": reset}, True, None)
    assert_close(read(arguments, state, {"reset": reset}, True, kernel), expected)
    assert kernel.calls == [(16, (2, 4))]
    jax.eval_shape(lambda *a: scan.run(ttt_linear(6), *a, reset=reset, kernel=kernel), *arguments, state)
    assert len(kernel.calls) == 1  # without ``aligned``, documents may begin anywhere, which no kernel reads
