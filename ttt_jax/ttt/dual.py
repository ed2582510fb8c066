"""One mini-batch in the dual form, for any stack of dense layers.

All gradients of a mini-batch are taken at the weights W it starts with; token t sees the steps of every token
s <= t of its mini-batch. With eta[t, s] = position_eta[t] * token_eta[s], for each dense layer

    Zbar = Xbar W + c - (tril(eta) * (Xbar X^T + 1)) G

where X are the layer's inputs on the way of k, G the gradient of the loss at its outputs, and Xbar its inputs
on the way of q, through the layers below as token t has them. No W_t is ever formed: a mini-batch is a handful of
matmuls. What the mini-batch adds to the gradient of the weights is X^T (token_eta * G).

Shapes: B batch, H heads, b tokens of this mini-batch, d head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt.learner import Dense, LayerNormParams, Learner, Weights


class Forward(NamedTuple):
    """A forward and backward pass of the learner over the keys of a mini-batch, layer by layer."""

    inputs: tuple[jax.Array, ...]  # X of each layer, [B, H, b, d_in]
    gradients: tuple[jax.Array, ...]  # G of each layer: the loss gradient at its outputs, [B, H, b, d_out]
    f_res: jax.Array  # output of the last layer, [B, H, b, d]


def forward_backward(learner: Learner, norm: LayerNormParams, weights: Weights, k: jax.Array, v: jax.Array) -> Forward:
    """Per-token gradients of the self-supervised loss at ``weights``, by back-propagation written out."""
    inputs, derivatives = [k], []
    for layer in weights[:-1]:
        activation, derivative = learner_lib.gelu_and_derivative(learner_lib.dense(layer, inputs[-1]))
        inputs.append(activation)
        derivatives.append(derivative)
    f_res = learner_lib.dense(weights[-1], inputs[-1])
    gradients = [learner_lib.loss_gradient_at_f_res(learner, norm, k, v, f_res)]
    for layer, derivative in zip(reversed(weights[1:]), reversed(derivatives), strict=True):
        gradients.insert(0, (gradients[0] @ layer.weight.swapaxes(-1, -2)) * derivative)
    return Forward(tuple(inputs), tuple(gradients), f_res)


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
) -> tuple[jax.Array, Weights, Forward]:
    """Outputs of one mini-batch and the gradient it leaves behind.

    Args:
      weights: W at the start of the mini-batch, leaves [B, H, ...].
      pending: sum of token_eta[s] * gradient[s] over tokens of this mini-batch that came in an earlier piece of the
        sequence; None when there are none.
      q, k, v: [B, H, b, d], after RoPE.
      token_eta: [B, H, b].
      position_eta: [b], the rates of the positions that these tokens have in their mini-batch.

    Returns:
      z [B, H, b, d]; ``pending`` with this mini-batch's tokens added; and the pass over the keys.
    """
    keys = forward_backward(learner, norm, weights, k, v)
    tril_eta = jnp.tril(jnp.broadcast_to(position_eta[:, None], (len(position_eta),) * 2))  # [b, b]
    row_eta = position_eta[:, None]

    total = []
    x_bar = q
    for index, (layer, x, g) in enumerate(zip(weights, keys.inputs, keys.gradients, strict=True)):
        scaled = token_eta[..., None] * g  # [B, H, b, d_out]
        similarity = x_bar @ x.swapaxes(-1, -2)  # [B, H, b, b]
        if learner.bias:
            similarity += 1
        z_bar = learner_lib.dense(layer, x_bar) - (tril_eta * similarity) @ scaled
        step = Dense(x.swapaxes(-1, -2) @ scaled, scaled.sum(-2, keepdims=True) if learner.bias else None)
        if pending is not None:
            z_bar -= row_eta * learner_lib.dense(pending[index], x_bar)
            step = jax.tree.map(jnp.add, pending[index], step)
        total.append(step)
        x_bar = learner_lib.gelu(z_bar) if index < learner.depth - 1 else z_bar
    return learner_lib.output(learner, norm, q, x_bar), tuple(total), keys


def updated(weights: Weights, gradient: Weights, position_eta: jax.Array) -> Weights:
    """``W - position_eta * gradient``: the weights as the token with that rate has them."""
    return jax.tree.map(lambda w, g: w - position_eta * g, weights, gradient)
