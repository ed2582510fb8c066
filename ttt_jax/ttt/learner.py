"""What a learner is: the inner model ``f``, its self-supervised loss, and the gradient of that loss.

    f(x) = x + LN(f_res(x))        f_res = dense layers with GELU between them
    loss(W; k, v) = 1/2 || LN(f_res(k)) - (v - k) ||^2        summed over d

Linear is one dense layer, the paper's MLP two with a hidden width of 4d. The weights *and* the biases of the
dense layers are the hidden state of a TTT layer; the scale and bias of LN belong to the outer loop.

Shapes: B batch, H heads, b tokens, d head width. Leading axes broadcast, so ``...`` is [B, H] or [H].
Everything here is computed in the dtype of the weights, which is float32.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

LAYER_NORM_EPSILON = 1e-6
_GELU_SCALE = (2.0 / jnp.pi) ** 0.5
_GELU_CUBIC = 0.044715


@dataclasses.dataclass(frozen=True)
class Learner:
    """The inner model, without its weights.

    Attributes:
      widths: width of the input, of each hidden layer, and of the output; ``(d, d)`` is TTT-Linear,
        ``(d, 4 * d, d)`` is TTT-MLP. First and last are equal.
      norm_residual: with LN and residual, as above. Without, ``f = f_res`` and the target is ``v`` itself,
        which is the setting of Theorem 1.
      bias: whether the dense layers have biases.
    """

    widths: tuple[int, ...]
    norm_residual: bool = True
    bias: bool = True

    def __post_init__(self):
        if len(self.widths) < 2 or min(self.widths) < 1 or self.widths[0] != self.widths[-1]:
            raise ValueError(f"learner widths {self.widths}: give at least two, all positive, first equal to last")

    @property
    def depth(self) -> int:
        """Number of dense layers."""
        return len(self.widths) - 1


def linear(head_dim: int) -> Learner:
    """The learner of TTT-Linear."""
    return mlp(head_dim, depth=1)


def mlp(head_dim: int, *, depth: int = 2, width_factor: float = 4.0) -> Learner:
    """The learner of TTT-MLP: ``depth`` dense layers, hidden widths ``width_factor * head_dim``."""
    hidden = int(head_dim * width_factor)
    return Learner((head_dim, *(hidden,) * (depth - 1), head_dim))


class Dense(NamedTuple):
    """One dense layer of a learner, or a gradient of its shape."""

    weight: jax.Array  # [..., d_in, d_out]
    bias: jax.Array | None  # [..., 1, d_out]


Weights = tuple[Dense, ...]


class LayerNormParams(NamedTuple):
    """Scale and bias of the LN inside the learner; trained by the outer loop only."""

    scale: jax.Array  # [H, 1, d]
    bias: jax.Array  # [H, 1, d]


def init(key: jax.Array, learner: Learner, heads: int, stddev: float = 0.02) -> Weights:
    """Draws W0 for every head: normal weights, zero biases."""
    keys = jax.random.split(key, learner.depth)
    return tuple(
        Dense(
            stddev * jax.random.normal(k, (heads, n_in, n_out)),
            jnp.zeros((heads, 1, n_out)) if learner.bias else None,
        )
        for k, n_in, n_out in zip(keys, learner.widths[:-1], learner.widths[1:], strict=True)
    )


def dense(layer: Dense, x: jax.Array) -> jax.Array:
    """``x W + c``, [..., b, d_in] to [..., b, d_out]."""
    y = x @ layer.weight
    return y if layer.bias is None else y + layer.bias


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form."""
    return gelu_and_derivative(x)[0]


def gelu_and_derivative(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GELU in its tanh form and its derivative, sharing the one tanh."""
    t = jnp.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x**3))
    derivative = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * _GELU_SCALE * (1 + 3 * _GELU_CUBIC * x**2)
    return 0.5 * x * (1 + t), derivative


def normalise(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(z - mean) / std`` over the last axis, and ``1 / std``."""
    centred = z - z.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
    return centred * inverse_std, inverse_std


def layer_norm(z: jax.Array, norm: LayerNormParams) -> jax.Array:
    """LN per head over d."""
    return normalise(z)[0] * norm.scale + norm.bias


def residual_branch(weights: Weights, x: jax.Array) -> jax.Array:
    """``f_res(x)``, [..., b, d] to [..., b, d]."""
    for layer in weights[:-1]:
        x = gelu(dense(layer, x))
    return dense(weights[-1], x)


def output(learner: Learner, norm: LayerNormParams, x: jax.Array, f_res: jax.Array) -> jax.Array:
    """``f(x)`` from ``f_res(x)``: LN and residual, where the learner has them."""
    return x + layer_norm(f_res, norm) if learner.norm_residual else f_res


def apply(learner: Learner, norm: LayerNormParams, weights: Weights, x: jax.Array) -> jax.Array:
    """``f(x; W)``, [..., b, d] to [..., b, d]."""
    return output(learner, norm, x, residual_branch(weights, x))


def loss(learner: Learner, norm: LayerNormParams, weights: Weights, k: jax.Array, v: jax.Array) -> jax.Array:
    """The self-supervised loss per token, [..., b, d] to [..., b]. With the residual, ``f(k) - v`` is
    ``LN(f_res(k)) - (v - k)``."""
    return loss_from_output(apply(learner, norm, weights, k), v)


def loss_from_output(f_k: jax.Array, v: jax.Array) -> jax.Array:
    """``1/2 || f(k) - v ||^2`` per token, [..., b, d] to [..., b]."""
    return 0.5 * ((f_k - v) ** 2).sum(-1)


def gradient_step(weights: Weights, gradient: Weights, rate: jax.Array | float = 1.0) -> Weights:
    """``W - rate * gradient``."""
    return jax.tree.map(lambda w, g: w - rate * g, weights, gradient)


def norm_per_head(weights: Weights) -> jax.Array:
    """Frobenius norm over all weights and biases of a head, [..., d_in, d_out] leaves to [...]."""
    return jnp.sqrt(sum((w**2).sum((-2, -1)) for w in jax.tree.leaves(weights)))


def loss_gradient_at_f_res(
    learner: Learner, norm: LayerNormParams, k: jax.Array, v: jax.Array, f_res: jax.Array
) -> jax.Array:
    """Gradient of the loss with respect to ``f_res(k)``, that is G of the last layer: [..., b, d]."""
    if not learner.norm_residual:
        return f_res - v
    x_hat, inverse_std = normalise(f_res)
    g = (x_hat * norm.scale + norm.bias - (v - k)) * norm.scale
    return inverse_std * (g - g.mean(-1, keepdims=True) - x_hat * (g * x_hat).mean(-1, keepdims=True))
