"""A sequence through the inner loop: a scan over mini-batches in the dual form.

A sequence may be read in pieces cut anywhere, also inside a mini-batch: the state that one piece ends with is what
the next one starts from, and the outputs are those of one go. When the sequence length is not a multiple of b, the
last mini-batch has fewer tokens and is exact too.

Shapes: B batch, T tokens of this piece, H heads, b tokens per mini-batch, n mini-batches, d_v width of values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import dual, update
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens
from ttt_jax.ttt.learner import Weights, norm_per_head
from ttt_jax.ttt.state import InnerState, initial_state
from ttt_jax.ttt.update import Gate


class Statistics(NamedTuple):
    """What the inner loop did, for each token of each sequence and head, [B, T, H]: the self-supervised loss of the
    token at three weights, and how far the last of them are from W0."""

    loss_at_w0: jax.Array  # at the W0 of the sequence
    loss_before: jax.Array  # at the weights that the token's mini-batch starts with
    loss_after: jax.Array  # after the step of the token's mini-batch (of its part in this piece)
    weight_distance: jax.Array  # |W - W0| of those weights, over all weights and biases of the head (Frobenius)


class Result(NamedTuple):
    """What :func:`run` returns."""

    z: jax.Array  # [B, T, H, d_v], in the dtype of q
    state: InnerState  # after the last token
    statistics: Statistics | None


# (loop, parameters, weights at the start, tokens) -> (z, weights at the end), both of whole mini-batches
Kernel = Callable[..., tuple[jax.Array, Weights]]


def run(
    loop: InnerLoop,
    parameters: Parameters,
    tokens: Tokens,
    state: InnerState | None = None,
    *,
    remat_group: int = 0,
    unroll: int = 1,
    statistics: bool = False,
    kernel: Kernel | None = None,
) -> Result:
    """Read T tokens, taking one step per mini-batch of b.

    Args:
      loop: the five choices.
      parameters: W0, what is constant in the inner loop, and the rates of the positions, whose number is b.
      tokens: q, k (after RoPE), v, rates and gates, any float dtype; the inner loop computes in float32 (in float64
        where W0 is).
      state: where an earlier piece of the same sequences ended; None starts them.
      remat_group: mini-batches between two stored W in the backward pass; what lies between is computed again.
        0 stores everything.
      unroll: mini-batches per iteration of the compiled loop.
      statistics: also return :class:`Statistics`; always by the scan.
      kernel: reads the mini-batches that are known to be whole instead of the scan, such as
        :func:`ttt_jax.ttt.kernels.run.run`.

    Returns:
      Outputs ``z[t] = f(q[t]; W_t)``, the state after the last token, statistics or None.

    Raises:
      ValueError: where a gate that the update reads is missing.
    """
    eta = tokens.eta if tokens.eta.ndim == 4 else tokens.eta[..., None]
    gates = update.gates_per_token(loop.update, tokens.gates or {}, tokens.eta)
    inputs = tokens._replace(eta=eta, gates={name: gate[..., None] for name, gate in gates.items()})
    reader = _Reader(loop, parameters, remat_group, unroll, statistics, kernel)
    z, end, stats = _whole(reader, inputs) if state is None else _continued(reader, inputs, state)
    return Result(z.astype(tokens.q.dtype), end, Statistics(*stats) if statistics else None)


class _Reader(NamedTuple):
    """What stays the same for all mini-batches of a call."""

    loop: InnerLoop
    parameters: Parameters
    remat_group: int
    unroll: int
    statistics: bool
    kernel: Kernel | None

    @property
    def b(self) -> int:
        return len(self.parameters.position_eta)

    @property
    def uses_kernel(self) -> bool:
        return self.kernel is not None and not self.statistics

    def read(self, start: InnerState, pending: Weights | None, tokens: Tokens, filled: Any):
        """Read (a part of) one mini-batch.

        Args:
          start: where its reading starts.
          pending: what earlier parts of the mini-batch left; None where it is known that there are none.
          tokens: [B, H, n, ...], beginning at the first place of the mini-batch, or with empty places before them.
          filled: places of the mini-batch that are filled after them.

        Returns:
          the state as if the mini-batch ended here, what is pending if it does not, the totals of the gates, z, and
          the statistics.
        """
        loop, (w0, constants, position_eta) = self.loop, self.parameters
        tokens = jax.tree.map(lambda x: x.astype(start.weights[0].weight.dtype), tokens)
        count = jnp.arange(1, tokens.q.shape[-2] + 1)[:, None]
        gates = {}
        for name, value in (tokens.gates or {}).items():
            before = 0.0 if start.gates is None else start.gates[name][..., None, None]
            gates[name] = Gate(value, before + jnp.cumsum(value, -2), count)
        last = {name: _at(gate, filled - 1) for name, gate in gates.items()}
        rate = position_eta[filled - 1]

        used = update.used_weights(loop.update, start.weights, w0)
        begin = dual.Start(used, pending, start.slots)
        z, keys = dual.mini_batch(loop, constants, begin, tokens, position_eta[: tokens.q.shape[-2]], gates)
        if pending is None and not loop.update and isinstance(filled, int) and filled == self.b:
            step = dual.gradient(loop, keys, rate)  # the rate goes to the small factor
            weights, slots = jax.tree.map(lambda w, g: w - g, start.weights, step), ()
        else:
            left = dual.gradient(loop, keys, gates=gates)
            pending = left if pending is None else jax.tree.map(jnp.add, self._shrunk(pending, gates), left)
            weights, slots = update.step(loop.update, start.weights, start.slots, pending, last, rate, w0)
        after = start._replace(weights=weights, slots=slots)
        stats = self._statistics(used, keys, tokens, weights)
        return after, pending, {name: gate.total[..., 0, 0] for name, gate in last.items()}, (z, stats)

    def _shrunk(self, pending: Weights, gates: dict[str, Gate]) -> Weights:
        """Return what earlier parts of a mini-batch left, decayed by these tokens."""
        decay = update.decay_of(self.loop.update)
        if decay is None:
            return pending
        factor = jnp.exp(gates[decay.gate].value.sum(-2, keepdims=True))
        return jax.tree.map(lambda p: factor * p, pending)

    def _statistics(self, used: Weights, keys: dual.Pass, tokens: Tokens, weights: Weights) -> tuple[jax.Array, ...]:
        """Return those of a mini-batch, [B, H, b] each; none when they were not asked for."""
        if not self.statistics:
            return ()
        loop, (w0, constants, _) = self.loop, self.parameters

        def loss(weights):
            return loop.objective(loop.learner.apply(weights, constants, tokens.k), tokens.v)

        new = update.used_weights(loop.update, weights, w0)
        at_start = loop.objective(keys.f_k, tokens.v) if update.decay_of(loop.update) is None else loss(used)
        change = jax.lax.stop_gradient(jax.tree.map(jnp.subtract, new, w0))  # |x| has no gradient at 0
        distance = jnp.broadcast_to(norm_per_head(change)[..., None], tokens.k.shape[:-1])
        return loss(w0), at_start, loss(new), distance


def _whole(reader: _Reader, inputs: Tokens):
    """Read from the start of the sequence: mini-batches of b, then one of the T mod b tokens that are left."""
    batch, tokens = inputs.q.shape[:2]
    b = reader.b
    n, rest = divmod(tokens, b)

    def step(state: InnerState, x: Tokens):
        after, _, _, y = reader.read(state, None, x, b)
        return after, y

    start = initial_state(reader.parameters.w0, batch, reader.loop.update)
    state = start._replace(gates=None)  # none pending
    outputs = []
    if n and reader.uses_kernel:
        weights, z = _by_kernel(reader, state.weights, jax.tree.map(lambda x: x[:, : n * b], inputs))
        state = state._replace(weights=weights)
        outputs.append((z, ()))
    elif n:
        head = jax.tree.map(lambda x: _split(x[:, : n * b], b), inputs)
        state, ys = _grouped_scan(step, state, head, reader.remat_group, reader.unroll)
        outputs.append(_join_outputs(ys))
    pending, gates = start.pending, start.gates
    if rest:
        tail = jax.tree.map(lambda x: _split(x[:, n * b :], rest)[0], inputs)
        _, pending, gates, y = reader.read(state, None, tail, rest)
        outputs.append(_join_outputs(jax.tree.map(lambda y: y[None], y)))
    z, stats = jax.tree.map(lambda *y: jnp.concatenate(y, axis=1), *outputs)
    end = state._replace(pending=pending, gates=gates, position=jnp.asarray(tokens, jnp.int32))
    return z, end, stats


def _continued(reader: _Reader, inputs: Tokens, state: InnerState):
    """Read from any position: the tokens are laid out on the grid of mini-batches, with empty places (rate 0) before
    the first and after the last one, and a mini-batch takes its step once its last place has been filled."""
    tokens = inputs.q.shape[1]
    b = reader.b
    offset = state.position % b
    n = -(-(tokens + b - 1) // b)  # enough for every offset

    def on_grid(x, mode="constant"):
        return jnp.roll(jnp.pad(x, ((0, 0), (0, n * b - tokens), (0, 0), (0, 0)), mode), offset, axis=1)

    def step(carry: InnerState, x):
        x, filled = x
        after, pending, gates, y = reader.read(carry, carry.pending, x, filled)
        inside = carry._replace(pending=pending, gates=gates)
        zeros = jax.tree.map(jnp.zeros_like, (pending, gates))
        whole = after._replace(pending=zeros[0], gates=zeros[1])
        return jax.tree.map(lambda x, y: jnp.where(filled == b, x, y), whole, inside), y

    filled = jnp.clip(offset + tokens - b * jnp.arange(n), 0, b)  # places filled when this piece ends
    # Empty places hold a token that is there, since a learner may have no gradient at zeros; its rate is 0.
    q, k, v = (on_grid(x, "edge") for x in inputs[:3])
    eta, gates = jax.tree.map(on_grid, (inputs.eta, inputs.gates))
    grid = Tokens(q, k, v, eta, gates)

    def scan(state, first, last):
        xs = (jax.tree.map(lambda x: _split(x[:, first * b : last * b], b), grid), filled[first:last])
        state, ys = _grouped_scan(step, state, xs, reader.remat_group, reader.unroll)
        return state, _join_outputs(ys)

    if reader.uses_kernel and n > 3:  # all but the first and the last two mini-batches are whole at every offset
        state_then, first = scan(state, 0, 1)
        inner = jax.tree.map(lambda x: x[:, b : (n - 2) * b], grid)
        weights, z = _by_kernel(reader, state_then.weights, inner)
        end, last = scan(state_then._replace(weights=weights), n - 2, n)
        ys = jax.tree.map(lambda *y: jnp.concatenate(y, axis=1), first, (z, ()), last)
    else:
        end, ys = scan(state, 0, n)
    z, stats = jax.tree.map(lambda y: jax.lax.dynamic_slice_in_dim(y, offset, tokens, axis=1), ys)
    return z, end._replace(position=state.position + tokens), stats


def _by_kernel(reader: _Reader, weights: Weights, inputs: Tokens) -> tuple[Weights, jax.Array]:
    """Read whole mini-batches; return the weights after them, and z."""
    assert reader.kernel is not None
    tokens = inputs._replace(eta=inputs.eta[..., 0].astype(jnp.float32))
    z, weights = reader.kernel(reader.loop, reader.parameters, weights, tokens)
    return weights, z.astype(jnp.float32)


def _at(gate: Gate, place: Any) -> Gate:
    """Return a gate as of one place of a mini-batch; ``place`` may be traced."""
    value, total = (jax.lax.dynamic_slice_in_dim(x, place, 1, -2) for x in (gate.value, gate.total))
    return Gate(value, total, jnp.maximum(place + 1, 1))


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
