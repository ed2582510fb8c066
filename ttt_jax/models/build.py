"""From the ``model`` section of a config to a :class:`LanguageModel`."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from ttt_jax.layers.attention import Attention
from ttt_jax.layers.ttt import TTT
from ttt_jax.models.block import Block
from ttt_jax.models.language_model import LanguageModel
from ttt_jax.ttt import learner as learner_lib

PAPER_BASE_LR = {"ttt_linear": 1.0, "ttt_mlp": 0.1}


def language_model(model: ml_collections.ConfigDict) -> LanguageModel:
    """Builds the model that a validated ``config.model`` describes."""
    dtype = jnp.dtype(model.dtype)
    common = {"num_heads": model.num_heads, "dtype": dtype, "init_stddev": model.init_stddev}
    mamba_style = False
    mixer: Callable[..., nn.Module]
    if model.mixer == "attention":
        mixer = partial(Attention, rope_theta=model.rope_theta, **common)
    else:
        ttt = model.ttt
        mamba_style = ttt.backbone == "mamba"
        mixer = partial(
            TTT,
            learner=learner(model),
            backbone=ttt.backbone,
            mini_batch=ttt.mini_batch,
            base_lr=base_lr(model),
            conv_width=model.conv_width,
            rope_theta=model.rope_theta,
            remat_group=ttt.remat_group,
            unroll=ttt.unroll,
            **common,
        )
    block = partial(
        Block,
        make_mixer=mixer,
        mlp_width=model.mlp_width,
        dtype=dtype,
        init_stddev=model.init_stddev,
        norm_epsilon=model.norm_epsilon,
        pre_conv=mamba_style if model.pre_conv is None else model.pre_conv,
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


def learner(model: ml_collections.ConfigDict) -> learner_lib.Learner:
    """The inner model that ``config.model`` describes."""
    head_dim = model.width // model.num_heads
    if model.mixer == "ttt_linear":
        return learner_lib.linear(head_dim)
    return learner_lib.mlp(head_dim, depth=model.ttt.mlp_depth, width_factor=model.ttt.mlp_width_factor)


def base_lr(model: ml_collections.ConfigDict) -> float:
    """The peak inner learning rate: as configured, else the paper's for this mixer."""
    return PAPER_BASE_LR[model.mixer] if model.ttt.base_lr is None else model.ttt.base_lr


def describe(model: ml_collections.ConfigDict) -> str:
    """The model in words, for labels."""
    if model.mixer == "attention":
        return "Transformer"
    name = {"ttt_linear": "TTT-Linear", "ttt_mlp": "TTT-MLP"}[model.mixer]
    return f"{name} ({model.ttt.backbone.capitalize()} backbone)"
