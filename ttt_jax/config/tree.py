"""The default config tree, and the checks that a config passes before anything is compiled.

A config file is Python with ``get_config(arg="")`` that starts from :func:`default` and changes what it needs. Every
key below can be set from the command line: ``--config.optimizer.peak_lr=1e-3``.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import config_dict

from ttt_jax import import_path
from ttt_jax import settings as settings_lib
from ttt_jax.errors import ConfigError

if TYPE_CHECKING:
    from ttt_jax.mixers.mixer import Mixer

GENERATED = ("embedded", "synthetic", "associative_recall", "selective_copying")  # data.source that are no files

LEARNER = "model.ttt.learner"


def mixers() -> Mapping[str, "Mixer"]:
    """Return the registry of mixers. It loads JAX, which commands do not wait for before they need a config."""
    from ttt_jax.mixers import MIXERS

    return MIXERS


def _of_mixers() -> list[tuple[str, Any, str]]:
    """Return the keys of the sections that mixers have, each once."""
    sections = {mixer.section: mixer.settings for mixer in mixers().values() if mixer.section and mixer.settings}
    return [
        (f"model.{section}.{each.name}", each.kind if each.default is None else each.default, each.meaning)
        for section, settings in sections.items()
        for each in settings_lib.of(settings)
    ]


@functools.cache
def all_keys() -> tuple[tuple[str, Any, str], ...]:
    """Return key, default and meaning of all that can be configured; a type for a default is None until set."""
    return (
        ("seed", 0, "of the initial parameters and of the order of the data"),
        ("model.mixer", "ttt_linear", f"sequence mixer: {', '.join(mixers())}"),
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
        *_of_mixers(),
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
        (
            "training.start_from",
            "",
            "the workdir of another run, or one of its checkpoints: the parameters to start with",
        ),
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
    """Every key of :func:`all_keys`, with its default."""
    config = ml_collections.ConfigDict()
    for key, value, _ in all_keys():
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
    m = config.model
    _one_of(config, "model.mixer", mixers())
    _one_of(config, "model.dtype", ("float32", "bfloat16"))
    _one_of(config, "model.remat", ("none", "block"))
    _one_of(config, "evaluation.split", ("train", "validation", "test"))
    for key in (
        "model.vocab_size model.width model.num_layers model.num_heads model.mlp_width model.conv_width "
        "data.sequence_length data.batch_size "
        "training.accumulation checkpoint.keep_last evaluation.windows"
    ).split():
        _at_least(config, key, 1)
    _at_least(config, "data.worker_processes", 0)
    for key in (
        "model.rope_theta model.norm_epsilon model.init_stddev optimizer.peak_lr optimizer.epsilon optimizer.clip_norm"
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
    _check_mixer(m)
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


def _check_mixer(model: ml_collections.ConfigDict) -> None:
    """Check the values of all sections of mixers one by one, and those of the mixer that is used together."""
    for mixer in mixers().values():
        if mixer.section and mixer.settings:
            for each in settings_lib.of(mixer.settings):
                each.accepts.check(f"model.{mixer.section}.{each.name}", model[mixer.section][each.name])
    mixers()[model.mixer].check(model)


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
