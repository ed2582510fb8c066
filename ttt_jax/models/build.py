"""From the ``model`` section of a config to a :class:`LanguageModel`."""

from functools import partial

import jax.numpy as jnp
import ml_collections

from ttt_jax.mixers import MIXERS
from ttt_jax.models import pattern, stack
from ttt_jax.models.block import Block, channel_parts
from ttt_jax.models.language_model import LanguageModel


def language_model(model: ml_collections.ConfigDict) -> LanguageModel:
    """Build the model that a validated ``config.model`` describes.

    Raises:
      ConfigError: where it asks for a kernel that does not exist, or for a learner that breaks the rules.
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
    """Return what makes a block; ``model.mixer`` is one name."""
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


def describe(model: ml_collections.ConfigDict) -> str:
    """Describe the model in words, for labels."""
    return pattern.describe(model)
