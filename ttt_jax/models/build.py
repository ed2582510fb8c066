"""From the ``model`` section of a config to a :class:`LanguageModel`."""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from ttt_jax import import_path
from ttt_jax.config import ConfigError
from ttt_jax.layers.attention import Attention
from ttt_jax.layers.linear_attention import LinearAttention
from ttt_jax.layers.ttt import TTT
from ttt_jax.models.block import Block
from ttt_jax.models.language_model import LanguageModel
from ttt_jax.parallel.activations import device_kind
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt.kernels import choice

PAPER_BASE_LR = {"ttt_linear": 1.0, "ttt_mlp": 0.1}


def language_model(model: ml_collections.ConfigDict) -> LanguageModel:
    """Builds the model that a validated ``config.model`` describes.

    Raises:
      ConfigError: where it asks for a kernel that there is not.
    """
    dtype = jnp.dtype(model.dtype)
    common = {"num_heads": model.num_heads, "dtype": dtype, "init_stddev": model.init_stddev}
    mamba_style = False
    mixer: Callable[..., nn.Module]
    if not learns(model):
        kind = {"attention": Attention, "linear_attention": LinearAttention}[model.mixer]
        mixer = partial(kind, rope_theta=model.rope_theta, **common)
    else:
        ttt = model.ttt
        if ttt.kernel == "pallas":
            inner_loop(model)  # refuses what there is not
        mamba_style = ttt.backbone == "mamba"
        mixer = partial(
            TTT,
            learner=learner(model),
            backbone=ttt.backbone,
            mini_batch=ttt.mini_batch,
            base_lr=base_lr(model),
            learned_w0=ttt.learned_w0,
            learned_eta=ttt.learned_eta,
            conv_width=model.conv_width,
            rope_theta=model.rope_theta,
            kernel=ttt.kernel,
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


def learns(model: ml_collections.ConfigDict) -> bool:
    """Whether the mixer is a TTT layer, so that ``config.model.ttt`` means something."""
    return model.mixer in PAPER_BASE_LR


def learner(model: ml_collections.ConfigDict) -> learner_lib.Learner:
    """The inner model that ``config.model`` describes.

    Raises:
      ConfigError: where ``model.ttt.learner`` is not one that the mixer takes.
    """
    head_dim, ttt = model.width // model.num_heads, model.ttt
    of_mixer = {"ttt_linear": "linear", "ttt_mlp": "mlp"}[model.mixer]
    if ttt.learner is not None and import_path.is_import_path(ttt.learner):
        import_path.load(ttt.learner, "model.ttt.learner", ttt.learner_source)
    if ttt.learner not in (None, of_mixer):
        raise ConfigError(f"model.ttt.learner={ttt.learner!r}: model.mixer={model.mixer} takes {of_mixer}, or none")
    if model.mixer == "ttt_linear":
        found = learner_lib.linear(head_dim)
    else:
        found = learner_lib.mlp(head_dim, depth=ttt.mlp_depth, width_factor=ttt.mlp_width_factor)
    return dataclasses.replace(found, norm_residual=ttt.output == "residual_norm", bias=ttt.bias)


def inner_loop(model: ml_collections.ConfigDict) -> str:
    """How the inner loop of a TTT mixer is computed on the devices of the present mesh, and why, in words.

    Raises:
      ConfigError: where a kernel is asked for that there is not.
    """
    try:
        return choice.choose(model.ttt.kernel, learner(model), model.ttt.mini_batch, device_kind()).why
    except ValueError as error:
        raise ConfigError(f"model.ttt.kernel={model.ttt.kernel}: {error}; expected auto or scan") from error


def base_lr(model: ml_collections.ConfigDict) -> float:
    """The peak inner learning rate: as configured, else the paper's for this mixer."""
    return PAPER_BASE_LR[model.mixer] if model.ttt.base_lr is None else model.ttt.base_lr


def describe(model: ml_collections.ConfigDict) -> str:
    """The model in words, for labels."""
    if not learns(model):
        return {"attention": "Transformer", "linear_attention": "Linear attention"}[model.mixer]
    name = {"ttt_linear": "TTT-Linear", "ttt_mlp": "TTT-MLP"}[model.mixer]
    return f"{name} ({model.ttt.backbone.capitalize()} backbone)"
