"""GELU in its tanh form and its first two derivatives, which share the one tanh.

With h = (1 + tanh w) / 2 and 2 w = z (2 a + 2 a c z^2), which is a logistic function of 2 w:

    gelu = z h          gelu' = h + z h (1 - h) y          gelu'' = h (1 - h) (2 y + z (1 - 2 h) y^2 + z y')

for y = (2 w)' = 2 a + 6 a c z^2.
"""

import math

import jax
import jax.numpy as jnp

_A = math.sqrt(2 / math.pi)
_AC = _A * 0.044715


def gelu(z: jax.Array) -> jax.Array:
    """The function."""
    return z * _half_of_one_and_tanh(z, z * z)


def gelu_and_derivative(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The function and its derivative."""
    square = z * z
    h = _half_of_one_and_tanh(z, square)
    value = z * h
    return value, h + value * (1 - h) * (2 * _A + 6 * _AC * square)


def gelu_and_derivatives(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The function and its first and second derivative."""
    square = z * z
    h = _half_of_one_and_tanh(z, square)
    value = z * h
    y = 2 * _A + 6 * _AC * square
    slope = h * (1 - h)
    zy = z * y
    second = slope * (y * (2 + (1 - 2 * h) * zy) + 12 * _AC * square)
    return value, h + slope * zy, second


def _half_of_one_and_tanh(z, square):
    return 0.5 * jnp.tanh(z * (_A + _AC * square)) + 0.5
