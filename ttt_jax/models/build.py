"""From the ``model`` section of a config to a :class:`LanguageModel`."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from ttt_jax import config as config_lib
from ttt_jax import import_path
from ttt_jax.config import ConfigError
from ttt_jax.layers.attention import Attention
from ttt_jax.layers.linear_attention import LinearAttention
from ttt_jax.layers.ttt import TTT
from ttt_jax.models.block import Block
from ttt_jax.models.language_model import LanguageModel
from ttt_jax.parallel.activations import device_kind
from ttt_jax.ttt import learners, rules, update
from ttt_jax.ttt.inner_loop import READINGS, InnerLoop
from ttt_jax.ttt.kernels import choice
from ttt_jax.ttt.learner import Function, Learner
from ttt_jax.ttt.learners import LEARNERS, ResidualNorm
from ttt_jax.ttt.objective import OBJECTIVES
from ttt_jax.ttt.rate import POSITION_RATES, TOKEN_RATES, Rate

_BASE_LR = {"mlp": 0.1}  # the paper's by learner, where it is not 1
_SOFTPLUS_BASE_LR = 0.001  # LaCT's
# Keys of model.ttt that choose an inner loop; TTT-Linear and TTT-MLP are what they are for all but the output.
CHOICES = ("learner", "output", "bias", "objective", "rate", "rate_per_matrix", "position_rate", "update", "reading")
_IN_WORDS = {  # what a label says of a choice that is not TTT-Linear's
    "output": "output {}",
    "bias": "no biases",
    "objective": "{}",
    "rate": "{} rate",
    "rate_per_matrix": "rates per matrix",
    "position_rate": "position rate {}",
    "update": "{}",
    "reading": "reading {}",
}


def language_model(model: ml_collections.ConfigDict) -> LanguageModel:
    """Build the model that a validated ``config.model`` describes.

    Raises:
      ConfigError: where it asks for a kernel that does not exist, or for a learner that breaks the rules.
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
            inner_loop(model)  # refuses what does not exist
        found = loop(model)
        _check(model, found)
        mamba_style = ttt.backbone == "mamba"
        mixer = partial(
            TTT,
            loop=found,
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
    """Return whether the mixer is a TTT layer, so that ``config.model.ttt`` means something."""
    return model.mixer in config_lib.LEARNERS


def check_names(model: ml_collections.ConfigDict) -> None:
    """Raise :class:`ConfigError` where a choice does not exist or go with the others.

    A learner of the user's own is neither imported nor looked for: pictures of a run do not need it.
    """
    named = model.ttt.learner
    if named is not None and import_path.is_import_path(named):
        model = model.copy_and_resolve_references().unlock()
        model.ttt.learner = None
    loop(model)


def loop(model: ml_collections.ConfigDict) -> InnerLoop:
    """Return the inner loop that ``config.model`` describes: of TTT-Linear and TTT-MLP, or any other.

    Raises:
      ConfigError: where a choice is not among those that exist, or does not go with the others.
    """
    ttt, f = model.ttt, learner_function(model)
    objective = _named("model.ttt.objective", ttt.objective, OBJECTIVES)
    rate = Rate(
        _name("model.ttt.rate", ttt.rate, TOKEN_RATES),
        _name("model.ttt.position_rate", ttt.position_rate, POSITION_RATES),
        ttt.rate_per_matrix,
    )
    learner = Learner(ResidualNorm(f) if ttt.output == "residual_norm" else f, model.width // model.num_heads)
    reading = _name("model.ttt.reading", ttt.reading, READINGS)
    chosen = ttt["update"]  # ttt.update is a method
    try:
        return InnerLoop(learner, objective, rate, update.parse(chosen), reading)
    except ValueError as error:
        raise ConfigError(f"model.ttt.update={chosen!r}: {error}") from error


def learner_name(model: ml_collections.ConfigDict) -> str:
    """Return the name of the learner, which the mixer has where none is set."""
    return model.ttt.learner or config_lib.LEARNERS[model.mixer]


def learner_function(model: ml_collections.ConfigDict) -> Function:
    """Return the learner's function, imported where it is one of the user's own."""
    ttt, named = model.ttt, learner_name(model)
    if import_path.is_import_path(named):
        return import_path.load(named, config_lib.LEARNER, ttt.learner_source)
    if named == "mlp" and ttt.mlp_depth == 1:
        named = "linear"  # the same function, by the name that kernels know
    kind = _named(config_lib.LEARNER, named, LEARNERS, f", or {import_path.FORM}")
    options = {"depth": ttt.mlp_depth, "width_factor": ttt.mlp_width_factor, "bias": ttt.bias}
    return learners.make(kind, options)


def _name(key: str, name: str, known: Collection[str], more: str = "") -> str:
    if name not in known:
        raise ConfigError(f"{key}={name!r}: expected one of {', '.join(known)}{more}")
    return name


def _named(key: str, name: str, known: Mapping[str, Any], more: str = "") -> Any:
    return known[_name(key, name, known, more)]


def inner_loop(model: ml_collections.ConfigDict) -> str:
    """Say how the inner loop of a TTT mixer is computed on the devices of the present mesh, and why.

    Raises:
      ConfigError: where a kernel is asked for that does not exist.
    """
    try:
        return choice.choose(model.ttt.kernel, loop(model), model.ttt.mini_batch, device_kind()).why
    except ValueError as error:
        raise ConfigError(f"model.ttt.kernel={model.ttt.kernel}: {error}; expected auto or scan") from error


def base_lr(model: ml_collections.ConfigDict) -> float:
    """Return the peak inner learning rate: as configured, else the paper's for this learner."""
    if model.ttt.base_lr is not None:
        return model.ttt.base_lr
    return _SOFTPLUS_BASE_LR if model.ttt.rate == "softplus" else _BASE_LR.get(learner_name(model), 1.0)


def describe(model: ml_collections.ConfigDict) -> str:
    """Describe the model in words, for labels."""
    if not learns(model):
        return {"attention": "Transformer", "linear_attention": "Linear attention"}[model.mixer]
    backbone = f"{model.ttt.backbone.capitalize()} backbone"
    if model.mixer == "ttt":
        return f"TTT ({', '.join([*_choices(model), backbone])})"
    name = {"ttt_linear": "TTT-Linear", "ttt_mlp": "TTT-MLP"}[model.mixer]
    return f"{name} ({backbone})"


def _choices(model: ml_collections.ConfigDict) -> list[str]:
    """Return the learner, and the other choices of an inner loop where they are not those of TTT-Linear, in words."""
    ttt, default = model.ttt, config_lib.default().model.ttt
    own = [learner_name(model)]
    own += [_IN_WORDS[key].format(ttt[key]) for key in CHOICES if key in _IN_WORDS and ttt[key] != default[key]]
    return own


def _check(model: ml_collections.ConfigDict, found: InnerLoop) -> None:
    """Refuse a learner that breaks the rules, and one that cannot learn."""
    named = learner_name(model)
    is_own, f, features = import_path.is_import_path(named), found.learner.f, found.learner.features
    alone = Learner(f.f if isinstance(f, ResidualNorm) else f, features)
    try:
        matrices = alone.structure.matrices  # messages name the function, not the residual around it
        features_out = found.learner.structure.features_out
        if is_own:
            rules.check(found.learner)
    except ValueError as error:
        raise ConfigError(f"{config_lib.LEARNER}={named!r}: {error}") from error
    except Exception as error:
        if not is_own:
            raise
        where = import_path.said(error, import_path.source_file(named, config_lib.LEARNER))
        raise ConfigError(f"{config_lib.LEARNER}={named!r}: fails: {where}") from error
    if features_out != features:
        raise ConfigError(
            f"{config_lib.LEARNER}={named!r}: makes {features_out} features of {features}; "
            "expected as many as it is given, which is the width of a head"
        )
    if len(matrices) > 1 and not model.ttt.learned_w0:
        raise ConfigError(
            f"model.ttt.learned_w0=False: the learner {named} has {len(matrices)} weight matrices, and with "
            "two or more of zeros all gradients are zero; expected true, or the learner linear"
        )
