"""A sequence through the inner loop: a scan over mini-batches in the dual form.

A sequence may be read in pieces cut anywhere, also inside a mini-batch: the state that one piece ends with is what
the next one starts from, and the outputs are those of one go. When the sequence length is not a multiple of b, the
last mini-batch has fewer tokens and is exact too. Rows of a batch may have padding anywhere, and documents that begin
anywhere: each is read as if it were alone.

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
from ttt_jax.ttt.reader import Reader, Slots
from ttt_jax.ttt.windows import Windows


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


_FEW = 3  # fewer windows than that are read in one way: fewer programs to compile

# (loop, parameters, weights at the start, tokens) -> (z, weights at the end), both of whole mini-batches
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
    """Read T tokens, taking one step per mini-batch of b.

    Args:
      loop: the five choices.
      parameters: W0, what is constant in the inner loop, and the rates of the positions, whose number is b.
      tokens: q, k (after RoPE), v, rates and gates, any float dtype; the inner loop computes in float32 (in float64
        where W0 is).
      state: where an earlier piece of the same sequences ended; None starts them.
      valid: bool [B, T], which tokens are some; the others are padding, which changes nothing: z is 0 there, and no
        gradient comes back. None where there is no padding.
      reset: bool [B, T], the tokens with which a document begins: the inner loop starts anew at W0, and a mini-batch
        begins. None where none begins after the start of the sequence.
      aligned: whether the caller promises that there is no padding, and that in each row the piece and all documents
        begin a multiple of b tokens after the start of the document and of the piece. It is read faster then. In rows
        that break the promise, z and the weights of the state are NaN.
      remat_group: mini-batches between two stored W in the backward pass; what lies between is computed again.
        0 stores everything.
      unroll: mini-batches per iteration of the compiled loop.
      statistics: also return :class:`Statistics`; always by the scan.
      kernel: reads the mini-batches that are whole instead of the scan, such as
        :func:`ttt_jax.kernels.run.run`; where documents begin in the piece, only if it is aligned.

    Returns:
      Outputs ``z[t] = f(q[t]; W_t)``, the state after the last token, statistics or None.

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
    """How mini-batches are read one after the other."""

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
        """Read all windows by ``step``; return the state, and of each slot z and the statistics."""
        state, ys = _grouped_scan(step, state, xs, self.remat_group, self.unroll)
        return state, _join_outputs(ys)


def _whole(scan: _Scan, inputs: Tokens, given: InnerState | None, valid, reset):
    """Read mini-batches of b from the first token on, then one of the T mod b tokens that are left."""
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
    """Return which rows are aligned as promised, [B]; None where nothing could be wrong."""
    found = []
    if state is not None:
        first = False if reset is None else reset[:, 0]
        found.append((state.position % b == 0) | first)
    if valid is not None:
        found.append(valid.all(1))
    if reset is not None:
        found.append(~(reset & (jnp.arange(reset.shape[1]) % b > 0)).any(1))
    return functools.reduce(jnp.logical_and, found) if found else None


def _in_windows(scan: _Scan, inputs: Tokens, given: InnerState | None, valid, reset):
    """Read tokens of any place in their sequences, with padding, in the windows of :mod:`ttt_jax.ttt.windows`."""
    reader = scan.reader
    batch, tokens = inputs.q.shape[:2]
    windows = windows_lib.lay(tokens, reader.b, None if given is None else given.position, valid, reset)
    n, c = windows.source.shape[1:]
    state = reader.fresh(batch) if given is None else given
    in_slots = _filled_up(jax.tree.map(windows.put, inputs), windows.filled.reshape(batch, -1))  # [B, n * c, ...]

    def slots(first: int, last: int) -> Slots:
        """Return windows as the scan takes them, [n, B, ...]."""
        tokens = jax.tree.map(lambda x: _split(x[:, first * c : last * c], c), in_slots)
        rest = windows.filled, windows.place, windows.begins
        return Slots(tokens, *jax.tree.map(lambda x: x[:, first:last].swapaxes(0, 1), rest))

    carried = given is not None and reset is None and scan.kernel is None  # a plain piece: the scan alone is as fast
    if reader.statistics or n < _FEW or carried:
        state, y = scan.by_scan(_unless_empty(reader.window), state, slots(0, n))
    else:
        state, y = _in_three_parts(scan, state, in_slots, windows, slots, 0 if given is None else 1)
    z, stats = jax.tree.map(windows.back, y)
    return z, state._replace(position=windows.position), stats


def _in_three_parts(scan: _Scan, state: InnerState, in_slots: Tokens, windows: Windows, slots: Callable, first: int):
    """Read windows as if nothing were pending between them, by a kernel where one is given and no document begins.

    Something is pending before the ``first`` windows, 0 or 1, which are read on their own, and after the last one of
    each row, which is read again where it leaves something.
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
        part = jnp.repeat(unfinished[:, None] & (jnp.arange(n - first) == last[:, None]), c, 1)[..., None, None]
        weights, z = scan.by_kernel(state.weights, after._replace(eta=jnp.where(part, 0, after.eta)))  # no step there
        state = state._replace(weights=weights, pending=pending, gates=gates)
        state, (tail, _) = scan.by_scan(window, state, left)
        z = jnp.where(part, jnp.tile(tail, (1, n - first, 1, 1)), z)
    return state, (jnp.concatenate([*outputs, z], 1), ())


def _unless_empty(step: Callable) -> Callable:
    """Return a step that costs nothing where no row has a token in the window."""

    def empty(state, slots):
        _, y = jax.eval_shape(step, state, slots)
        return state, jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), y)

    def unless(state, slots):
        if slots.begins is None:  # then all windows but the last ones have tokens
            return step(state, slots)
        return jax.lax.cond(slots.filled.any(), step, empty, state, slots)

    return unless


def _filled_up(tokens: Tokens, filled: jax.Array) -> Tokens:
    """Put a vector like any other into empty slots, [B, n * c]: a learner may have no gradient at zeros."""

    def vector(x):
        return jnp.where(filled[..., None, None], x, jnp.cos(1.0 + jnp.arange(x.shape[-1])).astype(x.dtype))

    return tokens._replace(q=vector(tokens.q), k=vector(tokens.k), v=vector(tokens.v))


def _grouped_scan(step: Callable, carry: Any, xs: Any, group: int, unroll: int):
    """Scan over n mini-batches like ``lax.scan``; store the carry every ``group`` of them for the backward pass."""

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
    """Return tokens by mini-batch, [B, n * b, H, d] to [n, B, H, b, d]."""
    batch, tokens, heads, d = x.shape
    return x.reshape(batch, tokens // b, b, heads, d).transpose(1, 0, 3, 2, 4)


def _join_outputs(ys):
    """Return what there is of each token, a tree, in their order, [n, B, H, b, ...] to [B, n * b, H, ...]."""

    def join(y):
        n, batch, heads, b, *rest = y.shape
        return jnp.moveaxis(y, (1, 3), (0, 2)).reshape(batch, n * b, heads, *rest)

    return jax.tree.map(join, ys)
