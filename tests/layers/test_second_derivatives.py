"""Check that backward passes that are written out, and attention, can be differentiated again, by plain functions.

End-to-end training differentiates through the gradient steps of the model. A backward pass that hides a dependence
would give second derivatives that are silently too small.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.layers import blocked_attention, conv, linear, mlp, rope

POSITIONS = np.array([0, 3, 7])
TOKENS = np.array([[1, 4, 1], [0, 0, 2]])
SINCE = np.array([[5, 0, 1, 2], [1, 2, 0, 0]])


def rotated(x, half_split):
    """Rotate pairs of features as complex numbers."""
    angles = POSITIONS[:, None, None] * 500.0 ** (-np.arange(0, 4, 2) / 4)
    first, second = (x[..., :2], x[..., 2:]) if half_split else (x[..., ::2], x[..., 1::2])
    z = [first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)]
    return jnp.concatenate(z, -1) if half_split else jnp.stack(z, -1).reshape(x.shape)


def convolved(x, kernel, since=None):
    width, tokens = len(kernel), x.shape[1] - len(kernel) + 1
    seen = np.ones((2, tokens, width)) if since is None else since[..., None] >= np.arange(width)[::-1]
    return sum(kernel[j] * x[:, j : j + tokens] * seen[..., j : j + 1] for j in range(width))


def attended(q, k, v):
    """Attend to the last three tokens by a softmax of all logits at once; two heads share their keys."""
    back = np.arange(8)[:, None] - np.arange(8)
    logits = jnp.einsum("bthd,bsd->bhts", q, k[:, :, 0]) / 2
    weights = jax.nn.softmax(jnp.where((back >= 0) & (back < 3), logits, -jnp.inf))
    return jnp.einsum("bhts,bsd->bthd", weights, v[:, :, 0])


CASES = {
    "rotate": (lambda x: rope.rotate(x, POSITIONS, 500.0), lambda x: rotated(x, False), [(2, 3, 2, 4)]),
    "rotate halves": (
        lambda x: rope.rotate(x, POSITIONS, 500.0, "half_split"),
        lambda x: rotated(x, True),
        [(2, 3, 2, 4)],
    ),
    "gated": (mlp.gated, lambda gate, up: jax.nn.silu(gate) * up, [(2, 3, 4), (2, 3, 4)]),
    "project": (
        lambda x, kernel: linear.project(x, kernel, ("embed", "heads"), jnp.float32),
        lambda x, kernel: x @ kernel,
        [(2, 3, 4), (4, 5)],
    ),
    "lookup": (lambda table: linear.lookup(table, TOKENS, jnp.float32), lambda table: table[TOKENS], [(5, 4)]),
    "convolve": (conv.convolve, convolved, [(2, 6, 4), (3, 4)]),
    "convolve documents": (
        lambda x, kernel: conv.convolve(x, kernel, SINCE),
        lambda x, kernel: convolved(x, kernel, SINCE),
        [(2, 6, 4), (3, 4)],
    ),
    "attend": (
        lambda q, k, v: blocked_attention.causal_attention(q, k, v, window=3, block=4),
        attended,
        [(1, 8, 2, 4), (1, 8, 1, 4), (1, 8, 1, 4)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_of_a_gradient_matches_autodiff(quick_jit, assert_close, case):
    """Compare the gradient of <u, gradient> for a random u, with a loss that is not linear in the output."""
    ours, plain, shapes = CASES[case]
    rng = np.random.default_rng(0)
    arguments, directions = ([rng.standard_normal(shape).astype(np.float32) for shape in shapes] for _ in range(2))

    def second(function):
        def inner(arguments):
            gradients = jax.grad(lambda each: (function(*each) ** 3).sum())(arguments)
            return sum((u * g).sum() for u, g in zip(directions, gradients, strict=True))

        return quick_jit(jax.grad(inner))(arguments)

    assert_close(second(ours), second(plain), 1e-5)
