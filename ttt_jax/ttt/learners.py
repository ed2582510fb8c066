"""Define the learners that come with the package, and the wrap of their output.

    linear:  f_res(x) = x W + c                                        (TTT-Linear)
    mlp:     f_res(x) = gelu(x W1 + c1) W2 + c2                        (TTT-MLP: two layers, hidden width 4 d; or more)
    swiglu:  f_res(x) = (silu(x W_gate) * (x W_up)) W_down             (LaCT; biases are optional)

The output f is f_res itself or, as in the paper,

    f(x) = x + LN(f_res(x))          LN(z) = (z - mean z) / sqrt(var z + 1e-6) * scale + bias

with one scale and one bias [d] per head, which the outer loop trains and the inner loop does not change.

Shapes: x is [..., d_in], one row per token, and f(x) is [..., d_out].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.ttt.learner import Dense, Function, Learner

LAYER_NORM_EPSILON = 1e-6
_GELU_SCALE = (2.0 / jnp.pi) ** 0.5
_GELU_CUBIC = 0.044715


@dataclasses.dataclass(frozen=True)
class Linear:
    """One dense layer.

    Attributes:
      bias: whether it has a bias.
      features_out: width of the output; None for the width of the input.
    """

    bias: bool = True
    features_out: int | None = None

    def __call__(self, dense: Dense, x: jax.Array) -> jax.Array:
        """Return f(x), [..., d_in] to [..., d_out]."""
        return dense(x, self.features_out or x.shape[-1], self.bias)


@dataclasses.dataclass(frozen=True)
class MLP:
    """Dense layers with GELU between them.

    Attributes:
      depth: number of dense layers.
      width_factor: width of the hidden layers, as a multiple of the width of the input.
      bias: whether the layers have biases.
      features_out: width of the output; None for the width of the input.
    """

    depth: int = 2
    width_factor: float = 4.0
    bias: bool = True
    features_out: int | None = None

    def __call__(self, dense: Dense, x: jax.Array) -> jax.Array:
        """Return f(x), [..., d_in] to [..., d_out]."""
        d = x.shape[-1]
        for _ in range(self.depth - 1):
            x = gelu(dense(x, int(d * self.width_factor), self.bias))
        return dense(x, self.features_out or d, self.bias)


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """A gated layer, with three matrices in this order: gate, values, output.

    The attributes are those of :class:`MLP` without ``depth``.
    """

    width_factor: float = 4.0
    bias: bool = True
    features_out: int | None = None

    def __call__(self, dense: Dense, x: jax.Array) -> jax.Array:
        """Return f(x), [..., d_in] to [..., d_out]."""
        d = x.shape[-1]
        hidden = int(d * self.width_factor)
        gate = jax.nn.silu(dense(x, hidden, self.bias))
        return dense(gate * dense(x, hidden, self.bias), self.features_out or d, self.bias)


@dataclasses.dataclass(frozen=True)
class ResidualNorm:
    """The paper's wrap of a learner: ``x + LN(f(x))``."""

    f: Function

    def __call__(self, dense: Dense, x: jax.Array) -> jax.Array:
        """Return x + LN(f(x)), [..., d] to [..., d]."""
        y = self.f(dense, x)
        if y.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"the learner makes {y.shape[-1]} features of {x.shape[-1]}, to which a residual cannot be added; "
                "expected equal widths, or the output none"
            )
        d = (x.shape[-1],)
        scale = dense.param("norm_scale", d, jax.nn.initializers.ones)
        shift = x + dense.param(
            "norm_bias", d, jax.nn.initializers.zeros
        )  # needs no y, so it can be computed meanwhile
        return normalise(y) * scale + shift


LEARNERS: dict[str, Function | type] = {
    "linear": Linear,
    "mlp": MLP,
    "swiglu": SwiGLU,
}


def make(kind: Function | type, options: Mapping[str, Any]) -> Function:
    """Return a learner's function: ``kind`` itself if it is a function, else an instance of the class ``kind``.

    Args:
      options: values of fields of the classes above; those that ``kind`` does not have are ignored.
    """
    if not isinstance(kind, type):
        return kind
    return kind(**{field.name: options[field.name] for field in dataclasses.fields(kind) if field.name in options})


def linear(features: int) -> Learner:
    """Return the learner of TTT-Linear."""
    return Learner(ResidualNorm(Linear()), features)


def mlp(features: int, *, depth: int = 2, width_factor: float = 4.0) -> Learner:
    """Return the learner of TTT-MLP: ``depth`` dense layers with hidden widths ``width_factor * features``."""
    return Learner(ResidualNorm(MLP(depth, width_factor)), features) if depth > 1 else linear(features)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Return GELU in its tanh form."""
    return gelu_and_derivative(x)[0]


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    """Differentiate with the tanh of the value, which autodiff of the formula would compute again."""
    value, derivative = gelu_and_derivative(*primals)
    return value, derivative * tangents[0]


def gelu_and_derivative(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return GELU in its tanh form and its derivative, which share one tanh."""
    t = jnp.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x**3))
    derivative = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * _GELU_SCALE * (1 + 3 * _GELU_CUBIC * x**2)
    return 0.5 * x * (1 + t), derivative


@jax.custom_jvp
def normalise(z: jax.Array) -> jax.Array:
    """Return LN without scale and bias: ``(z - mean) / sqrt(var + 1e-6)`` over the last axis."""
    return _normalised(z)[0]


@normalise.defjvp
def _normalise_jvp(primals, tangents):
    """Differentiate with two means that can be computed side by side; autodiff of the formula has one after another."""
    x, inverse_std = _normalised(*primals)
    (t,) = tangents
    return x, inverse_std * (t - t.mean(-1, keepdims=True) - x * (t * x).mean(-1, keepdims=True))


def _normalised(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ``(z - mean) / std`` and ``1 / std``, with ``std = sqrt(var + 1e-6)``."""
    centred = z - z.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
    return centred * inverse_std, inverse_std
