"""Compute one mini-batch in the dual form of the paper, for any learner, objective and linear update.

Token t sees the steps of every token s <= t of its mini-batch, W_t = W - p_t sum_{s <= t} eta_s grad_s, with p_t the
rate of its position and eta_s that of token s. For TTT-Linear, with the tokens of the mini-batch as rows of Q and K
[b, d], and S = eta * G [b, d] the gradients G of the losses at K W + c, each times its rate, the outputs
f_res(q_t; W_t) and the weights after the mini-batch are

    Zbar = Q W + c - (p * tril(Q K^T + 1)) S          W' = W - p_b K^T S          c' = c - p_b 1^T S

No W_t is formed: a mini-batch is a handful of matmuls. The ``+ 1`` is the bias c, which learns as a weight whose input
is 1.

In general, f calls ``dense`` once for each weight matrix. Let x_s be the input of that call where f reads the key of
token s, xbar_t its input where f reads the query of token t (through earlier calls that already see the steps), and
G_s the gradient of the loss of token s at the output of the call. Then the output of the call for the query is

    zbar_t = A_t (xbar_t W + c) - p_t sum_{s <= t} (A_t / A_s) (xbar_t . x_s + 1) eta_s G_s - p_t mu_t (xbar_t M + m)

A_t is the decay of the weights over the tokens up to t, and gradients are taken at A_s W; (M, m) is the momentum, and
mu_t its factor (see :mod:`ttt_jax.ttt.update`). Without decay and momentum, A = 1 and mu = 0. G comes from autodiff
with respect to a perturbation of each output. The gradient of the mini-batch, which the update gets, is
sum_s (A_b / A_s) eta_s x_s^T G_s.

Shapes: B batch, H heads, b tokens of this mini-batch, d_in and d_out widths of a matrix, M weight matrices.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import update
from ttt_jax.ttt.inner_loop import InnerLoop, Tokens
from ttt_jax.ttt.learner import Affine, Constants, Dense, Weights
from ttt_jax.ttt.update import Gate


class Start(NamedTuple):
    """The state at the start of a mini-batch, or of the next piece of one."""

    weights: Weights  # the weights that f uses, leaves [B, H, ...]
    pending: Weights | None  # the gradient of earlier pieces of this mini-batch, leaves [B, H, ...]; None for none
    slots: tuple[Any, ...]  # the memory of each member of the update, leaves [B, H, ...]


class Pass(NamedTuple):
    """A forward and a backward pass of the learner over the keys of a mini-batch.

    The gradient of weight matrix l, with each token weighted by its rate, is ``inputs[l]^T scaled[l]``.
    """

    inputs: tuple[jax.Array, ...]  # X of each matrix, [B, H, b, d_in]
    scaled: tuple[jax.Array, ...]  # token_eta * G of each matrix, [B, H, b, d_out]
    f_k: jax.Array  # outputs of f, [B, H, b, d_v]


def mini_batch(
    loop: InnerLoop,
    constants: Constants,
    start: Start,
    tokens: Tokens,
    position_eta: jax.Array,
    gates: Mapping[str, Gate],
    together: jax.Array | None = None,
) -> tuple[jax.Array, Pass]:
    """Return the outputs z [B, H, b, d_v] of one mini-batch, and the pass over its keys.

    Args:
      tokens: q, k, v [B, H, b, d], eta [B, H, b, 1] or [B, H, b, M].
      position_eta: [b] or [B, 1, b], the rate of the position of each token in its mini-batch.
      gates: the number per token that each member of the update reads, by the name of its gate.
      together: bool [B, 1, b, b], whether tokens t and s belong to the same document, where the tokens are of several
        documents that all start from the same weights; None where they are of one.
    """
    decay = update.decay_of(loop.update)
    log_decay = gates[decay.gate] if decay is not None else None
    if loop.reading == "previous":
        return loop.learner.apply(start.weights, constants, tokens.q), pass_over_keys(loop, constants, start, tokens)
    keys = pass_over_keys(loop, constants, start, tokens, log_decay)
    memories = [member.memory(gates.get(member.gate)) for member in loop.update]
    dense = _ForQueries(constants, start, keys, position_eta, log_decay, memories, together)
    return loop.learner.f(dense, tokens.q), keys


def pass_over_keys(
    loop: InnerLoop, constants: Constants, start: Start, tokens: Tokens, log_decay: Gate | None = None
) -> Pass:
    """Return the pass of the learner over the keys of a mini-batch; with ``log_decay``, token s is read at A_s W."""
    factor = None if log_decay is None else jnp.exp(log_decay.total)
    k, v, eta = tokens.k, tokens.v, tokens.eta

    def total_loss(perturbations):
        dense = _ForKeys(start.weights, constants, factor, perturbations)
        f_k = loop.learner.f(dense, k)
        return loop.objective(f_k, v).sum(), (tuple(dense.inputs), f_k)

    matrices = loop.learner.structure.matrices
    zeros = tuple(jnp.zeros((*k.shape[:-1], m.features_out), k.dtype) for m in matrices)  # [B, H, b, d_out] each
    loss, pullback, (inputs, f_k) = jax.vjp(total_loss, zeros, has_aux=True)
    (gradients,) = pullback(jnp.ones_like(loss))
    rates = [eta] * len(matrices) if eta.shape[-1] == 1 else jnp.split(eta, len(matrices), -1)
    return Pass(inputs, tuple(rate * g for rate, g in zip(rates, gradients, strict=True)), f_k)


def gradient(
    loop: InnerLoop, keys: Pass, rate: jax.Array | float = 1.0, gates: Mapping[str, Gate] | None = None
) -> Weights:
    """Return the gradient of a mini-batch, leaves [B, H, ...]: the sum over its tokens s of ``rate * token_eta[s] *
    gradient[s]``, each decayed by the tokens after s."""
    decay = update.decay_of(loop.update)
    if decay is not None and gates is not None:
        total = gates[decay.gate].total
        rate = rate * jnp.exp(total[..., -1:, :] - total)

    def matrix(shape, x, scaled):
        # Multiply the small factor, not the product: that would cost a pass over all of W in the backward pass.
        step = rate * scaled  # [B, H, b, d_out]
        return Affine(x.swapaxes(-1, -2) @ step, step.sum(-2, keepdims=True) if shape.bias else None)

    return tuple(map(matrix, loop.learner.structure.matrices, keys.inputs, keys.scaled))


class _ForKeys(Dense):
    """Apply the weights to keys: record the inputs of each matrix, and add a perturbation to its outputs.

    The gradient of the loss with respect to the perturbation is the gradient at the outputs.
    """

    def __init__(self, weights, constants, factor, perturbations):
        super().__init__(weights, constants)
        self._factor, self._perturbations = factor, perturbations
        self.inputs = []

    def apply(self, index: int, affine: Affine, x: jax.Array) -> jax.Array:
        self.inputs.append(x)
        y = affine(x) if self._factor is None else self._factor * affine(x)
        return y + self._perturbations[index]


class _ForQueries(Dense):
    """Apply to each query the weights W_t that its token sees, without forming them."""

    def __init__(self, constants, start: Start, keys: Pass, position_eta, log_decay, memories, together):
        super().__init__(start.weights, constants)
        self._keys = keys
        self._rate = position_eta[..., None]  # [b, 1] or [B, 1, b, 1]
        b = position_eta.shape[-1]
        seen = jnp.tril(jnp.ones((b, b), bool))
        if together is not None:
            seen &= together
        if log_decay is None:
            self._factor = None
            self._coefficients = jnp.where(seen, self._rate, 0.0)  # [b, b] or [B, 1, b, b]
            since_start = self._rate
        else:
            total = log_decay.total
            # log(A_t / A_s), [B, H, b, b]. Mask before the exponential, which may overflow elsewhere: 0 * inf is NaN.
            difference = jnp.where(seen, total - total.swapaxes(-1, -2), -jnp.inf)
            self._factor = jnp.exp(total)
            self._coefficients = self._rate * jnp.exp(difference)  # [B, H, b, b]
            before = total[..., :1, :] - log_decay.value[..., :1, :]  # of the earlier pieces of this mini-batch
            since_start = self._rate * jnp.exp(total - before)
        self._directions = [] if start.pending is None else [(start.pending, since_start)]
        for slot, memory in zip(start.slots, memories, strict=True):
            if memory is not None:
                self._directions.append((slot, self._rate * memory))

    def apply(self, index: int, affine: Affine, x: jax.Array) -> jax.Array:
        y = affine(x) if self._factor is None else self._factor * affine(x)
        similarity = x @ self._keys.inputs[index].swapaxes(-1, -2)  # [B, H, b, b]
        if affine.bias is not None:
            similarity += 1
        y -= (self._coefficients * similarity) @ self._keys.scaled[index]
        for direction, rate in self._directions:
            y -= rate * direction[index](x)
        return y
