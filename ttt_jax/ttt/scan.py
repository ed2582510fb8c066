"""A sequence through the inner loop: a scan over mini-batches in the dual form.

A sequence may be read in pieces cut anywhere, also inside a mini-batch: the state that one piece ends with is what
the next one starts from, and the outputs are those of one go. When the sequence length is not a multiple of b, the
last mini-batch has fewer tokens and is exact too.

Shapes: B batch, T tokens of this piece, H heads, b tokens per mini-batch, n mini-batches, d head width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import dual
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt.learner import LayerNormParams, Learner, Weights
from ttt_jax.ttt.state import InnerState, initial_state


class Statistics(NamedTuple):
    """What the inner loop did, for each token of each sequence and head, [B, T, H]: the self-supervised loss of the
    token at three weights, and how far the last of them are from W0."""

    loss_at_w0: jax.Array  # at the W0 of the sequence
    loss_before: jax.Array  # at the weights that the token's mini-batch starts with
    loss_after: jax.Array  # after the step of the token's mini-batch (of its part in this piece)
    weight_distance: jax.Array  # |W - W0| of those weights, over all weights and biases of the head (Frobenius)


class Result(NamedTuple):
    """What :func:`run` returns."""

    z: jax.Array  # [B, T, H, d], in the dtype of q
    state: InnerState  # after the last token
    statistics: Statistics | None


# (learner, norm, weights at the start, q, k, v, token_eta, position_eta) -> (z, weights at the end)
Kernel = Callable[..., tuple[jax.Array, Weights]]


def run(
    learner: Learner,
    norm: LayerNormParams,
    w0: Weights,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    token_eta: jax.Array,
    position_eta: jax.Array,
    state: InnerState | None = None,
    *,
    remat_group: int = 0,
    unroll: int = 1,
    statistics: bool = False,
    kernel: Kernel | None = None,
) -> Result:
    """Reads T tokens, taking one gradient step per mini-batch of b.

    Args:
      learner, norm: the inner model and its LN.
      w0: weights at the start of a sequence, leaves [H, ...].
      q, k, v: [B, T, H, d], after RoPE, any float dtype; the inner loop computes in float32.
      token_eta: [B, T, H], the part of the learning rate that depends on the token whose gradient is taken.
      position_eta: [b], the part that depends on the position in the mini-batch of the token that uses it; its length
        sets b. eta[t, s] = position_eta[t] * token_eta[s].
      state: where an earlier piece of the same sequences ended; None starts them.
      remat_group: mini-batches between two stored W in the backward pass; what lies between is computed again.
        0 stores everything.
      unroll: mini-batches per iteration of the compiled loop.
      statistics: also return :class:`Statistics`; always by the scan.
      kernel: reads the mini-batches that are known to be whole instead of the scan, such as
        :func:`ttt_jax.ttt.kernels.run.run`.

    Returns:
      Outputs ``z[t] = f(q[t]; W_t)``, the state after the last token, statistics or None.
    """
    dtype = q.dtype
    inputs = (q, k, v, token_eta[..., None])
    options = _Options(learner, norm, w0, position_eta, remat_group, unroll, statistics, kernel)
    z, state, stats = _whole(options, inputs) if state is None else _continued(options, inputs, state)
    return Result(z.astype(dtype), state, Statistics(*stats) if statistics else None)


class _Options(NamedTuple):
    """What stays the same for all mini-batches of a call."""

    learner: Learner
    norm: LayerNormParams
    w0: Weights
    position_eta: jax.Array
    remat_group: int
    unroll: int
    statistics: bool
    kernel: Kernel | None

    @property
    def uses_kernel(self) -> bool:
        return self.kernel is not None and not self.statistics


def _whole(options: _Options, inputs):
    """From the start of the sequence: mini-batches of b, then one of the T mod b tokens that are left."""
    batch, tokens = inputs[0].shape[:2]
    b = len(options.position_eta)
    n, rest = divmod(tokens, b)

    def step(weights, x):
        x = _float32(x)
        z, keys = _mini_batch(options, weights, None, x, options.position_eta)
        new_weights = learner_lib.gradient_step(weights, dual.gradient(options.learner, keys, options.position_eta[-1]))
        return new_weights, (z, _statistics(options, keys, x, new_weights))

    start = initial_state(options.w0, batch)
    weights, pending = start.weights, start.pending
    outputs = []
    if n and options.uses_kernel:
        weights, z = _by_kernel(options, weights, tuple(x[:, : n * b] for x in inputs))
        outputs.append((z, ()))
    elif n:
        head = tuple(_split(x[:, : n * b], b) for x in inputs)
        weights, ys = _grouped_scan(step, weights, head, options.remat_group, options.unroll)
        outputs.append(_join_outputs(ys))
    if rest:
        tail = _float32(tuple(_split(x[:, n * b :], rest)[0] for x in inputs))
        position_eta = options.position_eta[:rest]
        z, keys = _mini_batch(options, weights, None, tail, position_eta)
        pending = dual.gradient(options.learner, keys)
        stats = _statistics(options, keys, tail, learner_lib.gradient_step(weights, pending, position_eta[-1]))
        outputs.append(_join_outputs(jax.tree.map(lambda y: y[None], (z, stats))))
    z, stats = jax.tree.map(lambda *y: jnp.concatenate(y, axis=1), *outputs)
    return z, InnerState(weights, pending, jnp.asarray(tokens, jnp.int32)), stats


def _continued(options: _Options, inputs, state: InnerState):
    """From any position: the tokens are laid out on the grid of mini-batches, with empty places (rate 0) before the
    first and after the last one, and a mini-batch takes its step once its last place has been filled."""
    tokens = inputs[0].shape[1]
    b = len(options.position_eta)
    offset = state.position % b
    n = -(-(tokens + b - 1) // b)  # enough for every offset

    def on_grid(x):
        return jnp.roll(jnp.pad(x, ((0, 0), (0, n * b - tokens), (0, 0), (0, 0))), offset, axis=1)

    def step(carry: InnerState, x):
        *x, filled = x
        x = _float32(x)
        z, keys = _mini_batch(options, carry.weights, carry.pending, x, options.position_eta)
        pending = jax.tree.map(jnp.add, carry.pending, dual.gradient(options.learner, keys))
        new_weights = learner_lib.gradient_step(carry.weights, pending, options.position_eta[filled - 1])
        new = carry.advanced(pending, new_weights, 0, filled == b)
        return new, (z, _statistics(options, keys, x, new_weights))

    filled = jnp.clip(offset + tokens - b * jnp.arange(n), 0, b)  # places filled when this piece ends
    grid = tuple(map(on_grid, inputs))

    def scan(state, first, last):
        xs = (*(_split(x[:, first * b : last * b], b) for x in grid), filled[first:last])
        state, ys = _grouped_scan(step, state, xs, options.remat_group, options.unroll)
        return state, _join_outputs(ys)

    if options.uses_kernel and n > 3:  # all but the first and the last two mini-batches are whole at every offset
        state_then, first = scan(state, 0, 1)
        weights, z = _by_kernel(options, state_then.weights, tuple(x[:, b : (n - 2) * b] for x in grid))
        end, last = scan(state_then._replace(weights=weights), n - 2, n)
        ys = jax.tree.map(lambda *y: jnp.concatenate(y, axis=1), first, (z, ()), last)
    else:
        end, ys = scan(state, 0, n)
    z, stats = jax.tree.map(lambda y: jax.lax.dynamic_slice_in_dim(y, offset, tokens, axis=1), ys)
    return z, end._replace(position=state.position + tokens), stats


def _by_kernel(options: _Options, weights: Weights, inputs) -> tuple[Weights, jax.Array]:
    """Whole mini-batches; the weights after them, and z."""
    assert options.kernel is not None
    *qkv, token_eta = inputs
    eta = token_eta[..., 0].astype(jnp.float32)
    z, weights = options.kernel(options.learner, options.norm, weights, *qkv, eta, options.position_eta)
    return weights, z.astype(jnp.float32)


def _float32(x):
    return jax.tree.map(lambda y: y.astype(jnp.float32), x)


def _mini_batch(options: _Options, weights, pending, x, position_eta):
    q, k, v, token_eta = x
    return dual.mini_batch(options.learner, options.norm, weights, pending, q, k, v, token_eta, position_eta)


def _statistics(options: _Options, keys: dual.Pass, x, new_weights) -> tuple[jax.Array, ...]:
    """Those of a mini-batch, [B, H, b] each; none when they were not asked for."""
    if not options.statistics:
        return ()
    _, k, v, _ = x
    learner, norm = options.learner, options.norm
    change = jax.lax.stop_gradient(learner_lib.gradient_step(new_weights, options.w0))  # |x| has no gradient at 0
    distance = learner_lib.norm_per_head(change)
    return (
        learner_lib.loss(learner, norm, options.w0, k, v),
        learner_lib.loss_from_output(learner_lib.output(learner, norm, k, keys.f_res), v),
        learner_lib.loss(learner, norm, new_weights, k, v),
        jnp.broadcast_to(distance[..., None], k.shape[:-1]),
    )


def _grouped_scan(step: Callable, carry: Any, xs: Any, group: int, unroll: int):
    """``lax.scan`` over n mini-batches that stores the carry every ``group`` of them for the backward pass."""

    def scan(carry, xs):
        return jax.lax.scan(step, carry, xs, unroll=unroll)

    if not group:
        return scan(carry, xs)
    if group == 1:
        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, xs, unroll=unroll)
    n = len(jax.tree.leaves(xs)[0])
    n_groups = n // group
    remat_scan = jax.checkpoint(scan, prevent_cse=False)
    parts = []
    if n_groups:
        grouped = jax.tree.map(lambda x: x[: n_groups * group].reshape(n_groups, group, *x.shape[1:]), xs)
        carry, ys = jax.lax.scan(remat_scan, carry, grouped)
        parts.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
    if n % group:
        carry, ys = jax.checkpoint(scan)(carry, jax.tree.map(lambda x: x[n_groups * group :], xs))
        parts.append(ys)
    return carry, parts[0] if len(parts) == 1 else jax.tree.map(lambda *y: jnp.concatenate(y), *parts)


def _split(x: jax.Array, b: int) -> jax.Array:
    """[B, n * b, H, d] -> [n, B, H, b, d]"""
    batch, tokens, heads, d = x.shape
    return x.reshape(batch, tokens // b, b, heads, d).transpose(1, 0, 3, 2, 4)


def _join_outputs(ys):
    """[n, B, H, b, ...] -> [B, n * b, H, ...]"""

    def join(y):
        n, batch, heads, b, *rest = y.shape
        return jnp.moveaxis(y, (1, 3), (0, 2)).reshape(batch, n * b, heads, *rest)

    return jax.tree.map(join, ys)
