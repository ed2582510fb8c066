"""From the ``model`` section of a config to a :class:`LanguageModel`."""

from functools import partial

import jax.numpy as jnp
import ml_collections

from ttt_jax.mixers import MIXERS
from ttt_jax.models.block import Block
from ttt_jax.models.language_model import LanguageModel


def language_model(model: ml_collections.ConfigDict) -> LanguageModel:
    """Build the model that a validated ``config.model`` describes.

    Raises:
      ConfigError: where it asks for a kernel that does not exist, or for a learner that breaks the rules.
    """
    dtype, mixer = jnp.dtype(model.dtype), MIXERS[model.mixer]
    block = partial(
        Block,
        make_mixer=mixer.module(model),
        mlp_width=model.mlp_width,
        dtype=dtype,
        init_stddev=model.init_stddev,
        norm_epsilon=model.norm_epsilon,
        pre_conv=mixer.pre_conv(model) if model.pre_conv is None else model.pre_conv,
        conv_width=model.conv_width,
    )
    return LanguageModel(
        make_block=block,
        vocab_size=model.vocab_size,
        width=model.width,
        num_layers=model.num_layers,
        dtype=dtype,
        tie_embeddings=model.tie_embeddings,
        init_stddev=model.init_stddev,
        norm_epsilon=model.norm_epsilon,
        remat=model.remat == "block",
    )


def describe(model: ml_collections.ConfigDict) -> str:
    """Describe the model in words, for labels."""
    return MIXERS[model.mixer].label(model)


def learns(model: ml_collections.ConfigDict) -> bool:
    """Return whether the model has mixers that learn at test time."""
    return MIXERS[model.mixer].learns
