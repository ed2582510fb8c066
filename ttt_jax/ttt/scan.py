"""Run the inner loop over a sequence: a scan over mini-batches, each in the dual form.

A sequence may be read in pieces cut anywhere, also inside a mini-batch: the next piece starts from the state that the
previous piece returns, and the outputs equal those of reading the sequence at once. Where T is not a multiple of b, the
last mini-batch has fewer tokens and is exact too. Rows of a batch may have padding and beginnings of documents at any
token: each document is read as if it were alone.

Shapes: B batch, T tokens of this piece, H heads, b tokens per mini-batch, n mini-batches, d_v width of values.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import update
from ttt_jax.ttt import windows as windows_lib
from ttt_jax.ttt.inner_loop import InnerLoop, InnerState, Parameters, Tokens, where
from ttt_jax.ttt.learner import Weights
from ttt_jax.ttt.windows import Reader, Slots, Windows


class Statistics(NamedTuple):
    """The self-supervised loss of each token at three weights, and the distance of the last from W0, [B, T, H] each."""

    loss_at_w0: jax.Array  # at the W0 of the sequence
    loss_before: jax.Array  # at the weights that the token's mini-batch starts with
    loss_after: jax.Array  # after the step of the token's mini-batch, as far as this piece reads it
    weight_distance: jax.Array  # |W - W0| after that step, the Frobenius norm over all weights and biases of the head


class Result(NamedTuple):
    """The result of :func:`run`."""

    z: jax.Array  # [B, T, H, d_v], in the dtype of q
    state: InnerState  # after the last token
    statistics: Statistics | None


_FEW = 3  # with fewer windows, a single scan reads them all: one program to compile instead of three

# (loop, parameters, weights at the start, tokens) -> (z, weights at the end), for whole mini-batches
Kernel = Callable[..., tuple[jax.Array, Weights]]


def run(
    loop: InnerLoop,
    parameters: Parameters,
    tokens: Tokens,
    state: InnerState | None = None,
    *,
    valid: jax.Array | None = None,
    reset: jax.Array | None = None,
    aligned: bool = False,
    remat_group: int = 0,
    unroll: int = 1,
    statistics: bool = False,
    kernel: Kernel | None = None,
) -> Result:
    """Read T tokens and take one step per mini-batch of b tokens.

    Args:
      loop: the five choices.
      parameters: W0, the constants of f, and the rates of the positions [b].
      tokens: q, k (after RoPE), v, rates and gates, in any float dtype. The inner loop computes in float32, or in
        float64 where W0 is.
      state: the state after an earlier piece of the same sequences; None at their start.
      valid: bool [B, T], false at padding, which changes nothing: z is 0 there, and its gradients are 0. None for no
        padding.
      reset: bool [B, T], true at the first token of a document: the weights are W0 again, and a mini-batch begins. None
        where no document begins inside the piece.
      aligned: the promise that there is no padding, that the piece begins at the start of a mini-batch, and that
        documents begin at multiples of b tokens of the piece. This is faster. In rows that break the promise, z and the
        weights of the state are NaN.
      remat_group: mini-batches between two stored W of the backward pass, which computes the rest again; 0 stores
        everything.
      unroll: mini-batches per iteration of the compiled loop.
      statistics: whether to return :class:`Statistics`; no kernel is used then.
      kernel: reads whole mini-batches in place of the scan, such as :func:`ttt_jax.kernels.run.run`. Where documents
        begin inside the piece, it is used only if the piece is aligned.

    Returns:
      The outputs ``z[t] = f(q[t]; W_t)``, the state after the last token, and the statistics or None.

    Raises:
      ValueError: where a gate that the update reads is missing.
    """
    eta = tokens.eta if tokens.eta.ndim == 4 else tokens.eta[..., None]
    gates = update.gates_per_token(loop.update, tokens.gates or {}, tokens.eta)
    inputs = tokens._replace(eta=eta, gates={name: gate[..., None] for name, gate in gates.items()})
    scan = _Scan(Reader(loop, parameters, statistics), remat_group, unroll, None if statistics else kernel)
    if aligned or (state is None and valid is None and reset is None):
        z, end, stats = _whole(scan, inputs, state, valid, reset)
    else:
        z, end, stats = _in_windows(scan, inputs, state, valid, reset)
    return Result(z.astype(tokens.q.dtype), end, Statistics(*stats) if statistics else None)


class _Scan(NamedTuple):
    """The means to read mini-batches one after another: by the scan or by a kernel."""

    reader: Reader
    remat_group: int
    unroll: int
    kernel: Kernel | None

    def by_kernel(self, weights: Weights, inputs: Tokens, restarts: jax.Array | None = None):
        """Read whole mini-batches; return the weights after them, and z."""
        assert self.kernel is not None
        tokens = inputs._replace(eta=inputs.eta[..., 0].astype(jnp.float32))
        flags = {} if restarts is None else {"restarts": restarts}
        z, weights = self.kernel(self.reader.loop, self.reader.parameters, weights, tokens, **flags)
        return weights, z.astype(jnp.float32)

    def by_scan(self, step: Callable, state: InnerState, xs: Any):
        """Read all windows with ``step``; return the state, and z and the statistics of each slot."""
        state, ys = _grouped_scan(step, state, xs, self.remat_group, self.unroll)
        return state, _join_outputs(ys)


def _whole(scan: _Scan, inputs: Tokens, given: InnerState | None, valid, reset):
    """Read whole mini-batches of b tokens from the first token on, then one of the T mod b tokens that are left."""
    reader, b = scan.reader, scan.reader.b
    batch, tokens = inputs.q.shape[:2]
    n, rest = divmod(tokens, b)
    fresh = reader.fresh(batch)
    flags = None if reset is None else reset[:, ::b]  # [B, n + 1 or n]

    def step(state: InnerState, x):
        x, flag = x
        state = state if flag is None else where(flag, fresh._replace(gates=None), state)
        after, _, _, y = reader.mini_batch(state, None, x)
        return after, y

    state = (fresh if given is None else given)._replace(gates=None)  # none pending
    outputs = []
    whole = None if flags is None else flags[:, :n]
    if n and scan.kernel is not None:
        weights, z = scan.by_kernel(state.weights, jax.tree.map(lambda x: x[:, : n * b], inputs), whole)
        state = state._replace(weights=weights)
        outputs.append((z, ()))
    elif n:
        xs = jax.tree.map(lambda x: _split(x[:, : n * b], b), inputs), None if whole is None else whole.T
        state, y = scan.by_scan(step, state, xs)
        outputs.append(y)
    pending, gates = fresh.pending, fresh.gates
    if rest:
        if flags is not None:
            state = where(flags[:, n], fresh._replace(gates=None), state)
        tail = jax.tree.map(lambda x: _split(x[:, n * b :], rest)[0], inputs)
        _, pending, gates, y = reader.mini_batch(state, None, tail)
        outputs.append(_join_outputs(jax.tree.map(lambda y: y[None], y)))
    z, stats = jax.tree.map(lambda *y: jnp.concatenate(y, axis=1), *outputs)
    end = state._replace(pending=pending, gates=gates, position=state.position + tokens)
    if flags is not None:
        last = jnp.where(flags, b * jnp.arange(flags.shape[1], dtype=jnp.int32), -1).max(1)
        end = end._replace(position=jnp.where(last < 0, end.position, tokens - last))
    kept = _promise(b, given, valid, reset)
    if kept is not None:
        z, weights = jax.tree.map(lambda x: where(kept, x, jnp.full_like(x, jnp.nan)), (z, end.weights))
        end = end._replace(weights=weights)
    return z, end, stats


def _promise(b: int, state: InnerState | None, valid, reset) -> jax.Array | None:
    """Return the rows that keep the promise of ``aligned``, bool [B]; None where none can break it."""
    conditions = []
    if state is not None:
        first = False if reset is None else reset[:, 0]
        conditions.append((state.position % b == 0) | first)
    if valid is not None:
        conditions.append(valid.all(1))
    if reset is not None:
        conditions.append(~(reset & (jnp.arange(reset.shape[1]) % b > 0)).any(1))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _in_windows(scan: _Scan, inputs: Tokens, given: InnerState | None, valid, reset):
    """Read tokens at any place in their mini-batches, and padding, by windows (:mod:`ttt_jax.ttt.windows`)."""
    reader = scan.reader
    batch, tokens = inputs.q.shape[:2]
    windows = windows_lib.lay(tokens, reader.b, None if given is None else given.position, valid, reset)
    n, c = windows.source.shape[1:]
    state = reader.fresh(batch) if given is None else given
    in_slots = _fill_empty_slots(
        jax.tree.map(windows.put, inputs), windows.filled.reshape(batch, -1)
    )  # [B, n * c, ...]

    def slots(first: int, last: int) -> Slots:
        """Return the windows from ``first`` to before ``last``, in the order of the scan, [n, B, ...]."""
        tokens = jax.tree.map(lambda x: _split(x[:, first * c : last * c], c), in_slots)
        rest = windows.filled, windows.place, windows.begins
        return Slots(tokens, *jax.tree.map(lambda x: x[:, first:last].swapaxes(0, 1), rest))

    plain_piece = given is not None and reset is None and scan.kernel is None  # a single scan is as fast
    if reader.statistics or n < _FEW or plain_piece:
        state, y = scan.by_scan(_unless_empty(reader.window), state, slots(0, n))
    else:
        state, y = _in_three_parts(scan, state, in_slots, windows, slots, 0 if given is None else 1)
    z, stats = jax.tree.map(windows.back, y)
    return z, state._replace(position=windows.position), stats


def _in_three_parts(scan: _Scan, state: InnerState, in_slots: Tokens, windows: Windows, slots: Callable, first: int):
    """Read windows as if each ended with a step, so that no gradient is pending between windows.

    A gradient may be pending in the first window of a piece, and after the last window of each row. So the ``first``
    windows, 0 or 1, are read on their own, and the last window of each row is read again where it leaves a mini-batch
    unfinished. The others are read by the kernel, where one is given and no document begins inside the piece.
    """
    n, c = windows.source.shape[1:]
    window, outputs = scan.reader.window, []
    if first:
        state, (z, _) = scan.by_scan(window, state, slots(0, first))
        outputs.append(z)
    some = windows.filled.any(-1)[:, first:]  # [B, n - first]
    last = jnp.maximum(some.sum(1) - 1, 0)
    unfinished = some.any(1) & (windows.position % scan.reader.b > 0)

    def of_last(x):  # [n - first, B, ...] -> [1, B, ...]
        return jnp.take_along_axis(x, last.reshape(1, -1, *[1] * (x.ndim - 2)), 0)

    left = jax.tree.map(of_last, slots(first, n))
    begins = None if left.begins is None else left.begins & unfinished[:, None]
    left = left._replace(filled=left.filled & unfinished[:, None], begins=begins)
    none = jax.tree.map(jnp.zeros_like, (state.pending, state.gates))
    pending, gates = where(some.any(1), none, (state.pending, state.gates))
    if scan.kernel is None or windows.begins is not None:
        state = state._replace(pending=None, gates=None)
        state, (z, _) = scan.by_scan(_unless_empty(window), state, slots(first, n))
        state, _ = scan.by_scan(window, state._replace(pending=pending, gates=gates), left)
    else:
        after = jax.tree.map(lambda x: x[:, first * c :], in_slots)
        # [B, (n - first) c, 1, 1], the slots of the unfinished mini-batch of each row: rate 0, so no step.
        part = jnp.repeat(unfinished[:, None] & (jnp.arange(n - first) == last[:, None]), c, 1)[..., None, None]
        weights, z = scan.by_kernel(state.weights, after._replace(eta=jnp.where(part, 0, after.eta)))
        state = state._replace(weights=weights, pending=pending, gates=gates)
        state, (tail, _) = scan.by_scan(window, state, left)
        z = jnp.where(part, jnp.tile(tail, (1, n - first, 1, 1)), z)
    return state, (jnp.concatenate([*outputs, z], 1), ())


def _unless_empty(step: Callable) -> Callable:
    """Return ``step`` such that a window without a token in any row costs nothing."""

    def empty(state, slots):
        _, y = jax.eval_shape(step, state, slots)
        return state, jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), y)

    def unless(state, slots):
        if slots.begins is None:  # only the last windows can be empty: not worth a condition
            return step(state, slots)
        return jax.lax.cond(slots.filled.any(), step, empty, state, slots)

    return unless


def _fill_empty_slots(tokens: Tokens, filled: jax.Array) -> Tokens:
    """Put an ordinary vector into each empty slot, where ``filled`` [B, n * c] is false.

    A learner may have no gradient at zeros, and NaN times the rate 0 would be NaN.
    """

    def vector(x):
        return jnp.where(filled[..., None, None], x, jnp.cos(1.0 + jnp.arange(x.shape[-1])).astype(x.dtype))

    return tokens._replace(q=vector(tokens.q), k=vector(tokens.k), v=vector(tokens.v))


def _grouped_scan(step: Callable, carry: Any, xs: Any, group: int, unroll: int):
    """Scan over n mini-batches like ``lax.scan``, and store only every ``group``-th carry for the backward pass."""

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
    """Split tokens into mini-batches of b, [B, n * b, H, d] to [n, B, H, b, d]."""
    batch, tokens, heads, d = x.shape
    return x.reshape(batch, tokens // b, b, heads, d).transpose(1, 0, 3, 2, 4)


def _join_outputs(ys):
    """Join the outputs of mini-batches in the order of the tokens; leaves [n, B, H, b, ...] to [B, n * b, H, ...]."""

    def join(y):
        n, batch, heads, b, *rest = y.shape
        return jnp.moveaxis(y, (1, 3), (0, 2)).reshape(batch, n * b, heads, *rest)

    return jax.tree.map(join, ys)
