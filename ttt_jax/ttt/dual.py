"""One mini-batch in the dual form, for any stack of dense layers.

All gradients of a mini-batch are taken at the weights W it starts with; token t sees the steps of every token
s <= t of its mini-batch. With eta[t, s] = position_eta[t] * token_eta[s], for each dense layer

    Zbar = Xbar W + c - (tril(eta) * (Xbar X^T + 1)) G

where X are the layer's inputs on the way of k, G the gradient of the loss at its outputs, and Xbar its inputs
on the way of q, through the layers below as token t has them. No W_t is ever formed: a mini-batch is a handful of
matmuls. The weights that it hands on are W - X^T (eta_b * G), eta_b the last row of eta.

Shapes: B batch, H heads, b tokens of this mini-batch, d head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt.learner import Dense, LayerNormParams, Learner, Weights


class Pass(NamedTuple):
    """What a mini-batch leaves behind: a forward and a backward pass of the learner over its keys.

    The gradient of the weights of layer l, each token weighed with its rate, is ``inputs[l]^T scaled[l]``.
    """

    inputs: tuple[jax.Array, ...]  # X of each layer, [B, H, b, d_in]
    scaled: tuple[jax.Array, ...]  # token_eta * G of each layer, [B, H, b, d_out]
    f_res: jax.Array  # output of the last layer, [B, H, b, d]


def mini_batch(
    learner: Learner,
    norm: LayerNormParams,
    weights: Weights,
    pending: Weights | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    token_eta: jax.Array,
    position_eta: jax.Array,
) -> tuple[jax.Array, Pass]:
    """Outputs of one mini-batch, and the pass over its keys.

    Args:
      weights: W at the start of the mini-batch, leaves [B, H, ...].
      pending: sum of token_eta[s] * gradient[s] over tokens of this mini-batch that came in an earlier piece of the
        sequence; None when there are none.
      q, k, v: [B, H, b, d], after RoPE.
      token_eta: [B, H, b, 1].
      position_eta: [b], the rates of the positions that these tokens have in their mini-batch.

    Returns:
      z [B, H, b, d], and the pass.
    """
    keys = forward_backward(learner, norm, weights, k, v, token_eta)
    row_eta = position_eta[:, None]
    tril_eta = jnp.tril(jnp.broadcast_to(row_eta, (len(position_eta),) * 2))  # [b, b]
    z_bar = q
    for index, (layer, x, scaled) in enumerate(zip(weights, keys.inputs, keys.scaled, strict=True)):
        x_bar = learner_lib.gelu(z_bar) if index else q
        z_bar = learner_lib.dense(layer, x_bar)
        similarity = x_bar @ x.swapaxes(-1, -2)  # [B, H, b, b]
        if learner.bias:
            similarity += 1
        z_bar -= (tril_eta * similarity) @ scaled
        if pending is not None:
            z_bar -= row_eta * learner_lib.dense(pending[index], x_bar)
    return learner_lib.output(learner, norm, q, z_bar), keys


def forward_backward(
    learner: Learner, norm: LayerNormParams, weights: Weights, k: jax.Array, v: jax.Array, token_eta: jax.Array
) -> Pass:
    """The learner over the keys of a mini-batch, and the gradients of its losses by back-propagation written out."""
    inputs, derivatives = [k], []
    for layer in weights[:-1]:
        activation, derivative = learner_lib.gelu_and_derivative(learner_lib.dense(layer, inputs[-1]))
        inputs.append(activation)
        derivatives.append(derivative)
    f_res = learner_lib.dense(weights[-1], inputs[-1])
    gradients = [learner_lib.loss_gradient_at_f_res(learner, norm, k, v, f_res)]
    for layer, derivative in zip(reversed(weights[1:]), reversed(derivatives), strict=True):
        gradients.insert(0, (gradients[0] @ layer.weight.swapaxes(-1, -2)) * derivative)
    return Pass(tuple(inputs), tuple(token_eta * g for g in gradients), f_res)


def gradient(learner: Learner, keys: Pass, rate: jax.Array | float = 1.0) -> Weights:
    """Sum over the tokens of a mini-batch of ``rate * token_eta[s] * gradient[s]``, leaves [B, H, ...]."""

    def layer(x, scaled):
        # The rate goes to the small factor: times the product it would cost, backwards, a pass over all of W.
        step = rate * scaled
        return Dense(x.swapaxes(-1, -2) @ step, step.sum(-2, keepdims=True) if learner.bias else None)

    return tuple(map(layer, keys.inputs, keys.scaled))
