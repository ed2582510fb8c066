"""Count the floating point operations and the parameters of a model.

Operations are counted from the config: matrix products only, two operations per multiply-add; a backward pass counts
as two forward passes. Recomputation (remat) is not counted: this is the work that the model needs, not the work of a
program.
"""

import collections
import math
from typing import Any

import jax
import ml_collections

from ttt_jax.mixers import MIXERS
from ttt_jax.models import pattern
from ttt_jax.models.stack import channel_parts
from ttt_jax.ttt import operations

_PARTS = ("embedding", "head", "mixers", "W0 of inner loops", "feed-forward", "norms and convolutions")


def flops_per_token(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    """Return the forward operations per token, averaged over a sequence of ``sequence_length`` tokens."""
    head = 2 * model.width * model.vocab_size
    return head + sum(kind.blocks * _flops_of_block(kind.model, sequence_length) for kind in pattern.kinds(model))


def flops_per_step(model: ml_collections.ConfigDict, sequence_length: int, sequences: int) -> float:
    """Return the operations of one training step: forward and backward."""
    return 3 * flops_per_token(model, sequence_length) * sequence_length * sequences


def inner_flops_per_token(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    """Return the part of :func:`flops_per_token` that is in the inner loops of all layers."""
    return sum(
        kind.blocks * inner_flops_of_block(kind.model, sequence_length) for kind in pattern.learning_kinds(model)
    )


def _flops_of_block(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    feed_forward = 3 * 2 * model.width * model.mlp_width
    mixer = MIXERS[model.mixer].operations(model, sequence_length)
    return mixer + len(channel_parts(model.channel)) * feed_forward


def inner_flops_of_block(model: ml_collections.ConfigDict, sequence_length: int) -> float:
    """Return the operations per token of the inner loop of one block, whose ``model.mixer`` learns at test time."""
    per_head = operations.per_token(pattern.inner_loop(model), min(model.ttt.mini_batch, sequence_length))
    return model.num_heads * per_head


def parameters_by_part(params: Any) -> dict[str, int]:
    """Return the number of parameters of each part of a model, from its parameters or their shapes.

    The part ``mixers`` is projections, learned rates and everything else in a mixer except norms, convolutions and the
    initial weights of the inner loop (``inner_kernel_0`` and such).
    """
    found: collections.Counter[str] = collections.Counter()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]  # without those of Flax's boxes
        found[_part(keys)] += math.prod(leaf.shape)
    return {part: found[part] for part in _PARTS if found[part]}


def parameters_in_words(params: Any) -> str:
    """Return the parts in one line, the largest first."""
    parts = sorted(parameters_by_part(params).items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {count:,}" for part, count in parts)


def _part(keys: list[str]) -> str:
    if keys[0] in ("embedding", "head"):
        return keys[0]
    if keys[-1].startswith("inner_"):
        return "W0 of inner loops"
    if any("norm" in key or key.startswith("conv") for key in keys):
        return "norms and convolutions"
    return "feed-forward" if any(key.startswith("mlp") for key in keys) else "mixers"
