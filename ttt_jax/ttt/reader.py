"""One window of tokens through the inner loop: a mini-batch, a part of one, or several short documents.

Where it is known that all rows have the first tokens of a mini-batch, or all of them, token i has place i. Otherwise
each token has a place of its own, and those of a row are in the first slots of the window: the mini-batch at hand, then
documents that begin in the window, all of which end before they fill a mini-batch (:mod:`ttt_jax.ttt.windows`).

Shapes: B batch, H heads, b tokens per mini-batch, c slots of this window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import dual, update
from ttt_jax.ttt.inner_loop import InnerLoop, InnerState, Parameters, Tokens, initial_state, where
from ttt_jax.ttt.learner import Weights, norm_per_head
from ttt_jax.ttt.update import Gate


class Slots(NamedTuple):
    """What is in the slots of a window."""

    tokens: Tokens  # [B, H, c, ...]; in an empty slot, numbers at which the learner has a gradient
    filled: jax.Array  # whether there is a token, bool [B, c]
    place: jax.Array  # of the token in its mini-batch, int32 [B, c]
    begins: jax.Array | None  # whether a document begins with it, bool [B, c]; None where none does in any window


class Reader(NamedTuple):
    """Read windows, with what stays the same for all of them."""

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
        """Return the state after a window (but for its position), and z and the statistics of its slots.

        Where the state has None for what is pending, nothing is before the window, and what it leaves is not kept.
        """
        kept = state.pending is not None
        document = jnp.zeros_like(slots.place)  # of each slot: how many begin after the first slot, up to it
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
        if kept or self.loop.update:  # without, the step was of rate 0
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
          start: the state before them; its gates may be None where there is nothing pending.
          pending: what earlier tokens of the mini-batch left; None where it is known that there are none.
          tokens: [B, H, c, ...].
          place: of each token in the mini-batch, [B, c]; None where they are 0 to c - 1.
          mask: which tokens are read, [B, c]; None is all.

        Returns:
          the state as if the mini-batch ended here, what is pending if it does not, the sums of the gates, z and the
          statistics.
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
            step = dual.gradient(loop, keys, rate)  # the rate goes to the small factor
            weights, kept = jax.tree.map(lambda w, g: w - g, start.weights, step), ()
        else:
            left = dual.gradient(loop, keys, gates=gates)
            pending = left if pending is None else jax.tree.map(jnp.add, self._shrunk(pending, gates), left)
            weights, kept = update.step(loop.update, start.weights, start.slots, pending, at_last, rate, w0)
        totals = {name: gate.total[..., 0, 0] for name, gate in at_last.items()}
        after = start._replace(weights=weights, slots=kept)
        return after, pending, totals, (z, self._statistics(used, keys, tokens, weights))

    def _documents(self, fresh: InnerState, slots: Slots, document: jax.Array, state: InnerState, y: Any):
        """Read all documents that begin after the first slot at once: they start from the same weights, and take no
        step. Return the state after the last one, and z; of rows without documents and of other tokens, those given."""
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
        y = _of_slots(mask, (z, ()), y)
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
        """Do what :meth:`_documents` does, with statistics: each document has a step of its own for these."""

        def read(mask, end):
            _, pending, totals, y = self.mini_batch(fresh, fresh.pending, slots.tokens, slots.place, mask)
            return where(mask.any(1), fresh._replace(pending=pending, gates=totals), end[0]), _of_slots(mask, y, end[1])

        def step(end, i):
            mask = slots.filled & (document == i)
            return jax.lax.cond(mask.any(), read, lambda _, end: end, mask, end), None

        return jax.lax.scan(step, (state, y), jnp.arange(1, document.shape[1]))[0]

    def _full(self, place: jax.Array, mask: jax.Array) -> jax.Array:
        """Return in which rows these tokens fill their mini-batch, [B]."""
        return (mask & (place == self.b - 1)).any(1)

    def _only(self, tokens: Tokens, mask: jax.Array | None) -> Tokens:
        """Return tokens in the dtype of the inner loop, with rates and gates of 0 where the mask is not."""
        dtype = jnp.promote_types(self.parameters.w0[0].weight.dtype, jnp.float32)
        tokens = jax.tree.map(lambda x: x.astype(dtype), tokens)
        if mask is None:
            return tokens
        eta, gates = jax.tree.map(lambda x: jnp.where(mask[:, None, :, None], x, 0.0), (tokens.eta, tokens.gates))
        return tokens._replace(eta=eta, gates=gates)

    def _shrunk(self, pending: Weights, gates: dict[str, Gate]) -> Weights:
        """Return what earlier parts of a mini-batch left, decayed by these tokens."""
        decay = update.decay_of(self.loop.update)
        if decay is None:
            return pending
        factor = jnp.exp(gates[decay.gate].value.sum(-2, keepdims=True))
        return jax.tree.map(lambda p: factor * p, pending)

    def _statistics(self, used: Weights, keys: dual.Pass, tokens: Tokens, weights: Weights) -> tuple[jax.Array, ...]:
        """Return those of a mini-batch, [B, H, c] each; none when they were not asked for."""
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
    """Return a gate as of one slot: an integer, or of each row, [B, 1, 1, 1]."""

    def at(x):
        return x[..., last : last + 1, :] if isinstance(last, int) else jnp.take_along_axis(x, last, -2)

    return Gate(at(gate.value), at(gate.total), at(gate.tokens))


def _of_slots(mask: jax.Array, x: Any, y: Any) -> Any:
    """Return the tree ``x`` for some of the slots, [B, c], and ``y`` for the others; leaves [B, H, c, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(mask.reshape(len(mask), 1, -1, *[1] * (x.ndim - 3)), x, y), x, y)
