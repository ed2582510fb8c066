"""How gradients change the weights, and what is remembered: a chain of small members.

After a mini-batch, with P the sum of eta_s g_s over its tokens, each member in turn makes a direction of the one before
it, and the weights follow the last:

    direction = P;  for each member: slot, direction = member.step(slot, direction, gate)
    W <- A W - p direction;  for each member: W <- member.settle(W, W0)

with p the rate of the last position and A the decay over the mini-batch (1 without). The empty chain is gradient
descent. What f uses is ``member.weights(W, W0)``, mostly W itself.

Inside a mini-batch, a token with ``causal`` reading sees the step that would follow if its mini-batch ended with it.
The dual form has that in closed form where every member is *linear*, that is, where its direction is
``memory(gate) * slot + gradient``. With A_t the decay over the tokens up to t, p_t the rate of the position, and mu_t
the memory of the momentum m as of token t,

    W_t = A_t W - p_t (mu_t m + sum_{s <= t} (A_t / A_s) eta_s g_s)          g_s taken at A_s W

Biases are weights in all of this.

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

Slot = Any  # what a member remembers: a tree of arrays [B, H, ...]


class Gate(NamedTuple):
    """The numbers per token that a member reads, as of some tokens of a mini-batch."""

    value: jax.Array  # of the token itself, [..., b, 1]
    total: jax.Array  # the sum over the tokens of the mini-batch up to it, [..., b, 1]
    tokens: jax.Array  # how many these are, [b, 1] or [B, 1, b, 1]


class Member:
    """One member of a chain; as it stands, it changes nothing."""

    gate: ClassVar[str] = ""  # name of the number per token that it reads, a key of Tokens.gates
    linear: ClassVar[bool] = False  # whether direction = memory(gate) * slot + gradient

    def init(self, w0: Weights) -> Slot:
        """Return what it remembers before the first token of a sequence."""
        return ()

    def step(self, slot: Slot, gradient: Weights, gate: Gate | None) -> tuple[Slot, Weights]:
        """Return what it remembers after a mini-batch, and the direction that it makes of the gradient."""
        return slot, gradient

    def activation(self, logits: jax.Array) -> jax.Array:
        """Return the gates of tokens, where a layer computes logits from them that start at 0."""
        return jax.nn.sigmoid(logits)

    def memory(self, gate: Gate | None) -> jax.Array | None:
        """Return how much of the slot is in the direction, [..., b, 1]; None where nothing is. For linear members."""
        return None

    def weights(self, w: Weights, w0: Weights) -> Weights:
        """Return the weights that f uses where W is stored."""
        return w

    def settle(self, w: Weights, w0: Weights) -> Weights:
        """Return the weights that are stored where a step led to W."""
        return w


Chain = tuple[Member, ...]


@dataclasses.dataclass(frozen=True)
class Decay(Member):
    """Weights (and the gradients of a mini-batch so far) shrink with each token, before its gradient is taken.

    Its gate is the logarithm of the factor of each token, 0 or less. The chain does the multiplying.

    Attributes:
      factor: the same for all tokens; None where each token has its own, in the gate.
    """

    factor: float | None = None
    gate: ClassVar[str] = "log_decay"
    linear: ClassVar[bool] = True

    def activation(self, logits: jax.Array) -> jax.Array:
        """Return logarithms of factors that start at 0.99."""
        return jax.nn.log_sigmoid(logits + math.log(0.99 / 0.01))


@dataclasses.dataclass(frozen=True)
class Momentum(Member):
    """``m <- mu m + P``, which is followed; no factor of 1 - mu, no look ahead.

    Attributes:
      average: mu is the mean of the gates of a mini-batch's tokens, within it of those so far; without, it is the gate
        of the token itself, after a mini-batch of its last token.
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
        """Return m twice."""
        mu = self.memory(gate)
        m = jax.tree.map(lambda m, g: mu * m + g, slot, gradient)
        return m, m


@dataclasses.dataclass(frozen=True)
class Muon(Member):
    """Singular values of the direction of each weight matrix near 1, by Newton-Schulz; biases follow the gradient."""

    def step(self, slot: Slot, gradient: Weights, gate: Gate | None) -> tuple[Slot, Weights]:
        """Orthogonalise each matrix alone."""
        return slot, tuple(g._replace(weight=orthogonalise(g.weight)) for g in gradient)


@dataclasses.dataclass(frozen=True)
class Renormalise(Member):
    """The weights that make each output feature of a matrix keep the norm that they have in W0.

    Attributes:
      before_use: W itself grows freely and f uses a renormalised copy (LaCT's pre-norm), before the first step W0 as it
        is; without, W is renormalised after each step (post-norm).
    """

    before_use: bool = False

    def weights(self, w: Weights, w0: Weights) -> Weights:
        """Renormalise for use, but not W0 itself, from whose norms the epsilon would take 1e-5."""
        if not self.before_use:
            return w

        def matrix(w, w0, renormalised):
            return jnp.where((w == w0).all((-2, -1), keepdims=True), w, renormalised)

        return jax.tree.map(matrix, w, w0, _with_norms_of(w, w0))

    def settle(self, w: Weights, w0: Weights) -> Weights:
        """Renormalise what is stored."""
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
    """Return the chain of a text such as ``momentum + muon + renormalise``; ``sgd`` is the empty one.

    Raises:
      ValueError: where a name is not a key of :data:`MEMBERS`, nor ``decay=FACTOR`` with a factor above 0 and up to 1.
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
    """Return whether the dual form can show a token the steps of its own mini-batch."""
    return all(member.linear for member in chain)


def decay_of(chain: Chain) -> Decay | None:
    """Return the member that makes weights decay, None where there is none."""
    return next((member for member in chain if isinstance(member, Decay)), None)


def token_gates(chain: Chain) -> dict[str, Member]:
    """Return the members that read a number of each token, by its name; not those whose number is always the same."""
    return {m.gate: m for m in chain if m.gate and not (isinstance(m, Decay) and m.factor is not None)}


def gates_per_token(chain: Chain, given: Mapping[str, jax.Array], like: jax.Array) -> dict[str, jax.Array]:
    """Return the gates that the members read, [B, T, H] each: those given, and those that are the same for all tokens.

    Raises:
      ValueError: where one is missing.
    """
    found = {}
    for member in chain:
        if isinstance(member, Decay) and member.factor is not None:
            found[member.gate] = jnp.full(like.shape[:3], math.log(member.factor), like.dtype)
        elif member.gate:
            if member.gate not in given:
                raise ValueError(
                    f"{type(member).__name__} reads the gate {member.gate} of each token; given are {sorted(given)}"
                )
            found[member.gate] = given[member.gate]
    return found


def init(chain: Chain, w0: Weights) -> tuple[Slot, ...]:
    """Return what each member remembers before the first token."""
    return tuple(member.init(w0) for member in chain)


def used_weights(chain: Chain, w: Weights, w0: Weights) -> Weights:
    """Return the weights that f uses where W is stored."""
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
      gradient: P, the sum over its tokens of eta_s g_s, each decayed by the tokens after it.
      gates: as of its last token, [..., 1, 1] each.
      rate: p, the part of the rate that belongs to its last position.
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
    """Return the norm over the input features, [..., 1, d_out]; its derivative at 0 is 0, as in PyTorch."""
    squares = (w**2).sum(-2, keepdims=True)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


# (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T, one for each iteration.
_NEWTON_SCHULZ_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_NEWTON_SCHULZ_EPSILON = 1e-7


def orthogonalise(g: jax.Array) -> jax.Array:
    """Return matrices [..., m, n] orthogonalised, each alone.

    Singular values above 0.01 of the Frobenius norm end in 0.977 to 1.032, where that norm is well above 1e-7. A matrix
    of zeros stays one, with a finite derivative.
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
