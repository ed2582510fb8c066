"""Test counts of operations of an inner loop against counts by hand."""

import pytest

from ttt_jax.ttt import operations
from ttt_jax.ttt.inner_loop import InnerLoop, ttt_mlp
from ttt_jax.ttt.learner import Learner
from ttt_jax.ttt.learners import SwiGLU
from ttt_jax.ttt.objective import dot_product
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Momentum, Muon, Renormalise


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_dense_layers_in_the_dual_form(depth):
    d, b, total = 8, 16, 0
    for i in range(depth):
        n_in, n_out = d * (4 if i else 1), d * (1 if i == depth - 1 else 4)
        products = 4 if i else 3  # k W, K^T G, q W, and G W^T where there is a layer below
        total += products * 2 * n_in * n_out + 2 * b * (n_in + n_out)  # and q K^T, and its product with G
    assert operations.per_token(ttt_mlp(d, depth=depth), b) == total


def test_lact_counts_newton_schulz_once_per_mini_batch():
    """Count 6 d h to apply and 12 d h to learn; Newton-Schulz takes 5 (4 m m n + 2 m m m) for m x n, m <= n."""
    d, h, b = 8, 8, 32
    chain = (Momentum(), Muon(), Renormalise())
    loop = InnerLoop(Learner(SwiGLU(h / d, False), d), dot_product, Rate(per_matrix=True), chain, "previous")
    muon = 3 * 5 * (4 * d * d * h + 2 * d**3) / b
    assert operations.per_token(loop, b) == 6 * d * h + 12 * d * h + muon
