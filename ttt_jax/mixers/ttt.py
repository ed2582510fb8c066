"""Define the TTT mixers: ``ttt_linear`` and ``ttt_mlp`` of the paper, and ``ttt``, whose inner loop is configured.

The Flax module is :class:`ttt_jax.mixers.ttt_layer.TTT`; :mod:`ttt_jax.mixers.ttt_loop` makes its inner loop.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax import import_path
from ttt_jax.distributed.sharding import device_kind
from ttt_jax.errors import ConfigError
from ttt_jax.kernels import run as kernels
from ttt_jax.kernels import self_check
from ttt_jax.mixers.mixer import Memory, Mixer, Model, Style, head_options
from ttt_jax.mixers.ttt_layer import TTT as TTT
from ttt_jax.mixers.ttt_loop import (
    FIXED_LEARNERS,
    LEARNER,
    base_lr,
    base_lr_start,
    check_learner,
    check_names,
    learner_name,
    loop,
)
from ttt_jax.settings import setting, settings_of
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import operations, update
from ttt_jax.ttt.inner_loop import InnerLoop


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section ``model.ttt``."""

    backbone: str = setting(
        "mamba", "mamba: convolutions and gate; transformer: neither", among=("mamba", "transformer")
    )
    mini_batch: int = setting(16, "b, tokens per inner gradient step", least=1)
    learner: str | None = setting(
        None,
        "linear, mlp, swiglu, or MODULE:NAME, a function of your own (docs/recipes.md); unset: that of the mixer",
        takes_function=True,
    )
    learner_source: str = setting(
        "",
        "SHA-256 of the file of a learner of your own; set when training starts",
        may_change=True,  # checked separately: ttt train --accept-changed-learner
    )
    mlp_depth: int = setting(2, "dense layers of the learner mlp", least=1)
    mlp_width_factor: float = setting(4.0, "hidden width of the learners mlp and swiglu, in head widths", above=0)
    bias: bool = setting(True, "dense layers of the learners linear, mlp and swiglu have biases")
    output: str = setting(
        "residual_norm",
        "residual_norm: f(x) = x + LN(learner(x)); none: f(x) = learner(x)",
        among=("residual_norm", "none"),
    )
    learned_w0: bool = setting(True, "learn W0; false: it is zero")
    objective: str = setting("squared_error", "inner loss of f(k) and v: squared_error, or dot_product")
    rate: str = setting(
        "sigmoid/d",
        "inner learning rate of a token: sigmoid/d (base_lr sigmoid(x w + c) / d), sigmoid (without / d), or softplus "
        "(of x w + c, initially base_lr)",
    )
    rate_per_matrix: bool = setting(False, "give each weight matrix of the learner its own rate")
    position_rate: str = setting(
        "1/t", "factor of the rate at position t of the mini-batch: 1/t (max(0, 1/t + tau), tau learned), or 1"
    )
    base_lr: float | None = setting(
        None, "peak inner learning rate; unset: 1.0, for the learner mlp 0.1, for softplus 0.001", above=0
    )
    base_lr_start: float | None = setting(
        None,
        "rate at the start of the warm-up; unset: base_lr, for the learner mlp a tenth of it",
        least=0,
    )
    learned_eta: bool = setting(
        True,
        "learn the rates; false: they keep their initial values, by default base_lr / (2 t d); gates of the update are "
        "learned in any case",
    )
    update: str = setting(
        "sgd",
        "how gradients change W: sgd, or a chain of decay (decay=0.99: the same for all tokens), momentum, "
        "momentum_per_token, muon, renormalise, renormalise_before_use, such as 'momentum + muon + renormalise'",
    )
    reading: str = setting(
        "causal",
        "causal: a token uses the steps of its mini-batch up to its own; previous: it uses the weights that its "
        "mini-batch starts with, as muon and renormalise require",
    )
    kernel: str = setting(
        "auto",
        "implementation of the inner loop: pallas (fused), scan, or auto: pallas on TPUs where such a kernel exists",
        among=kernels.KERNELS,
        changes_results=False,
    )
    kernel_check: bool = setting(
        True,
        "compare the fused kernel with the scan before its first use on an accelerator, and use the scan where they "
        "differ (docs/kernels.md)",
        changes_results=False,
    )
    remat_group: int | None = setting(
        None,
        "mini-batches between two inner states that the backward pass keeps; 0: all; unset: the fastest choice "
        "(docs/kernels.md)",
        least=0,
        changes_results=False,
    )
    unroll: int | None = setting(
        None,
        "mini-batches per iteration of the compiled loop of the scan; unset: 4 on TPUs, else 1",
        least=1,
        changes_results=False,
    )


_DEFAULT = {each.name: each.default for each in settings_of(Settings)}
# Keys that choose the inner loop. TTT-Linear and TTT-MLP allow other values only for the output and the biases.
CHOICES = ("learner", "output", "bias", "objective", "rate", "rate_per_matrix", "position_rate", "update", "reading")
_IN_WORDS = {  # the words in a label for a choice that differs from TTT-Linear
    "output": "output {}",
    "bias": "no biases",
    "objective": "{}",
    "rate": "{} rate",
    "rate_per_matrix": "rates per matrix",
    "position_rate": "position rate {}",
    "update": "{}",
    "reading": "reading {}",
}


def _check_fixed(model: Model) -> None:
    """Check the config of TTT-Linear or TTT-MLP, whose inner loop is fixed."""
    _check(model)
    fixed = {**_DEFAULT, "learner": FIXED_LEARNERS[model.mixer]}
    for key in CHOICES:
        if key in ("output", "bias"):
            continue
        if model.ttt[key] not in (None, fixed[key]):
            raise ConfigError(
                f"model.ttt.{key}={model.ttt[key]!r}: is fixed for model.mixer={model.mixer}; expected "
                f"{fixed[key]}, or model.mixer=ttt, which accepts any choice"
            )
    if learner_name(model) == "mlp" and not model.ttt.learned_w0:
        raise ConfigError(
            "model.ttt.learned_w0=False: two or more layers of zeros have zero gradients; expected true, or "
            "model.mixer=ttt_linear"
        )


def _check_open(model: Model) -> None:
    """Check the config of a mixer whose inner loop is configured."""
    _check(model)
    check_names(model)


def _check(model: Model) -> None:
    ttt = model.ttt
    named, source = ttt.learner, ttt.learner_source
    if source and not re.fullmatch("[0-9a-f]{64}", source):
        raise ConfigError(f"model.ttt.learner_source={source!r}: expected a SHA-256 in 64 hexadecimal digits, or none")
    if source and not (named is not None and import_path.is_import_path(named)):
        raise ConfigError(
            f"model.ttt.learner_source={source[:12]}...: is the hash of a learner of your own, but {LEARNER} is "
            f"{'unset' if named is None else named}; expected none"
        )
    head_dim = model.width // model.num_heads
    if model.mixer != "ttt_linear" and not 1 <= head_dim * ttt.mlp_width_factor < 1e18:
        raise ConfigError(f"model.ttt.mlp_width_factor={ttt.mlp_width_factor}: expected at least 1 / {head_dim}")


def _module(model: Model) -> Callable[..., nn.Module]:
    ttt = model.ttt
    if ttt.kernel == "pallas":
        _computed(model)  # raises where no such kernel exists
    found = loop(model)
    check_learner(model, found)
    return partial(
        TTT,
        loop=found,
        backbone=ttt.backbone,
        mini_batch=ttt.mini_batch,
        base_lr=base_lr(model),
        base_lr_start=base_lr_start(model),
        learned_w0=ttt.learned_w0,
        learned_eta=ttt.learned_eta,
        conv_width=model.conv_width,
        **head_options(model),
        kernel=ttt.kernel,
        remat_group=ttt.remat_group,
        unroll=ttt.unroll,
    )


def _operations(model: Model, sequence_length: int) -> float:
    """Count q, v, o, and k or, in the Mamba backbone, the gate; rates and gates of the update; the inner loop."""
    d, found = model.width, loop(model)
    rates = len(found.learner.structure.matrices) if found.rate.per_matrix else 1
    numbers = rates * model.ttt.learned_eta + len(update.token_gates(found.update))  # per token and head
    inner = operations.per_token(found, min(model.ttt.mini_batch, sequence_length))
    return 4 * 2 * d * d + 2 * d * model.num_heads * numbers + model.num_heads * inner


def _computed(model: Model) -> str:
    """Return how the inner loop is computed on the devices of the present mesh, and why.

    Raises:
      ConfigError: for a kernel that does not exist for this model.
    """
    try:
        return kernels.choose(model.ttt.kernel, loop(model), model.ttt.mini_batch, device_kind()).why
    except ValueError as error:
        raise ConfigError(f"model.ttt.kernel={model.ttt.kernel}: {error}; expected auto or scan") from error


def _kernel_check(model: Model, sharing: int, device: str) -> self_check.Check | None:
    found, ttt = loop(model), model.ttt
    if not ttt.kernel_check or kernels.choose(ttt.kernel, found, ttt.mini_batch, device).kernel is None:
        return None
    heads = model.num_heads // sharing
    return self_check.of_inner_loop(self_check.Family(found, ttt.mini_batch, heads, model.dtype, ttt.remat_group))


def _label(model: Model) -> str:
    backbone = f"{model.ttt.backbone.capitalize()} backbone"
    if model.mixer in FIXED_LEARNERS:
        return f"{ {'ttt_linear': 'TTT-Linear', 'ttt_mlp': 'TTT-MLP'}[model.mixer] } ({backbone})"
    choices = [learner_name(model)]
    choices += [words.format(model.ttt[key]) for key, words in _IN_WORDS.items() if model.ttt[key] != _DEFAULT[key]]
    return f"TTT ({', '.join([*choices, backbone])})"


def _memory(model: Model, sequence_length: int) -> Memory:
    weights, slots = _numbers_of_a_head(loop(model))
    itemsize = jnp.dtype(model.dtype).itemsize
    kept_every = max(64, model.ttt.mini_batch)  # tokens
    return Memory(model.num_heads * weights, 25, itemsize * (weights + slots) / kept_every)


@functools.lru_cache(maxsize=16)
def _numbers_of_a_head(found: InnerLoop) -> tuple[int, int]:
    """Return the number of weights of a head, and of the numbers that the update remembers beside them."""
    w0 = jax.eval_shape(lambda: learner_lib.init(jax.random.key(0), found.learner, heads=1))
    slots = jax.eval_shape(functools.partial(update.init, found.update), w0)
    return sum(x.weight.size for x in w0), sum(x.size for x in jax.tree.leaves(slots))


_OPEN = Mixer(
    module=_module,
    operations=_operations,
    label=_label,
    section="ttt",
    settings=Settings,
    check=_check_open,
    pre_conv=lambda model: model.ttt.backbone == "mamba",
    inner_loop=loop,
    computed=_computed,
    kernel_check=_kernel_check,
    memory=_memory,
)
MIXERS = {
    "ttt_linear": dataclasses.replace(
        _OPEN,
        check=_check_fixed,
        styles={
            "TTT-Linear (Mamba backbone)": Style("#0072B2", "-", "o"),
            "TTT-Linear (Transformer backbone)": Style("#56B4E9", (0, (5, 1)), "D"),
        },
    ),
    "ttt_mlp": dataclasses.replace(
        _OPEN,
        check=_check_fixed,
        styles={
            "TTT-MLP (Mamba backbone)": Style("#D55E00", "--", "s"),
            "TTT-MLP (Transformer backbone)": Style("#E69F00", (0, (3, 1, 1, 1)), "P"),
        },
    ),
    "ttt": _OPEN,
}
