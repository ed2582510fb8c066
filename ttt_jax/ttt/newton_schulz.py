"""Newton-Schulz: a matrix with the singular vectors of another and singular values near 1 (Muon)."""

import jax
import jax.numpy as jnp

# (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T, one for each iteration.
_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_EPSILON = 1e-7


def orthogonalise(g: jax.Array) -> jax.Array:
    """Return matrices [..., m, n] orthogonalised, each alone.

    Singular values above 0.01 of the Frobenius norm end in 0.977 to 1.032, where that norm is well above 1e-7. A matrix
    of zeros stays one, with a finite derivative.
    """
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.swapaxes(-1, -2)  # the product X X^T is then the smaller one
    squares = (x**2).sum((-2, -1), keepdims=True)
    positive = squares > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
    x = x / (norm + _EPSILON)
    for a, b, c in _COEFFICIENTS:
        product = x @ x.swapaxes(-1, -2)
        x = a * x + (b * product + c * product @ product) @ x
    return x if wide else x.swapaxes(-1, -2)
