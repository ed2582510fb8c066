"""Define the language model, from tokens to logits: embedding, a stack of blocks, final norm, head.

Shapes: B batch, T tokens, V vocabulary, D width, L blocks.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from ttt_jax.layers.linear import EMBEDDING_AXES, HEAD_AXES, lookup, parameter, project
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.mixers import MIXERS
from ttt_jax.mixers.mixer import PLAIN, Context
from ttt_jax.models import pattern, stack
from ttt_jax.models.stack import Block, Segments, channel_parts


class LanguageModel(nn.Module):
    """A decoder of the blocks in ``segments`` (:mod:`ttt_jax.models.stack`).

    ``apply`` fills two collections on request (``mutable=``): ``statistics`` of the inner loops of TTT layers
    (:mod:`ttt_jax.mixers.ttt_layer`), and ``hidden_states``, the block outputs ``h`` [B, T, D] with ``embedding`` and
    ``final``. ``init`` fills ``hidden_states`` too, so that parameters are its ``["params"]``. :meth:`by_block` splits
    a collection by block.
    """

    segments: Segments
    vocab_size: int
    width: int
    dtype: jnp.dtype
    tie_embeddings: bool = True
    init_stddev: float = 0.02
    norm_epsilon: float = 1e-6
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        state: Any = None,
        context: Context = PLAIN,
        read_out: Callable[[jax.Array, jax.Array], Any] | None = None,
    ) -> tuple[Any, Any]:
        """Return logits [B, T, V], float32, and the state after the tokens.

        Args:
          tokens: [B, T], integers below V.
          state: None to read whole sequences; else the state after the previous piece, or :meth:`initial_state`.
          context: padding, beginnings of documents, and other inputs of mixers.
          read_out: what to return in place of logits: a function of the last hidden states [B, T, D] and the head
            [D, V], float32.
        """
        normal = nn.initializers.normal(self.init_stddev)
        embedding = parameter(self, "embedding", normal, (self.vocab_size, self.width), EMBEDDING_AXES)
        h = lookup(embedding, tokens, self.dtype)  # [B, T, D]
        self._record("embedding", h)
        h, state = stack.read(self.segments, self.remat, h, state, context)
        h = RMSNorm(self.dtype, self.norm_epsilon, name="final_norm")(h)
        self._record("final", h)
        if self.tie_embeddings:
            head = embedding.T
        else:
            head = parameter(self, "head", normal, (self.width, self.vocab_size), HEAD_AXES)
        if read_out is None:
            return project(h, head, HEAD_AXES, self.dtype, jnp.float32), state
        return read_out(h, head), state

    def initial_state(self, batch: int, length: int) -> Any:
        """Return the state before the first token of ``batch`` sequences of at most ``length`` tokens."""
        return stack.initial_state(self.segments, batch, self.width, length)

    def state_axes(self) -> Any:
        """Return the names of the axes of the state: a tree like it, with a ``PartitionSpec`` for each array."""
        return stack.state_axes(self.segments)

    def by_block(self, filled: Mapping[str, Any]) -> list[Any]:
        """Return the part of a collection, or of the parameters, of each of the L blocks, in order."""
        return stack.by_block(self.segments, filled)

    def _record(self, name, value):
        self.sow("hidden_states", name, value, reduce_fn=lambda _, new: new)


def build_model(model: ml_collections.ConfigDict) -> LanguageModel:
    """Build the model that a validated ``config.model`` describes.

    Raises:
      ConfigError: for a kernel that does not exist for the model, or a learner that breaks the rules.
    """
    blocks = {kind.text: _block(kind.model) for kind in pattern.kinds(model)}
    return LanguageModel(
        segments=tuple(
            stack.Segment(
                tuple(stack.Run(run.model.mixer, blocks[run.text], run.blocks) for run in segment.runs),
                segment.repeats,
            )
            for segment in pattern.segments(model)
        ),
        vocab_size=model.vocab_size,
        width=model.width,
        dtype=jnp.dtype(model.dtype),
        tie_embeddings=model.tie_embeddings,
        init_stddev=model.init_stddev,
        norm_epsilon=model.norm_epsilon,
        remat=model.remat == "block",
    )


def _block(model: ml_collections.ConfigDict) -> partial[Block]:
    """Return a function that makes a block, whose ``model.mixer`` is one name."""
    mixer = MIXERS[model.mixer]
    return partial(
        Block,
        make_mixer=mixer.module(model),
        mlp_width=model.mlp_width,
        dtype=jnp.dtype(model.dtype),
        init_stddev=model.init_stddev,
        norm_epsilon=model.norm_epsilon,
        pre_conv=mixer.pre_conv(model) if model.pre_conv is None else model.pre_conv,
        conv_width=model.conv_width,
        channel=channel_parts(model.channel),
        post_norm=model.norms == "pre_post",
    )
