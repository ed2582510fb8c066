"""Floating point operations of a model, counted from its config.

Matrix products only, two operations per multiply-add; a backward pass counts twice a forward pass. Recomputation
(remat) is not counted: this is the work that the model needs, not what a program does.
"""

import ml_collections

from ttt_jax.mixers import MIXERS
from ttt_jax.models import pattern
from ttt_jax.models.block import channel_parts
from ttt_jax.ttt import operations


def per_token(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    """Return the forward operations per token, averaged over a sequence of ``sequence_length`` tokens."""
    head = 2 * model.width * model.vocab_size
    return head + sum(kind.blocks * _block(kind.model, sequence_length) for kind in pattern.kinds(model))


def per_step(model: ml_collections.ConfigDict, sequence_length: int, sequences: int) -> float:
    """Return the operations of one training step: forward and backward."""
    return 3 * per_token(model, sequence_length) * sequence_length * sequences


def inner_loop_per_token(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    """Return the part of :func:`per_token` that is in inner loops, of all layers; none of attention."""
    return sum(kind.blocks * inner_loop_of_block(kind.model, sequence_length) for kind in pattern.learns(model))


def _block(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    feed_forward = 3 * 2 * model.width * model.mlp_width
    mixer = MIXERS[model.mixer].operations(model, sequence_length)
    return mixer + len(channel_parts(model.channel)) * feed_forward


def inner_loop_of_block(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    """Return the operations per token of the inner loop of one block; ``model.mixer`` is one that learns."""
    of_a_head = operations.per_token(pattern.inner_loop(model), min(model.ttt.mini_batch, sequence_length))
    return model.num_heads * of_a_head
