"""One mini-batch in the dual form, for any learner, objective and update that is linear in the gradients.

Gradients of token s are taken at A_s W: the weights that its mini-batch starts with, after the decay. Token t sees the
steps of every token s <= t of its mini-batch. For each weight matrix of the learner, with X its inputs on the way of k
and G the gradients of the losses at its outputs, its output on the way of q is

    Zbar_t = A_t (xbar_t W + c) - p_t sum_{s <= t} (A_t / A_s) (xbar_t . x_s + 1) eta_s G_s - p_t mu_t (xbar_t M + m)

where xbar are its inputs on the way of q, through the calls before it as token t has them, and (M, m) is the momentum
(see :mod:`ttt_jax.ttt.update`). No W_t is ever formed: a mini-batch is a handful of matmuls. G comes from autodiff with
respect to a perturbation of each output. The gradient that the mini-batch hands on is the sum of
(A_b / A_s) eta_s x_s G_s^T.

Shapes: B batch, H heads, b tokens of this mini-batch, d_in and d_out widths of a matrix.
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
    """What a mini-batch, or the next piece of one, starts from."""

    weights: Weights  # those that f uses, leaves [B, H, ...]
    pending: Weights | None  # the sum over tokens of earlier pieces of the mini-batch; None where there are none
    slots: tuple[Any, ...]  # what the members of the update remember


class Pass(NamedTuple):
    """What a mini-batch leaves behind: a forward and a backward pass of the learner over its keys.

    The gradient of weight matrix l, each token weighed with its rate, is ``inputs[l]^T scaled[l]``.
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
      position_eta: [b] or [B, 1, b], the rates of the positions that these tokens have in their mini-batch.
      gates: what members of the update read, at each of these tokens.
      together: [B, 1, b, b], which tokens s a token t may see among those up to it, where these are of several
        documents, which all start from the same weights.
    """
    decay = update.decay_of(loop.update)
    log_decay = gates[decay.gate] if decay is not None else None
    if loop.reading == "previous":
        return loop.learner.apply(start.weights, constants, tokens.q), pass_over_keys(loop, constants, start, tokens)
    keys = pass_over_keys(loop, constants, start, tokens, log_decay)
    memories = [member.memory(gates.get(member.gate)) for member in loop.update]
    dense = _AsTokensSee(constants, start, keys, position_eta, log_decay, memories, together)
    return loop.learner.f(dense, tokens.q), keys


def pass_over_keys(
    loop: InnerLoop, constants: Constants, start: Start, tokens: Tokens, log_decay: Gate | None = None
) -> Pass:
    """Return the pass of the learner over the keys of a mini-batch, at A_s W where there is a decay."""
    factor = None if log_decay is None else jnp.exp(log_decay.total)
    k, v, eta = tokens.k, tokens.v, tokens.eta

    def total_loss(perturbations):
        dense = _OnTheWayOfKeys(start.weights, constants, factor, perturbations)
        f_k = loop.learner.f(dense, k)
        return loop.objective(f_k, v).sum(), (tuple(dense.inputs), f_k)

    matrices = loop.learner.structure.matrices
    zeros = tuple(jnp.zeros((*k.shape[:-1], m.features_out), k.dtype) for m in matrices)
    loss, pullback, (inputs, f_k) = jax.vjp(total_loss, zeros, has_aux=True)
    (gradients,) = pullback(jnp.ones_like(loss))
    rates = [eta] * len(matrices) if eta.shape[-1] == 1 else jnp.split(eta, len(matrices), -1)
    return Pass(inputs, tuple(rate * g for rate, g in zip(rates, gradients, strict=True)), f_k)


def gradient(
    loop: InnerLoop, keys: Pass, rate: jax.Array | float = 1.0, gates: Mapping[str, Gate] | None = None
) -> Weights:
    """Return the sum over the tokens of a mini-batch of ``rate * token_eta[s] * gradient[s]``, leaves [B, H, ...]; each
    decayed by the tokens after it."""
    decay = update.decay_of(loop.update)
    if decay is not None and gates is not None:
        total = gates[decay.gate].total
        rate = rate * jnp.exp(total[..., -1:, :] - total)

    def matrix(shape, x, scaled):
        # The rate goes to the small factor: times the product it would cost, backwards, a pass over all of W.
        step = rate * scaled
        return Affine(x.swapaxes(-1, -2) @ step, step.sum(-2, keepdims=True) if shape.bias else None)

    return tuple(map(matrix, loop.learner.structure.matrices, keys.inputs, keys.scaled))


class _OnTheWayOfKeys(Dense):
    """Keeps the inputs of each matrix, and adds a perturbation to its outputs, by which the loss is differentiated."""

    def __init__(self, weights, constants, factor, perturbations):
        super().__init__(weights, constants)
        self._factor, self._perturbations = factor, perturbations
        self.inputs = []

    def apply(self, index: int, affine: Affine, x: jax.Array) -> jax.Array:
        self.inputs.append(x)
        y = affine(x) if self._factor is None else self._factor * affine(x)
        return y + self._perturbations[index]


class _AsTokensSee(Dense):
    """Applies to each token the weights that it sees, without forming them."""

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
            self._among = jnp.where(seen, self._rate, 0.0)  # [b, b] or [B, 1, b, b]
            since_start = self._rate
        else:
            total = log_decay.total
            difference = jnp.where(seen, total - total.swapaxes(-1, -2), -jnp.inf)  # of logarithms: no 0 * inf
            self._factor = jnp.exp(total)
            self._among = self._rate * jnp.exp(difference)  # [B, H, b, b]
            before = total[..., :1, :] - log_decay.value[..., :1, :]  # of the pieces before this one
            since_start = self._rate * jnp.exp(total - before)
        self._also = [] if start.pending is None else [(start.pending, since_start)]
        for slot, memory in zip(start.slots, memories, strict=True):
            if memory is not None:
                self._also.append((slot, self._rate * memory))

    def apply(self, index: int, affine: Affine, x: jax.Array) -> jax.Array:
        y = affine(x) if self._factor is None else self._factor * affine(x)
        similarity = x @ self._keys.inputs[index].swapaxes(-1, -2)  # [B, H, b, b]
        if affine.bias is not None:
            similarity += 1
        y -= (self._among * similarity) @ self._keys.scaled[index]
        for direction, rate in self._also:
            y -= rate * direction[index](x)
        return y
