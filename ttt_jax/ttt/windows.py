"""Lay the tokens of a piece into windows, and read the windows, with padding and beginnings of documents anywhere.

The tokens of a row go into windows of c slots, in their order, and fill the first slots of each window; padding gets no
slot. No mini-batch is split between two windows. To find the windows, count the tokens of the row from place 0 of its
current mini-batch, and cut the count into cells of b tokens. Each row then has up to two windows per cell, in order:

    the tokens inside the cell                 one mini-batch, or the end of a document and then documents of fewer than
                                               b tokens
    a mini-batch that reaches into the next    one mini-batch

Mini-batches reach into the next cell only after a document has begun inside a cell. Where no document begins inside the
piece, there is one window per cell.

A window is a mini-batch, a part of one, or several short documents. The *place* of a token is its index in its
mini-batch, from 0. Where all rows of a batch are known to begin a mini-batch with the window, token i has place i.
Otherwise each token has its own place, and the tokens of a row fill the first slots of the window: first those of the
current mini-batch, then documents that begin in the window, each of which ends before it fills a mini-batch.

Shapes: B batch, H heads, T tokens of this piece, b tokens per mini-batch, n windows of c slots.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import dual, update
from ttt_jax.ttt.inner_loop import InnerLoop, InnerState, Parameters, Tokens, initial_state, where
from ttt_jax.ttt.learner import Weights, norm_per_head
from ttt_jax.ttt.update import Gate


class Windows(NamedTuple):
    """The tokens of a piece in windows."""

    source: jax.Array  # the token in each slot, T or more in an empty slot, int32 [B, n, c]
    target: jax.Array  # the slot of each token among all n * c slots, n * c or more for padding, int32 [B, T]
    place: jax.Array  # the place in its mini-batch of the token in each slot, 0 in an empty slot, int32 [B, n, c]
    begins: jax.Array | None  # whether a document begins with the token in the slot, bool [B, n, c]; None: in no slot
    position: jax.Array  # tokens of its current document that each row has read after the piece, int32 [B]

    @property
    def filled(self) -> jax.Array:
        """Return whether each slot holds a token, bool [B, n, c]."""
        return self.source < self.target.shape[1]

    def put(self, x: jax.Array) -> jax.Array:
        """Put an array of tokens into the slots, [B, T, ...] to [B, n * c, ...]; empty slots get zeros."""
        return _take(x, self.source.reshape(len(x), -1))

    def back(self, y: jax.Array) -> jax.Array:
        """Put an array of slots back in the order of the tokens, [B, n * c, ...] to [B, T, ...]; padding gets zeros."""
        return _take(y, self.target)


def lay(
    tokens: int, b: int, position: jax.Array | None, valid: jax.Array | None = None, reset: jax.Array | None = None
) -> Windows:
    """Lay the tokens of a piece into windows.

    Args:
      tokens: T.
      position: tokens of its current document that each row has read before the piece, [B]; None where all rows are at
        the start of a document.
      valid: bool [B, T], false at padding; None for no padding.
      reset: bool [B, T], true at the first token of a document; None for no such token.
    """
    rows = next(len(x) for x in (position, valid, reset) if x is not None)
    c, cells = min(b, tokens), -(-(tokens + (0 if position is None else b - 1)) // b)
    position = jnp.zeros(rows, jnp.int32) if position is None else position
    valid = jnp.ones((rows, tokens), bool) if valid is None else valid
    count = jnp.cumsum(valid, 1, dtype=jnp.int32)
    line = position[:, None] % b + count - 1  # [B, T], tokens from place 0 of the current mini-batch to each token
    end = line[:, -1:] + 1
    if reset is None:
        n, place, window = cells, line % b, line // b
        read = position + count[:, -1]
    else:
        n, reset = 2 * cells - 1, reset & valid
        # [B, T], the count, from 1, of the first token of the document of each token; 0 if that is before the piece.
        first = jax.lax.cummax(jnp.where(reset, count, 0), axis=1)
        place = jnp.where(first > 0, count - first, line) % b
        starts = jnp.where(valid & (place == 0), line, end)
        following = jax.lax.cummin(jnp.concatenate([starts[:, 1:], end], 1), axis=1, reverse=True)
        window = (line - place) // b + (following - 1) // b
        read = jnp.where(first[:, -1] > 0, count[:, -1] - first[:, -1] + 1, position + count[:, -1])
    before = jax.lax.cummax(jnp.where(valid, window, -1), axis=1)
    new = valid & (window != jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)[:, :-1])
    slot = line - jax.lax.cummax(jnp.where(new, line, 0), axis=1)
    # [B, T], the window of each token without counting empty windows, so that rows have theirs at the same time.
    window = jnp.cumsum(new, 1, dtype=jnp.int32) - 1
    now = jnp.arange(tokens, dtype=jnp.int32)
    target = jnp.where(valid, window * c + slot, n * c + now)
    slots = jnp.broadcast_to(tokens + jnp.arange(n * c, dtype=jnp.int32), (rows, n * c))
    source = jax.vmap(lambda x, i: x.at[i].set(now, mode="drop", unique_indices=True))(slots, target)

    def put(x):
        return _take(x, source).reshape(rows, n, c)

    return Windows(source.reshape(rows, n, c), target, put(place), None if reset is None else put(reset), read)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return ``x[i, index[i, j]]``, zero where the index is out of bounds; indices within bounds must be unique."""

    def row(x, index):
        return x.at[index].get(mode="fill", fill_value=0, unique_indices=True)

    return jax.vmap(row)(x, index)


class Slots(NamedTuple):
    """The contents of the slots of a window."""

    tokens: Tokens  # [B, H, c, ...]; empty slots hold numbers at which the learner has a gradient
    filled: jax.Array  # whether the slot holds a token, bool [B, c]
    place: jax.Array  # the place of the token in its mini-batch, int32 [B, c]
    begins: jax.Array | None  # whether a document begins with the token, bool [B, c]; None: in no slot of any window


class Reader(NamedTuple):
    """A reader of windows: what is the same for all windows of a sequence."""

    loop: InnerLoop
    parameters: Parameters
    statistics: bool

    @property
    def b(self) -> int:
        return len(self.parameters.position_eta)

    def fresh(self, batch: int) -> InnerState:
        """Return the state at the start of a document."""
        return initial_state(self.parameters.w0, batch, self.loop.update)

    def window(self, state: InnerState, slots: Slots) -> tuple[InnerState, Any]:
        """Return the state after a window, with its position unchanged, and the outputs z and statistics of its slots.

        Where ``state.pending`` is None, no gradient of earlier tokens is pending, and that of the window is dropped.
        """
        kept = state.pending is not None
        document = jnp.zeros_like(slots.place)  # [B, c], documents that begin after the first slot, up to each slot
        if slots.begins is not None:
            fresh = self.fresh(len(slots.place))
            fresh = fresh if kept else fresh._replace(pending=None, gates=None)
            state = where(slots.begins[:, 0], fresh, state)
            document = jnp.cumsum(slots.begins.at[:, 0].set(False), 1)
        mask = slots.filled & (document == 0)
        after, pending, totals, y = self.mini_batch(state, state.pending, slots.tokens, slots.place, mask)
        if kept:
            zeros = jax.tree.map(jnp.zeros_like, (pending, totals))
            after = after._replace(pending=zeros[0], gates=zeros[1])
            state = state._replace(pending=pending, gates=totals)
        if kept or self.loop.update:  # otherwise mini_batch took a step of rate 0 where the mini-batch is not full
            after = where(self._full(slots.place, mask), after, state)
        end = after, y
        if slots.begins is None:
            return end

        def with_documents(end):
            read = self._documents_in_turn if self.statistics else self._documents
            return read(fresh, slots, document, *end)

        return jax.lax.cond((document > 0).any(), with_documents, lambda end: end, end)

    def mini_batch(
        self,
        start: InnerState,
        pending: Weights | None,
        tokens: Tokens,
        place: jax.Array | None = None,
        mask: jax.Array | None = None,
    ):
        """Read tokens of one mini-batch.

        Args:
          start: the state before the tokens; its gates may be None where nothing is pending.
          pending: the gradient of earlier tokens of the mini-batch; None where there are no earlier tokens in any row.
          tokens: [B, H, c, ...].
          place: the place of each token in the mini-batch, [B, c]; None for 0 to c - 1.
          mask: the tokens to read, [B, c]; None for all.

        Returns:
          the state if the mini-batch ends here, the pending gradient if it does not, the sums of the gates, and the
          pair of z and the statistics.
        """
        loop, (w0, constants, position_eta) = self.loop, self.parameters
        tokens = self._only(tokens, mask)
        c = tokens.q.shape[-2]
        if place is None or mask is None:
            last: Any = c - 1
            rates, count, rate = position_eta[:c], jnp.arange(1, c + 1)[:, None], position_eta[c - 1]
        else:
            rates, count = position_eta[place][:, None], place[:, None, :, None] + 1
            last = jnp.where(mask, jnp.arange(c), 0).max(1)[:, None, None, None]
            rate = jnp.take_along_axis(rates[..., None], last, -2)
            if pending is None:
                rate = jnp.where(self._full(place, mask)[:, None, None, None], rate, 0.0)
        gates = {}
        for name, value in (tokens.gates or {}).items():
            before = 0.0 if start.gates is None else start.gates[name][..., None, None]
            gates[name] = Gate(value, before + jnp.cumsum(value, -2), count)
        at_last = {name: _at(gate, last) for name, gate in gates.items()}

        used = update.used_weights(loop.update, start.weights, w0)
        z, keys = dual.mini_batch(loop, constants, dual.Start(used, pending, start.slots), tokens, rates, gates)
        if pending is None and not loop.update and c == self.b:
            step = dual.gradient(loop, keys, rate)
            weights, kept = jax.tree.map(lambda w, g: w - g, start.weights, step), ()
        else:
            left = dual.gradient(loop, keys, gates=gates)
            pending = left if pending is None else jax.tree.map(jnp.add, self._shrunk(pending, gates), left)
            weights, kept = update.step(loop.update, start.weights, start.slots, pending, at_last, rate, w0)
        totals = {name: gate.total[..., 0, 0] for name, gate in at_last.items()}
        after = start._replace(weights=weights, slots=kept)
        return after, pending, totals, (z, self._statistics(used, keys, tokens, weights))

    def _documents(self, fresh: InnerState, slots: Slots, document: jax.Array, state: InnerState, y: Any):
        """Read at once all documents that begin after the first slot: all start from W0, and none takes a step.

        Return the state after the last document of each row and z of the tokens of documents; in rows without such
        documents and for other tokens, the ``state`` and ``y`` given.
        """
        loop, (w0, constants, position_eta) = self.loop, self.parameters
        mask = slots.filled & (document > 0)
        tokens = self._only(slots.tokens, mask)
        together = (document[:, :, None] == document[:, None])[:, None]  # [B, 1, c, c]
        earlier = together & jnp.tril(jnp.ones(together.shape[-2:], bool))
        gates = {
            name: Gate(
                value,
                jnp.where(earlier, value.swapaxes(-1, -2), 0.0).sum(-1, keepdims=True),
                slots.place[:, None, :, None] + 1,
            )
            for name, value in (tokens.gates or {}).items()
        }
        start = dual.Start(update.used_weights(loop.update, fresh.weights, w0), None, fresh.slots)
        rates = position_eta[slots.place][:, None]
        z, keys = dual.mini_batch(loop, constants, start, tokens, rates, gates, together)
        y = _where_slots(mask, (z, ()), y)
        if state.pending is None:
            return state, y

        last = together[..., -1:]  # the tokens of the last document, [B, 1, c, 1]
        keys = keys._replace(scaled=tuple(jnp.where(last, x, 0.0) for x in keys.scaled))
        of_last = {
            name: gate._replace(total=jnp.where(last, gate.total, gate.total[..., -1:, :]))
            for name, gate in gates.items()
        }
        totals = {name: gate.total[..., -1, 0] for name, gate in gates.items()}
        end = fresh._replace(pending=dual.gradient(loop, keys, gates=of_last), gates=totals)
        return where(document[:, -1] > 0, end, state), y

    def _documents_in_turn(self, fresh: InnerState, slots: Slots, document: jax.Array, state: InnerState, y: Any):
        """Do the same as :meth:`_documents`, with statistics, which take the step of each document."""

        def read(mask, end):
            _, pending, totals, y = self.mini_batch(fresh, fresh.pending, slots.tokens, slots.place, mask)
            return where(mask.any(1), fresh._replace(pending=pending, gates=totals), end[0]), _where_slots(
                mask, y, end[1]
            )

        def step(end, i):
            mask = slots.filled & (document == i)
            return jax.lax.cond(mask.any(), read, lambda _, end: end, mask, end), None

        return jax.lax.scan(step, (state, y), jnp.arange(1, document.shape[1]))[0]

    def _full(self, place: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the rows in which the tokens fill their mini-batch, bool [B]."""
        return (mask & (place == self.b - 1)).any(1)

    def _only(self, tokens: Tokens, mask: jax.Array | None) -> Tokens:
        """Return tokens in the dtype of the inner loop, with rates and gates of 0 where the mask is false."""
        dtype = jnp.promote_types(self.parameters.w0[0].weight.dtype, jnp.float32)
        tokens = jax.tree.map(lambda x: x.astype(dtype), tokens)
        if mask is None:
            return tokens
        eta, gates = jax.tree.map(lambda x: jnp.where(mask[:, None, :, None], x, 0.0), (tokens.eta, tokens.gates))
        return tokens._replace(eta=eta, gates=gates)

    def _shrunk(self, pending: Weights, gates: dict[str, Gate]) -> Weights:
        """Return the gradient of earlier parts of a mini-batch, decayed by the tokens of these gates."""
        decay = update.decay_of(self.loop.update)
        if decay is None:
            return pending
        factor = jnp.exp(gates[decay.gate].value.sum(-2, keepdims=True))
        return jax.tree.map(lambda p: factor * p, pending)

    def _statistics(self, used: Weights, keys: dual.Pass, tokens: Tokens, weights: Weights) -> tuple[jax.Array, ...]:
        """Return the fields of ``scan.Statistics`` for a mini-batch, [B, H, c] each; () where they are not wanted."""
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


def _at(gate: Gate, last: Any) -> Gate:
    """Return a gate at one slot: an integer, or one slot per row, [B, 1, 1, 1]."""

    def at(x):
        return x[..., last : last + 1, :] if isinstance(last, int) else jnp.take_along_axis(x, last, -2)

    return Gate(at(gate.value), at(gate.total), at(gate.tokens))


def _where_slots(mask: jax.Array, x: Any, y: Any) -> Any:
    """Return the tree ``x`` in the slots where ``mask`` [B, c] is true, else ``y``; leaves [B, H, c, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(mask.reshape(len(mask), 1, -1, *[1] * (x.ndim - 3)), x, y), x, y)
