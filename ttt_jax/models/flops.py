"""Floating point operations of a model, counted from its config.

Matrix products only, two operations per multiply-add; a backward pass counts twice a forward pass. Recomputation
(remat) is not counted: this is the work that the model needs, not what a program does.
"""

import ml_collections

from ttt_jax.layers.linear_attention import CHUNK
from ttt_jax.models import build
from ttt_jax.ttt import operations, update


def per_token(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    """Return the forward operations per token, averaged over a sequence of ``sequence_length`` tokens."""
    d, layers = model.width, model.num_layers
    feed_forward = 3 * 2 * d * model.mlp_width
    head = 2 * d * model.vocab_size
    return layers * (_mixer(model, sequence_length) + feed_forward) + head


def per_step(model: ml_collections.ConfigDict, sequence_length: int, sequences: int) -> float:
    """Return the operations of one training step: forward and backward."""
    return 3 * per_token(model, sequence_length) * sequence_length * sequences


def inner_loop_per_token(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    """Return the part of :func:`per_token` that is in inner loops, of all layers; none of attention."""
    if not build.learns(model):
        return 0.0
    return model.num_layers * model.num_heads * _inner_loop(model, sequence_length)


def _mixer(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    d = model.width
    if model.mixer == "attention":
        visible = (sequence_length + 1) / 2  # keys per query, on average
        return 4 * 2 * d * d + 2 * 2 * d * visible
    if model.mixer == "linear_attention":
        return 4 * 2 * d * d + model.num_heads * _linear_attention(d // model.num_heads, sequence_length)
    projections = 4  # q, v, o, and k or, in the Mamba-style backbone, the gate
    per_token = _rates(model) + len(update.token_gates(build.loop(model).update))  # numbers of a head
    numbers = 2 * d * model.num_heads * per_token
    return projections * 2 * d * d + numbers + model.num_heads * _inner_loop(model, sequence_length)


def _rates(model: ml_collections.ConfigDict) -> int:
    """Return how many inner learning rates are computed of a token, for each head."""
    if not model.ttt.learned_eta:
        return 0
    loop = build.loop(model)
    return len(loop.learner.structure.matrices) if loop.rate.per_matrix else 1


def _inner_loop(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    """Count, per token and head, the learner forward and backward over k, the update, and the learner over q."""
    return operations.per_token(build.loop(model), min(model.ttt.mini_batch, sequence_length))


def _linear_attention(head_dim: int, sequence_length: int) -> float:
    """Count, per token and head, q S, k^T v, and within the chunk q k^T and its product with v."""
    chunk = min(CHUNK, sequence_length)
    return 2 * 2 * head_dim**2 + 2 * 2 * chunk * head_dim
