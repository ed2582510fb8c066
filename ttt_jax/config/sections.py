"""Declare the sections of a config, except those of mixers, which are in the mixers' files.

Each section is a dataclass. Its fields say what a key means, what it accepts, and whether another value changes
results. A function beside it checks what a field cannot say: it raises :class:`ConfigError` for values that do not go
together.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import ml_collections

from ttt_jax.errors import ConfigError
from ttt_jax.settings import Duration, setting

GENERATED = (
    "embedded",
    "synthetic",
    "associative_recall",
    "selective_copying",
)  # data.source without files


@dataclass(frozen=True)
class Run:
    """The keys outside of sections."""

    seed: int = setting(0, "random seed of the initial parameters and of the order of the data")


def check_run(config: ml_collections.ConfigDict) -> None:
    """Check that the seed has 32 bits; JAX does not distinguish larger ones."""
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed}: expected an integer from 0 to 2^32 - 1")


@dataclass(frozen=True)
class Model:
    """The section ``model``, which also holds the sections of the mixers."""

    mixer: str = setting("ttt_linear", "sequence mixer")
    vocab_size: int = setting(258, "V, at least that of the data; 258 is bytes, BOS and EOS", least=1)
    width: int = setting(768, "D", least=1)
    num_layers: int = setting(12, "blocks", least=1)
    num_heads: int = setting(12, "H; divides the width", least=1)
    mlp_width: int = setting(2048, "hidden width of the feed-forward layers", least=1)
    tie_embeddings: bool = setting(True, "use the transposed embedding as the head")
    rope_theta: float = setting(10000.0, "base of the rotary positions", above=0)
    pre_conv: bool | None = setting(None, "add a convolution before each mixer; unset: where the backbone is mamba")
    channel: str = setting(
        "swiglu",
        "parts after the mixer in a block: swiglu (feed-forward), none, or several such as 'swiglu + swiglu'",
    )
    norms: str = setting(
        "pre", "pre: a norm before each part of a block; pre_post: also one after it", among=("pre", "pre_post")
    )
    conv_width: int = setting(4, "tokens that a causal convolution reads, including the current one", least=1)
    norm_epsilon: float = setting(1e-6, "epsilon of RMSNorm", above=0)
    init_stddev: float = setting(0.02, "standard deviation of initial kernels, the embedding and the inner W0", above=0)
    dtype: str = setting(
        "float32",
        "dtype of the compute: float32 or bfloat16; parameters and inner state are always float32",
        among=("float32", "bfloat16"),
    )
    remat: str = setting(
        "none",
        "rematerialisation; block: keep only the input of each block for the backward pass",
        among=("none", "block"),
        changes_results=False,
    )


def check_model(config: ml_collections.ConfigDict) -> None:
    """Check that heads divide the width into equal parts of even width."""
    m = config.model
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


@dataclass(frozen=True)
class Data:
    """The section ``data``."""

    source: str = setting(
        "embedded",
        "a folder or URL; embedded: the Python standard library as bytes; synthetic; a task: docs/probes.md",
        may_change=True,  # to a copy elsewhere, which is checked to hold the same tokens
    )
    tokenizer: str = setting(
        "",
        "tokenizer that must have made the tokens: its kind, name, file or hash; empty: any",
        may_change=True,  # like the source
    )
    bos: int | None = setting(None, "token that begins documents and is not predicted; unset: as the dataset says")
    worker_processes: int = setting(
        0, "processes that read batches ahead; 0: threads of the main process", least=0, changes_results=False
    )
    sequence_length: int = setting(2048, "T, tokens", least=1)
    batch_size: int = setting(8, "sequences per optimizer step, over all devices", least=1)


@dataclass(frozen=True)
class Optimizer:
    """The section ``optimizer``: AdamW, its schedule and its guard."""

    peak_lr: float = setting(1e-3, "AdamW learning rate at the end of the warm-up", above=0)
    end_lr: float = setting(1e-5, "learning rate at the end of the cosine schedule", least=0)
    warmup: Duration = setting("10%", "a duration: warm-up of the learning rate, and of the inner learning rate")
    beta1: float = setting(0.9, "decay of the running mean of gradients", least=0, below=1)
    beta2: float = setting(0.95, "decay of the running mean of squared gradients", least=0, below=1)
    epsilon: float = setting(1e-8, "added to the root of the mean of squared gradients", above=0)
    weight_decay: float = setting(0.1, "AdamW weight decay, on every parameter", least=0)
    clip_norm: float = setting(1.0, "largest global norm of the gradient", above=0)
    spike_factor: float = setting(
        0.0,
        "leave out updates whose gradient norm is more than this many times the median; 0: none",
        may_change=True,  # it may be turned on when spikes are seen
    )


def check_optimizer(config: ml_collections.ConfigDict) -> None:
    """Check that the guard does not leave out ordinary updates."""
    factor = config.optimizer.spike_factor
    if not (factor == 0 or 1 < factor < math.inf):
        raise ConfigError(f"optimizer.spike_factor={factor}: expected a finite number above 1, or 0 for none")


@dataclass(frozen=True)
class Training:
    """The section ``training``."""

    duration: Duration = setting(
        "1000 steps",
        'a duration: "300 steps", "2.5e9 tokens"; elsewhere also "10%" of the run',
        may_change=True,  # the rest of the schedule follows the new duration
    )
    start_from: str = setting("", "workdir of another run, or one of its checkpoints, whose parameters to start with")
    accumulation: int = setting(1, "micro-batches per optimizer step", least=1, changes_results=False)
    stall_limit: float = setting(
        900.0,
        "seconds without a finished step after which the process ends, to be restarted; 0: never",
        least=0,
        changes_results=False,
    )


def check_training(config: ml_collections.ConfigDict) -> None:
    """Check that the micro-batches of a step have one size."""
    if config.data.batch_size % config.training.accumulation:
        raise ConfigError(
            f"training.accumulation={config.training.accumulation}: does not divide "
            f"data.batch_size={config.data.batch_size}; expected a divisor"
        )


@dataclass(frozen=True)
class Mesh:
    """The section ``mesh``: its axes, in the order of the mesh."""

    data: int = setting(-1, "devices along the axis that splits batches; -1: the rest", changes_results=False)
    fsdp: int = setting(1, "devices along the axis that splits batches and parameters", changes_results=False)
    tensor: int = setting(1, "devices along the axis that splits heads and feed-forward layers", changes_results=False)


def check_mesh(config: ml_collections.ConfigDict) -> None:
    """Check that sizes are positive, and at most one of them is -1."""
    shape = config.mesh.to_dict()
    for axis, size in shape.items():
        if size != -1 and size < 1:
            raise ConfigError(f"mesh.{axis}={size}: expected a positive number of devices, or -1 for the rest")
    rest = [axis for axis, size in shape.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(f"mesh.{rest[1]}=-1: mesh.{rest[0]} is -1 too; expected one -1 at most")


def mesh_shape(config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """Return the number of devices along each axis of the mesh, with -1 resolved.

    Raises:
      ConfigError: where the mesh does not fit the number of devices, or heads or batch do not fit the mesh.
    """
    check_mesh(config)
    shape = config.mesh.to_dict()
    rest = [axis for axis, size in shape.items() if size == -1]
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


@dataclass(frozen=True)
class Checkpoint:
    """The section ``checkpoint``."""

    every: Duration = setting("10%", "a duration: time between checkpoints", changes_results=False)
    keep_last: int = setting(2, "number of newest checkpoints to keep", least=1, changes_results=False)
    milestone_every: Duration = setting(
        "", "a duration; keep checkpoints at its multiples for good", changes_results=False
    )


@dataclass(frozen=True)
class Evaluation:
    """The section ``evaluation``: validation during training."""

    every: Duration = setting(
        "",
        "a duration: compute the loss of held-out windows, and keep the checkpoint with the lowest; empty: never",
        changes_results=False,
    )
    split: str = setting(
        "validation",
        "split of the dataset that the windows are from",
        among=("train", "validation", "test"),
        changes_results=False,
    )
    windows: int = setting(64, "largest number of windows, each as long as in training", least=1, changes_results=False)


@dataclass(frozen=True)
class Profile:
    """The section ``profile``."""

    steps: str = setting(
        "",
        'steps to trace into WORKDIR/profile, for xprof or TensorBoard, such as "10" or "10:13"; empty: none',
        changes_results=False,
    )


def profiled_steps(config: ml_collections.ConfigDict) -> range:
    """Return the steps to trace, counted from 1; an empty range where ``profile.steps`` is empty."""
    text = config.profile.steps.strip()
    match = re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if text and not 1 <= first <= last:
        raise ConfigError(f'profile.steps={text!r}: expected a step from 1, or a first and a last one, as in "10:13"')
    return range(first, last + 1)


@dataclass(frozen=True)
class Log:
    """The section ``log``."""

    every: Duration = setting("1 step", "a duration: time between records of metrics.jsonl", changes_results=False)
    tensorboard: bool = setting(
        False, "also write TensorBoard files; needs the extra [tensorboard]", changes_results=False
    )
    wandb_project: str = setting(
        "", "also log to this Weights & Biases project; needs the extra [wandb]", changes_results=False
    )


class Section(NamedTuple):
    """A section, and a function that checks its values with each other and with those of other sections."""

    settings: type
    check: Callable[[ml_collections.ConfigDict], object] = lambda config: None


SECTIONS = {
    "": Section(Run, check_run),
    "model": Section(Model, check_model),
    "data": Section(Data),
    "optimizer": Section(Optimizer, check_optimizer),
    "training": Section(Training, check_training),
    "mesh": Section(Mesh, check_mesh),
    "checkpoint": Section(Checkpoint),
    "evaluation": Section(Evaluation),
    "profile": Section(Profile, profiled_steps),
    "log": Section(Log),
}
