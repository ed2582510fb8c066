"""The default config tree, and the checks that a config passes before anything is compiled.

A config file is Python with ``get_config(arg="")`` that starts from :func:`default` and changes what it needs. Every
key below can be set from the command line: ``--config.optimizer.peak_lr=1e-3``.
"""

import math
import re
from typing import Any

import ml_collections
from ml_collections import config_dict

from ttt_jax import import_path
from ttt_jax.errors import ConfigError as ConfigError

MIXERS = ("ttt_linear", "ttt_mlp", "ttt", "attention", "linear_attention")
LEARNER = "model.ttt.learner"
SETTLED = {"ttt_linear": "linear", "ttt_mlp": "mlp"}  # mixers whose inner loop is settled, and their learners
LEARNERS = {**SETTLED, "ttt": "linear"}  # of the mixers that have an inner loop, unless model.ttt.learner is set
OUTPUTS = ("residual_norm", "none")  # model.ttt.output
GENERATED = ("embedded", "synthetic", "associative_recall", "selective_copying")  # data.source that are no files

# Key, default and meaning of everything that can be configured. A type for a default means None, until set.
KEYS: tuple[tuple[str, Any, str], ...] = (
    ("seed", 0, "of the initial parameters and of the order of the data"),
    ("model.mixer", "ttt_linear", "sequence mixer: ttt_linear, ttt_mlp, ttt, attention or linear_attention"),
    ("model.vocab_size", 258, "at least that of the data; 258 is bytes, BOS and EOS"),
    ("model.width", 768, "D"),
    ("model.num_layers", 12, "blocks"),
    ("model.num_heads", 12, "H; divides the width"),
    ("model.mlp_width", 2048, "hidden width of the feed-forward layers"),
    ("model.tie_embeddings", True, "the head is the transposed embedding"),
    ("model.rope_theta", 10000.0, "base of the rotary positions"),
    ("model.pre_conv", bool, "a convolution before each mixer; unset: where the backbone is mamba"),
    ("model.conv_width", 4, "tokens that the causal convolutions see"),
    ("model.norm_epsilon", 1e-6, "of RMSNorm"),
    ("model.init_stddev", 0.02, "of initial kernels, embedding and inner W0"),
    ("model.dtype", "float32", "of the compute, or bfloat16; parameters and inner state are float32 always"),
    ("model.remat", "none", "block: keep only the input of each block for the backward pass"),
    ("model.ttt.backbone", "mamba", "mamba: convolutions and gate; transformer: neither"),
    ("model.ttt.mini_batch", 16, "b, tokens per inner gradient step"),
    (
        "model.ttt.learner",
        str,
        "linear, mlp, swiglu, or MODULE:NAME, a function of your own (docs/recipes.md); unset: that of the mixer",
    ),
    (
        "model.ttt.learner_source",
        "",
        "SHA-256 of the file of a learner of your own; filled in when training starts",
    ),
    ("model.ttt.mlp_depth", 2, "dense layers of the learner mlp"),
    ("model.ttt.mlp_width_factor", 4.0, "hidden width of the learners mlp and swiglu, in head widths"),
    ("model.ttt.bias", True, "dense layers of the learners linear, mlp and swiglu have biases"),
    ("model.ttt.output", "residual_norm", "residual_norm: f(x) = x + LN(learner(x)); none: f(x) = learner(x)"),
    ("model.ttt.learned_w0", True, "W0 is learned; false: it is zero"),
    ("model.ttt.objective", "squared_error", "inner loss of f(k) and v: squared_error, or dot_product"),
    (
        "model.ttt.rate",
        "sigmoid/d",
        "inner learning rate of a token: sigmoid/d (base_lr sigmoid(x w + c) / d), sigmoid (without / d), or softplus "
        "(of x w + c, base_lr at first)",
    ),
    ("model.ttt.rate_per_matrix", False, "each weight matrix of the learner has a rate of its own"),
    (
        "model.ttt.position_rate",
        "1/t",
        "factor of the rate at place t of the mini-batch: 1/t (max(0, 1/t + tau), tau learned), or 1",
    ),
    ("model.ttt.base_lr", float, "peak inner learning rate; unset: 1.0, for the learner mlp 0.1, for softplus 0.001"),
    ("model.ttt.base_lr_start", float, "where its warm-up starts; unset: base_lr, for the learner mlp a tenth of it"),
    (
        "model.ttt.learned_eta",
        True,
        "the rates are learned; false: they stay at their first values, by default base_lr / (2 t d); gates of the "
        "update are learned all the same",
    ),
    (
        "model.ttt.update",
        "sgd",
        "how gradients change W: sgd, or a chain of decay (decay=0.99: the same for all tokens), momentum, "
        "momentum_per_token, muon, renormalise, renormalise_before_use, such as 'momentum + muon + renormalise'",
    ),
    (
        "model.ttt.reading",
        "causal",
        "causal: a token uses the steps of its mini-batch up to its own; previous: it uses the weights that its "
        "mini-batch starts with, as muon and renormalise require",
    ),
    ("model.ttt.kernel", "auto", "of the inner loop: pallas (fused), scan, or auto: pallas on TPUs where there is one"),
    (
        "model.ttt.kernel_check",
        True,
        "compare the fused kernel with the scan before its first use on an accelerator, and use the scan where they "
        "differ (docs/kernels.md)",
    ),
    (
        "model.ttt.remat_group",
        int,
        "mini-batches between two inner states that the backward pass keeps; 0: all; unset: what is fastest "
        "(docs/kernels.md)",
    ),
    ("model.ttt.unroll", int, "of the scan: mini-batches per iteration of the compiled loop; unset: 4 on TPUs, else 1"),
    (
        "data.source",
        "embedded",
        "a folder or URL; embedded: the Python standard library as bytes; synthetic; a task: docs/probes.md",
    ),
    ("data.tokenizer", "", "what must have made the tokens: its kind, name, file or hash; empty: anything"),
    ("data.bos", int, "token that begins documents and is no target; unset: what the dataset says"),
    ("data.worker_processes", 0, "that read batches ahead; 0: threads of this one do"),
    ("data.sequence_length", 2048, "T, tokens"),
    ("data.batch_size", 8, "sequences per optimizer step, over all devices"),
    ("optimizer.peak_lr", 1e-3, "AdamW learning rate after the warm-up"),
    ("optimizer.end_lr", 1e-5, "where its cosine ends"),
    ("optimizer.warmup", "10%", "a duration; also of the inner learning rate"),
    ("optimizer.beta1", 0.9, ""),
    ("optimizer.beta2", 0.95, ""),
    ("optimizer.epsilon", 1e-8, ""),
    ("optimizer.weight_decay", 0.1, "on every parameter"),
    ("optimizer.clip_norm", 1.0, "largest global norm of the gradient"),
    (
        "optimizer.spike_factor",
        0.0,
        "updates whose gradient norm is so many times the median are left out; 0: none are",
    ),
    ("training.duration", "1000 steps", 'a duration: "300 steps", "2.5e9 tokens"; elsewhere also "10%" of the run'),
    ("training.start_from", "", "the workdir of another run, or one of its checkpoints: the parameters to start with"),
    ("training.accumulation", 1, "micro-batches per optimizer step"),
    (
        "training.stall_limit",
        900.0,
        "seconds without a finished step that end the process, to be restarted; 0: none do",
    ),
    ("mesh.data", -1, "devices along the axis that splits batches; -1 is the rest"),
    ("mesh.fsdp", 1, "devices along the axis that splits batches and parameters"),
    ("mesh.tensor", 1, "devices along the axis that splits heads and feed-forward layers"),
    ("checkpoint.every", "10%", "a duration"),
    ("checkpoint.keep_last", 2, "how many of the newest checkpoints are kept"),
    ("checkpoint.milestone_every", "", "a duration; checkpoints at its multiples are kept for good"),
    (
        "evaluation.every",
        "",
        "a duration: loss of held-out windows; the checkpoint of the lowest is kept",
    ),
    ("evaluation.split", "validation", "where they are from"),
    ("evaluation.windows", 64, "at most so many, as long as those of training"),
    ("profile.steps", "", 'steps to trace into WORKDIR/profile, for xprof or TensorBoard: "10" or "10:13"'),
    ("log.every", "1 step", "a duration: one record of metrics.jsonl"),
    ("log.tensorboard", False, "also write TensorBoard files; needs the extra [tensorboard]"),
    ("log.wandb_project", "", "also log to this Weights & Biases project; needs the extra [wandb]"),
)


DURATIONS = (
    *("training.duration", "optimizer.warmup", "checkpoint.every", "checkpoint.milestone_every", "evaluation.every"),
    "log.every",
)
_MAY_BE_EMPTY = ("checkpoint.milestone_every", "evaluation.every")
_MOST = 1e18  # steps, tokens, or the width of anything: more is a slip, and would overflow


def default() -> ml_collections.ConfigDict:
    """Every key of :data:`KEYS`, with its default."""
    config = ml_collections.ConfigDict()
    for key, value, _ in KEYS:
        *sections, name = key.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        section[name] = config_dict.placeholder(value) if isinstance(value, type) else value
    return config.lock()


def steps(config: ml_collections.ConfigDict, key: str) -> int:
    """A duration of the config in optimizer steps, at least 1 (0 for an empty one).

    Durations are strings: ``"300"`` or ``"300 steps"``, ``"2.5e9 tokens"`` (also ``k``, ``M``, ``B``), and, for all
    but the run itself, ``"10%"`` of the run.
    """
    text = str(value_of(config, key)).strip()
    if not text and key in _MAY_BE_EMPTY:
        return 0
    match = re.fullmatch(r"([0-9.]+(?:e\+?[0-9]+)?)\s*([kMB]?)\s*(|%|steps?|tokens?)", text)
    try:
        amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else math.nan
    except ValueError:
        amount = math.nan
    unit = match[3] if match else ""
    of_run = key == "training.duration"
    if not amount > 0 or not math.isfinite(amount) or (unit == "%" and (of_run or amount > 100)):
        percent = "" if of_run else ', "10%" of the run'
        raise ConfigError(f'{key}={text!r}: expected a duration such as "300 steps", "2.5e9 tokens"{percent}')
    if unit != "%" and amount > _MOST:
        raise ConfigError(f"{key}={text!r}: expected a duration of at most {_MOST:.0e} steps or tokens")
    if unit == "%":
        return max(1, round(steps(config, "training.duration") * amount / 100))
    if unit.startswith("token"):
        amount /= config.data.batch_size * config.data.sequence_length
    return max(1, round(amount))


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises :class:`ConfigError` for the first thing that cannot be run."""
    m, t = config.model, config.model.ttt
    _one_of(config, "model.mixer", MIXERS)
    _one_of(config, "model.dtype", ("float32", "bfloat16"))
    _one_of(config, "model.remat", ("none", "block"))
    _one_of(config, "model.ttt.backbone", ("mamba", "transformer"))
    _one_of(config, "model.ttt.output", OUTPUTS)
    _one_of(config, "model.ttt.kernel", ("auto", "pallas", "scan"))
    _one_of(config, "evaluation.split", ("train", "validation", "test"))
    for key in (
        "model.vocab_size model.width model.num_layers model.num_heads model.mlp_width model.conv_width "
        "model.ttt.mini_batch model.ttt.mlp_depth data.sequence_length data.batch_size "
        "training.accumulation checkpoint.keep_last evaluation.windows"
    ).split():
        _at_least(config, key, 1)
    for key, least in (("model.ttt.remat_group", 0), ("model.ttt.unroll", 1)):
        if value_of(config, key) is not None:
            _at_least(config, key, least)
    _at_least(config, "data.worker_processes", 0)
    for key in (
        "model.rope_theta model.norm_epsilon model.init_stddev model.ttt.mlp_width_factor model.ttt.base_lr "
        "model.ttt.base_lr_start optimizer.peak_lr optimizer.epsilon optimizer.clip_norm"
    ).split():
        _positive(config, key)
    for key in ("optimizer.end_lr", "optimizer.weight_decay", "training.stall_limit"):
        _at_least(config, key, 0)
        if not math.isfinite(value_of(config, key)):
            raise ConfigError(f"{key}={value_of(config, key)}: expected a finite number, 0 or more")
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= value_of(config, key) < 1:
            raise ConfigError(f"{key}={value_of(config, key)}: expected a number from 0 to below 1")
    if not (config.optimizer.spike_factor == 0 or 1 < config.optimizer.spike_factor < math.inf):
        raise ConfigError(
            f"optimizer.spike_factor={config.optimizer.spike_factor}: expected a finite number above 1, or 0 for none"
        )
    profiled_steps(config)
    _check_learner(t)
    _check_inner_loop(m)
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed}: expected an integer from 0 to 2^32 - 1")

    if m.width % m.num_heads:
        near = next(h for h in range(min(m.num_heads, m.width), 0, -1) if m.width % h == 0)
        raise ConfigError(
            f"model.num_heads={m.num_heads}: does not divide model.width={m.width}; expected a divisor, such as {near}"
        )
    head_dim = m.width // m.num_heads
    if head_dim % 2:
        raise ConfigError(
            f"model.num_heads={m.num_heads}: gives an odd head width, {head_dim}; "
            "expected model.width / model.num_heads to be even, which rotary positions need"
        )
    if m.mixer in ("ttt_mlp", "ttt") and not 1 <= head_dim * t.mlp_width_factor < _MOST:
        raise ConfigError(f"model.ttt.mlp_width_factor={t.mlp_width_factor}: expected at least 1 / {head_dim}")
    if m.mixer == "ttt_mlp" and not t.learned_w0:
        raise ConfigError(
            "model.ttt.learned_w0=False: with two or more layers of zeros all gradients are zero; expected true, or "
            "model.mixer=ttt_linear"
        )
    if config.data.batch_size % config.training.accumulation:
        raise ConfigError(
            f"training.accumulation={config.training.accumulation}: does not divide "
            f"data.batch_size={config.data.batch_size}; expected a divisor"
        )
    for key in DURATIONS:
        steps(config, key)
    if steps(config, "optimizer.warmup") >= steps(config, "training.duration") > 1:
        raise ConfigError(
            f"optimizer.warmup={config.optimizer.warmup!r}: expected less than "
            f"training.duration={config.training.duration!r}"
        )


def _check_learner(ttt: ml_collections.ConfigDict) -> None:
    named, source = ttt.learner, ttt.learner_source
    is_own = named is not None and import_path.is_import_path(named)
    if source and not re.fullmatch("[0-9a-f]{64}", source):
        raise ConfigError(f"model.ttt.learner_source={source!r}: expected a SHA-256 in 64 hexadecimal digits, or none")
    if source and not is_own:
        raise ConfigError(
            f"model.ttt.learner_source={source[:12]}...: is of a learner by import path, and model.ttt.learner is "
            f"{'unset' if named is None else named}; expected none"
        )


def _check_inner_loop(model: ml_collections.ConfigDict) -> None:
    """Refuse choices of an inner loop that do not exist, and those that a mixer does not leave open."""
    if model.mixer == "ttt":
        from ttt_jax.models import build  # loads JAX, and only this mixer needs it here

        build.check_names(model)
    if model.mixer not in SETTLED:
        return
    settled = {**default().model.ttt.to_dict(), "learner": SETTLED[model.mixer]}
    for key in ("learner", "objective", "rate", "rate_per_matrix", "position_rate", "update", "reading"):
        if model.ttt[key] not in (None, settled[key]):
            raise ConfigError(
                f"model.ttt.{key}={model.ttt[key]!r}: is settled for model.mixer={model.mixer}; expected "
                f"{settled[key]}, or model.mixer=ttt, which leaves it open"
            )


def own_learner(config: ml_collections.ConfigDict) -> str | None:
    """Return the import path of a learner of the user's own; None where the config has none."""
    named = config.model.ttt.learner
    return named if named is not None and import_path.is_import_path(named) else None


def profiled_steps(config: ml_collections.ConfigDict) -> range:
    """The steps to trace, counted from 1; none when ``profile.steps`` is empty."""
    text = config.profile.steps.strip()
    match = re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if text and not 1 <= first <= last:
        raise ConfigError(f'profile.steps={text!r}: expected steps from 1, such as "10" or "10:13"')
    return range(first, last + 1)


def mesh_shape(config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """Devices along each mesh axis, with -1 resolved; raises :class:`ConfigError` where they do not fit."""
    shape = {axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor")}
    for axis, size in shape.items():
        if size != -1 and size < 1:
            raise ConfigError(f"mesh.{axis}={size}: expected a positive number of devices, or -1 for the rest")
    rest = [axis for axis, size in shape.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(f"mesh.{rest[1]}=-1: mesh.{rest[0]} is -1 too; expected one -1 at most")
    known = math.prod(size for size in shape.values() if size != -1)
    if devices % known or (not rest and known != devices):
        axes = ", ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
        raise ConfigError(f"{axes}: does not fit {devices} devices; expected sizes whose product is {devices}")
    if rest:
        shape[rest[0]] = devices // known
    if config.model.num_heads % shape["tensor"]:
        raise ConfigError(
            f"mesh.tensor={shape['tensor']}: does not divide model.num_heads={config.model.num_heads}; "
            "expected a divisor"
        )
    rows = shape["data"] * shape["fsdp"]
    micro_batch = config.data.batch_size // config.training.accumulation
    if micro_batch % rows:
        split = f" / training.accumulation={config.training.accumulation}" if config.training.accumulation > 1 else ""
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}{split}: not divisible by the {rows} devices of "
            f"mesh.data x mesh.fsdp; expected a multiple of {rows * config.training.accumulation}"
        )
    return shape


def differing_keys(a: dict, b: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two nested dicts, with both values (None where a key is missing)."""
    found = {}
    for key in sorted(a.keys() | b.keys()):
        left, right, name = a.get(key), b.get(key), f"{prefix}{key}"
        if isinstance(left, dict) and isinstance(right, dict):
            found.update(differing_keys(left, right, name + "."))
        elif left != right:
            found[name] = (left, right)
    return found


def value_of(config: ml_collections.ConfigDict, key: str) -> Any:
    """Return the value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def _one_of(config, key, accepted):
    if value_of(config, key) not in accepted:
        raise ConfigError(f"{key}={value_of(config, key)!r}: expected one of {', '.join(accepted)}")


def _at_least(config, key, least):
    if value_of(config, key) is None or not value_of(config, key) >= least:
        raise ConfigError(f"{key}={value_of(config, key)}: expected {least} or more")


def _positive(config, key):
    value = value_of(config, key)
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{key}={value}: expected a positive number")
