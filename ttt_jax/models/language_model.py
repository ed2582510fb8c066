"""Tokens to logits: embedding, a scanned stack of blocks, final norm, head.

Shapes: B batch, T tokens, V vocabulary, D width, L layers.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ttt_jax.layers.embedding import AXES, lookup
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.layers.parameter import parameter
from ttt_jax.layers.projection import project
from ttt_jax.mixers.mixer import PLAIN, Context
from ttt_jax.models.block import Block


class LanguageModel(nn.Module):
    """A decoder. ``make_block`` builds one of its L equal blocks; their parameters are stacked, [L, ...], and the
    stack is one scan, so that compile time does not grow with depth.

    Collections that ``apply`` fills on request (``mutable=``): ``statistics``, what the inner loop of TTT layers did,
    [L, ...] of what :mod:`ttt_jax.mixers.ttt_layer` says; ``hidden_states``, the block outputs ``h`` [L, B, T, D], with
    ``embedding`` and ``final``, which ``init`` fills too (parameters are its ``["params"]``).
    """

    make_block: Callable[..., Block]
    vocab_size: int
    width: int
    num_layers: int
    dtype: jnp.dtype
    tie_embeddings: bool = True
    init_stddev: float = 0.02
    norm_epsilon: float = 1e-6
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, state: Any = None, context: Context = PLAIN) -> tuple[jax.Array, Any]:
        """Logits [B, T, V], float32, and the state after the tokens.

        Args:
          tokens: [B, T], integers below V.
          state: None to read whole sequences; else where the last piece ended, or :meth:`initial_state`.
          context: padding, beginnings of documents, and what else mixers may want to know.
        """
        normal = nn.initializers.normal(self.init_stddev)
        embedding = parameter(self, "embedding", normal, (self.vocab_size, self.width), AXES)
        h = lookup(embedding, tokens, self.dtype)
        self._record("embedding", h)
        stack = nn.scan(
            nn.remat(_read, prevent_cse=False) if self.remat else _read,
            variable_axes={"params": 0, "statistics": 0, "hidden_states": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        h, state = stack(self.make_block(name="layers"), h, state, context)
        h = RMSNorm(self.dtype, self.norm_epsilon, name="final_norm")(h)
        self._record("final", h)
        if self.tie_embeddings:
            head = embedding.T
        else:
            head = parameter(self, "head", normal, (self.width, self.vocab_size), AXES[::-1])
        return project(h, head, AXES[::-1], self.dtype, jnp.float32), state

    def initial_state(self, batch: int, length: int) -> Any:
        """The state before the first token of ``batch`` sequences of at most ``length`` tokens."""
        one = self.make_block(parent=None).initial_state(batch, self.width, length)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.num_layers, *x.shape)), one)

    def state_axes(self) -> Any:
        """The names of the axes of the state: a tree like it, with a ``PartitionSpec`` for each array."""
        one = self.make_block(parent=None).state_axes()
        return jax.tree.map(lambda axes: PartitionSpec("layers", *axes), one)

    def _record(self, name, value):
        self.sow("hidden_states", name, value, reduce_fn=lambda _, new: new)


def _read(block: Block, h: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
    return block(h, state, context)
