"""What the rest of the package asks of a sequence mixer.

A mixer's Flax module has three methods. B is the batch, T tokens, D the width.

* ``__call__(x, state=None, context=Context()) -> (y, state)``: x and y are [B, T, D]. Without a state it reads whole
  sequences from their start, which is training, and returns None for the state. With one it reads the next piece, of
  any length, and returns the state after it. ``context.valid`` and ``context.reset`` say what is padding and where
  documents begin, with a state or without; :func:`ttt_jax.layers.context.places` computes positions from them. At
  padding y is 0, and it has no part in any gradient.
* ``initial_state(batch, width, length)``: the state before the first of at most ``length`` tokens of a document. It has
  a leaf ``position``, int32 [B]: the tokens of the present document that each row has read.
* ``state_axes()``: the same tree with the names of the axes of each leaf in place of its array, such as
  ``PartitionSpec("batch", "time", "num_heads", None)``. An axis named ``time`` grows with what is read.

``tests/mixers`` holds every mixer that is listed to this: causality, pieces cut anywhere, padding, documents, states.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from ttt_jax.layers.context import PLAIN as PLAIN
from ttt_jax.layers.context import Context as Context
from ttt_jax.ttt.inner_loop import InnerLoop

Model: TypeAlias = ml_collections.ConfigDict  # the section ``model`` of a config, of one mixer


class Style(NamedTuple):
    """How a line looks in pictures: each of the three tells it from others, so that none needs to be seen in colour."""

    color: str
    line: str | tuple
    marker: str


class Memory(NamedTuple):
    """What ``ttt plan --search`` takes a mixer to hold, before anything is compiled.

    Attributes:
      parameters: numbers of all heads together, without what all mixers have: four projections of D x D.
      arrays: of D numbers a token that the backward pass keeps, in the compute dtype.
      bytes_per_head: beside these, for each token and head.
    """

    parameters: int = 0
    arrays: int = 14
    bytes_per_head: float = 0.0


def of_heads(model: Model) -> dict[str, Any]:
    """Return what the modules of mixers with heads and rotary positions take alike."""
    return {
        "num_heads": model.num_heads,
        "dtype": jnp.dtype(model.dtype),
        "init_stddev": model.init_stddev,
        "rope_theta": model.rope_theta,
    }


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A value of ``model.mixer``. All functions take the section ``model`` of a validated config.

    Attributes:
      module: returns a function that makes the Flax module; raises ``ConfigError`` for what can be seen only now.
      operations: floating point operations forward, per token, averaged over a sequence of so many tokens.
      label: the model in words.
      styles: how lines of models with these labels look.
      section: of ``model`` that holds its own keys; None where it has none.
      settings: the dataclass of the section (:mod:`ttt_jax.settings`).
      check: raises ``ConfigError`` for values that do not go together.
      pre_conv: whether blocks have a convolution before the mixer where ``model.pre_conv`` is unset.
      inner_loop: of a mixer that learns at test time; None for the others.
      computed: how the mixer is computed on the devices of the present mesh, and why; empty where there is no choice.
      memory: for guesses about sequences of so many tokens.
    """

    module: Callable[[Model], Callable[..., nn.Module]]
    operations: Callable[[Model, int], float]
    label: Callable[[Model], str]
    styles: Mapping[str, Style] = dataclasses.field(default_factory=dict)
    section: str | None = None
    settings: type | None = None
    check: Callable[[Model], None] = lambda model: None
    pre_conv: Callable[[Model], bool] = lambda model: False
    inner_loop: Callable[[Model], InnerLoop] | None = None
    computed: Callable[[Model], str] = lambda model: ""
    memory: Callable[[Model, int], Memory] = lambda model, length: Memory()

    @property
    def learns(self) -> bool:
        """Whether its state is the weights of a learner."""
        return self.inner_loop is not None
