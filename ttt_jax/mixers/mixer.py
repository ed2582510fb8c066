"""Define the interface of a sequence mixer.

The Flax module of a mixer has three methods:

* ``__call__(x, state=None, context=Context()) -> (y, state)``: x and y are [B, T, D]. Without a state the mixer reads
  whole sequences from their start, as in training, and returns None for the state. With a state it reads the next
  piece, of any length, and returns the state after it. ``context.valid`` and ``context.reset`` mark padding and
  beginnings of documents in both cases; :func:`ttt_jax.layers.context.places` computes positions from them. At padding
  y is 0, and padding has no part in any gradient.
* ``initial_state(batch, width, length)``: the state before the first of at most ``length`` tokens of a document. It has
  a leaf ``position``, int32 [B]: the number of tokens of its present document that each row has read.
* ``state_axes()``: the same tree with the names of the axes of each leaf in place of its array, such as
  ``PartitionSpec("batch", "time", "num_heads", None)``. An axis named ``time`` grows with the tokens read.

``tests/mixers`` checks this for every registered mixer: causality, pieces cut anywhere, padding, documents, states.

Shapes: B batch, T tokens, D width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from ttt_jax.kernels.self_check import Check
from ttt_jax.layers.context import PLAIN as PLAIN
from ttt_jax.layers.context import Context as Context
from ttt_jax.ttt.inner_loop import InnerLoop

KEPT = "kept"  # the name of arrays that rematerialisation keeps, because to compute them again costs a kernel
Model: TypeAlias = ml_collections.ConfigDict  # the section ``model`` of a config, with one mixer


class Style(NamedTuple):
    """The look of a line in figures. Each of the three differs from other lines, so that colour is not needed."""

    color: str
    line: str | tuple
    marker: str


class Memory(NamedTuple):
    """An estimate of the memory of a mixer, for ``ttt plan --search``, which compiles nothing.

    Attributes:
      parameters: the number of parameters of all heads, without the four projections of D x D that all mixers have.
      arrays: the number of arrays of D numbers a token that the backward pass keeps, in the compute dtype.
      bytes_per_head: the bytes that it keeps beside these, for each token and head.
    """

    parameters: int = 0
    arrays: int = 14
    bytes_per_head: float = 0.0


def head_options(model: Model) -> dict[str, Any]:
    """Return the arguments that the modules of all mixers with heads and rotary positions take."""
    return {
        "num_heads": model.num_heads,
        "dtype": jnp.dtype(model.dtype),
        "init_stddev": model.init_stddev,
        "rope_theta": model.rope_theta,
    }


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A mixer that ``model.mixer`` may name. All functions take the section ``model`` of a validated config.

    Attributes:
      module: returns a function that makes the Flax module; raises ``ConfigError`` for errors that ``check`` cannot
        find without devices or the user's own code.
      operations: returns the floating point operations of a forward pass per token, averaged over a sequence of the
        given number of tokens.
      label: returns the model in words.
      styles: the styles of lines, by label.
      section: the name of the section of ``model`` that holds the mixer's own keys; None where it has none.
      settings: the dataclass of the section (:mod:`ttt_jax.settings`).
      unused: the keys of the section that this mixer does not read, but another one with the same section does.
      check: raises ``ConfigError`` for values that do not go together.
      heads: returns the number of heads of keys, which the axis ``tensor`` of a mesh has to divide.
      pre_conv: returns whether blocks have a convolution before the mixer where ``model.pre_conv`` is unset.
      inner_loop: returns the inner loop of a mixer that learns at test time; None for other mixers.
      computed: returns how the mixer is computed on the devices of the present mesh, and why; empty where there is no
        choice.
      kernel_check: returns the check of the kernel that a device of the given kind uses, where the given number of
        devices share the heads; None where it uses none, or is not to be checked.
      memory: returns an estimate of the memory for sequences of the given number of tokens.
    """

    module: Callable[[Model], Callable[..., nn.Module]]
    operations: Callable[[Model, int], float]
    label: Callable[[Model], str]
    styles: Mapping[str, Style] = dataclasses.field(default_factory=dict)
    section: str | None = None
    settings: type | None = None
    unused: tuple[str, ...] = ()
    check: Callable[[Model], None] = lambda model: None
    heads: Callable[[Model], int] = lambda model: model.num_heads
    pre_conv: Callable[[Model], bool] = lambda model: False
    inner_loop: Callable[[Model], InnerLoop] | None = None
    computed: Callable[[Model], str] = lambda model: ""
    kernel_check: Callable[[Model, int, str], Check | None] = lambda model, sharing, device: None
    memory: Callable[[Model, int], Memory] = lambda model, length: Memory()

    @property
    def learns(self) -> bool:
        """Return whether the state of the mixer is the weights of a learner."""
        return self.inner_loop is not None
