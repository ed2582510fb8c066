"""Change the weights by gradients: an update is a chain of small members, each of which may have a memory, its slot.

After a mini-batch, let P be the sum of eta_s g_s over its tokens s (with decay, each decayed by the tokens after s).
The first member turns P into a direction, each further member changes that direction, and the weights follow the last:

    direction = P;  for each member: slot, direction = member.step(slot, direction, gate)
    W <- A W - p direction;  for each member: W <- member.settle(W, W0)

with p the rate of the last position and A the decay over the mini-batch, 1 without a decay. The empty chain is gradient
descent, the update of the paper. The learner f uses ``member.weights(W, W0)``, for most members W itself.

Inside a mini-batch, with the reading ``causal``, token t sees the step that would follow if its mini-batch ended with
it. The dual form has that step in closed form where every member is *linear*: where its direction is
``memory(gate) * slot + gradient``. With A_t the decay over the tokens up to t, p_t the rate of its position, and mu_t
the factor of the momentum m at token t,

    W_t = A_t W - p_t (mu_t m + sum_{s <= t} (A_t / A_s) eta_s g_s)          g_s taken at A_s W

In all of this, biases are weights too.

Shapes: B batch, H heads, b tokens of a mini-batch; ``...`` is [B, H]. Weights W have leaves [..., d_in, d_out].
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt.learner import Weights

Slot = Any  # the memory of a member: a tree of arrays [B, H, ...]


class Gate(NamedTuple):
    """The number per token that a member reads, at b tokens of a mini-batch."""

    value: jax.Array  # the number of each token, [..., b, 1]
    total: jax.Array  # its sum over the tokens of the mini-batch up to each token, [..., b, 1]
    tokens: jax.Array  # the number of tokens of the mini-batch up to each token, [b, 1] or [B, 1, b, 1]


class Member:
    """The base class of the members of a chain; it changes nothing."""

    gate: ClassVar[str] = ""  # the number per token that the member reads: a key of Tokens.gates
    linear: ClassVar[bool] = False  # whether direction = memory(gate) * slot + gradient

    def init(self, w0: Weights) -> Slot:
        """Return the slot before the first token of a sequence."""
        return ()

    def step(self, slot: Slot, gradient: Weights, gate: Gate | None) -> tuple[Slot, Weights]:
        """Return the slot after a mini-batch, and the direction for the gradient."""
        return slot, gradient

    def activation(self, logits: jax.Array) -> jax.Array:
        """Return the gate of each token from the logit that a layer computes for it; logits start near 0."""
        return jax.nn.sigmoid(logits)

    def memory(self, gate: Gate | None) -> jax.Array | None:
        """Return the factor of the slot in the direction of a linear member, [..., b, 1]; None for 0."""
        return None

    def weights(self, w: Weights, w0: Weights) -> Weights:
        """Return the weights that f uses, from the stored W."""
        return w

    def settle(self, w: Weights, w0: Weights) -> Weights:
        """Return the weights to store after a step that led to W."""
        return w


Chain = tuple[Member, ...]


@dataclasses.dataclass(frozen=True)
class Decay(Member):
    """Shrinks the weights, and the gradients of the mini-batch so far, at each token before its gradient is taken.

    Its gate is the logarithm of the factor of each token, 0 or less. :func:`step` and the dual form multiply by it.

    Attributes:
      factor: one factor for all tokens; None where each token has its own, in the gate.
    """

    factor: float | None = None
    gate: ClassVar[str] = "log_decay"
    linear: ClassVar[bool] = True

    def activation(self, logits: jax.Array) -> jax.Array:
        """Return the logarithm of the factor, which is 0.99 at a logit of 0."""
        return jax.nn.log_sigmoid(logits + math.log(0.99 / 0.01))


@dataclasses.dataclass(frozen=True)
class Momentum(Member):
    """Follows ``m <- mu m + P``, without a factor of 1 - mu on P and without Nesterov's look-ahead.

    Attributes:
      average: whether mu at a token is the mean of the gates of its mini-batch up to it, or else its own gate. After a
        mini-batch, mu is that of the last token.
    """

    average: bool = True
    gate: ClassVar[str] = "momentum"
    linear: ClassVar[bool] = True

    def init(self, w0: Weights) -> Slot:
        """Return m = 0."""
        return jax.tree.map(jnp.zeros_like, w0)

    def memory(self, gate: Gate | None) -> jax.Array | None:
        """Return mu."""
        assert gate is not None
        return gate.total / gate.tokens if self.average else gate.value

    def step(self, slot: Slot, gradient: Weights, gate: Gate | None) -> tuple[Slot, Weights]:
        """Return the new m, both as the slot and as the direction."""
        mu = self.memory(gate)
        m = jax.tree.map(lambda m, g: mu * m + g, slot, gradient)
        return m, m


@dataclasses.dataclass(frozen=True)
class Muon(Member):
    """Brings the singular values of the direction of each matrix near 1, by Newton-Schulz; leaves biases alone."""

    def step(self, slot: Slot, gradient: Weights, gate: Gate | None) -> tuple[Slot, Weights]:
        """Orthogonalise the direction of each matrix by itself."""
        return slot, tuple(g._replace(weight=orthogonalise(g.weight)) for g in gradient)


@dataclasses.dataclass(frozen=True)
class Renormalise(Member):
    """Keeps the norm over the input features, for each output feature of a matrix, at its value in W0.

    Attributes:
      before_use: if true, W grows freely and f uses a renormalised copy (LaCT's pre-norm), but W0 itself before the
        first step; if false, W is renormalised after each step (post-norm).
    """

    before_use: bool = False

    def weights(self, w: Weights, w0: Weights) -> Weights:
        """Renormalise for use, but not W0 itself, because the epsilon would change it by 1e-5 of its norms."""
        if not self.before_use:
            return w

        def matrix(w, w0, renormalised):
            return jnp.where((w == w0).all((-2, -1), keepdims=True), w, renormalised)

        return jax.tree.map(matrix, w, w0, _with_norms_of(w, w0))

    def settle(self, w: Weights, w0: Weights) -> Weights:
        """Renormalise the weights to store."""
        return w if self.before_use else _with_norms_of(w, w0)


MEMBERS: dict[str, Member] = {
    "decay": Decay(),
    "momentum": Momentum(),
    "momentum_per_token": Momentum(average=False),
    "muon": Muon(),
    "renormalise": Renormalise(),
    "renormalise_before_use": Renormalise(before_use=True),
}


def parse(text: str) -> Chain:
    """Return the chain for a text such as ``momentum + muon + renormalise``; ``sgd`` is the empty chain.

    Raises:
      ValueError: where a name is neither a key of :data:`MEMBERS` nor ``decay=FACTOR`` with a factor above 0 and at
        most 1.
    """
    names = [name.strip() for name in text.split("+")]
    if names == ["sgd"]:
        return ()
    return tuple(map(_member, names))


def _member(name: str) -> Member:
    if name in MEMBERS:
        return MEMBERS[name]
    if match := re.fullmatch(r"decay\s*=\s*([0-9.]+(?:e-?[0-9]+)?)", name):
        try:
            factor = float(match[1])
        except ValueError:
            factor = 0.0
        if 0 < factor <= 1:
            return Decay(factor)
    raise ValueError(
        f"{name!r} is no update; expected sgd, or some of {', '.join(MEMBERS)} with + between them, or decay=FACTOR, "
        "the same for all tokens"
    )


def is_linear(chain: Chain) -> bool:
    """Return whether all members are linear, so that the dual form can show a token the steps of its own mini-batch."""
    return all(member.linear for member in chain)


def decay_of(chain: Chain) -> Decay | None:
    """Return the decay of a chain, or None."""
    return next((member for member in chain if isinstance(member, Decay)), None)


def token_gates(chain: Chain) -> dict[str, Member]:
    """Return the members that read a gate which the layer computes for each token, by the name of the gate."""
    return {m.gate: m for m in chain if m.gate and not (isinstance(m, Decay) and m.factor is not None)}


def gates_per_token(chain: Chain, given: Mapping[str, jax.Array], like: jax.Array) -> dict[str, jax.Array]:
    """Return all gates that the members read, [B, T, H] each: those given, and the constant gate of a fixed decay.

    Raises:
      ValueError: where a gate is missing.
    """
    gates = {}
    for member in chain:
        if isinstance(member, Decay) and member.factor is not None:
            gates[member.gate] = jnp.full(like.shape[:3], math.log(member.factor), like.dtype)
        elif member.gate:
            if member.gate not in given:
                raise ValueError(
                    f"{type(member).__name__} reads the gate {member.gate} of each token; given are {sorted(given)}"
                )
            gates[member.gate] = given[member.gate]
    return gates


def init(chain: Chain, w0: Weights) -> tuple[Slot, ...]:
    """Return the slot of each member before the first token."""
    return tuple(member.init(w0) for member in chain)


def used_weights(chain: Chain, w: Weights, w0: Weights) -> Weights:
    """Return the weights that f uses, from the stored W."""
    for member in chain:
        w = member.weights(w, w0)
    return w


def step(
    chain: Chain,
    w: Weights,
    slots: tuple[Slot, ...],
    gradient: Weights,
    gates: Mapping[str, Gate],
    rate: jax.Array | float,
    w0: Weights,
) -> tuple[Weights, tuple[Slot, ...]]:
    """Return the weights and slots after a mini-batch.

    Args:
      gradient: P, the sum over its tokens s of eta_s g_s, each decayed by the tokens after s.
      gates: the gates at its last token, [..., 1, 1] each.
      rate: p, the position rate of its last token.
    """
    kept = []
    for member, slot in zip(chain, slots, strict=True):
        slot, gradient = member.step(slot, gradient, gates.get(member.gate))
        kept.append(slot)
    if (decay := decay_of(chain)) is not None:
        factor = jnp.exp(gates[decay.gate].total)
        w = jax.tree.map(lambda w: factor * w, w)
    w = jax.tree.map(lambda w, g: w - rate * g, w, gradient)
    for member in chain:
        w = member.settle(w, w0)
    return w, tuple(kept)


def _with_norms_of(w: Weights, w0: Weights) -> Weights:
    def matrix(w, w0):
        return w / (_norm(w) + 1e-5) * _norm(w0)

    return tuple(x._replace(weight=matrix(x.weight, x0.weight)) for x, x0 in zip(w, w0, strict=True))


def _norm(w: jax.Array) -> jax.Array:
    """Return the norm over the input features, [..., 1, d_out]; the derivative at 0 is 0, as in PyTorch."""
    squares = (w**2).sum(-2, keepdims=True)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


# (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T, for each iteration of Newton-Schulz (LaCT's).
_NEWTON_SCHULZ_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_NEWTON_SCHULZ_EPSILON = 1e-7


def orthogonalise(g: jax.Array) -> jax.Array:
    """Return matrices [..., m, n] with the same singular vectors and singular values near 1, by Newton-Schulz.

    Singular values above 0.01 of the Frobenius norm end between 0.977 and 1.032, where that norm is well above 1e-7. A
    matrix of zeros stays zero, with a finite derivative.
    """
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.swapaxes(-1, -2)  # the product X X^T is then the smaller one
    squares = (x**2).sum((-2, -1), keepdims=True)
    positive = squares > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
    x = x / (norm + _NEWTON_SCHULZ_EPSILON)
    for a, b, c in _NEWTON_SCHULZ_COEFFICIENTS:
        product = x @ x.swapaxes(-1, -2)
        x = a * x + (b * product + c * product @ product) @ x
    return x if wide else x.swapaxes(-1, -2)
