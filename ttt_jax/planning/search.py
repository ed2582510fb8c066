"""Search for the mesh, rematerialisation and accumulation with which a run fits and is fastest."""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections

from ttt_jax.distributed.chips import of_device
from ttt_jax.errors import ConfigError
from ttt_jax.mixers import MIXERS
from ttt_jax.models import pattern
from ttt_jax.models.stack import channel_parts
from ttt_jax.planning import estimate
from ttt_jax.planning.plan import CompilerError, Plan, plan

MOST_FAILURES = 24


class Choice(NamedTuple):
    """The settings that a search varies; the global batch stays the same."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int

    def overrides(self) -> str:
        """Return the choice as arguments of a command."""
        values = {f"mesh.{axis}": getattr(self, axis) for axis in ("data", "fsdp", "tensor")}
        values |= {"model.remat": self.remat, "training.accumulation": self.accumulation}
        return " ".join(f"--config.{key}={value}" for key, value in values.items())


class Guess(NamedTuple):
    """A guess at the bytes per chip and the seconds of a choice, before it is compiled; good for an order only."""

    choice: Choice
    memory: float
    seconds: float


class Tried(NamedTuple):
    """A choice and its plan; None where the compiler failed."""

    choice: Choice
    plan: Plan | None


def search(
    config: ml_collections.ConfigDict,
    topology: str,
    devices: Sequence[Any],
    most: int,
    progress: Callable[[Tried], None] = lambda tried: None,
) -> list[Tried]:
    """Compile choices, the most promising first.

    The search ends when ``most`` choices fit, or when :data:`MOST_FAILURES` do not, each of which the compiler refuses
    within seconds. Choices whose mesh does not divide the model are not compiled. The memory that a choice needs
    corrects the guesses for others with the same remat and fsdp; choices that would then not fit are skipped.

    Returns:
      The choices that were compiled. :func:`best` picks the fastest of them that fits.
    """
    tried: list[Tried] = []
    corrections: dict[tuple[str, int], float] = {}
    for guess in guesses(config, devices):
        plans = [one.plan for one in tried if one.plan is not None]
        failed = len(tried) - sum(one.fits is not False for one in plans)
        if len(tried) - failed == most or failed == MOST_FAILURES:
            break
        family = (guess.choice.remat, guess.choice.fsdp)
        limit = next((one.available for one in plans if one.available), math.inf)
        if guess.memory * corrections.get(family, 0) > limit:
            continue
        result: Plan | None
        try:
            result = plan(with_choice(config, guess.choice), topology, devices)
        except ConfigError:  # the mesh does not divide a parameter
            continue
        except CompilerError:
            result = None
        tried.append(Tried(guess.choice, result))
        progress(tried[-1])
        if result is not None:
            corrections[family] = max(corrections.get(family, 0), result.memory.total / guess.memory)
    return tried


def best(tried: Sequence[Tried]) -> tuple[Choice, Plan] | None:
    """Return the choice that fits and is fastest by estimate; without estimates, the one with the least memory."""

    def rank(one: tuple[Choice, Plan]):
        plan = one[1]
        return plan.memory.total if plan.step_time is None else plan.step_time.total

    fit = [(one.choice, one.plan) for one in tried if one.plan is not None and one.plan.fits is not False]
    return min(fit, key=rank, default=None)


def with_choice(config: ml_collections.ConfigDict, choice: Choice) -> ml_collections.ConfigDict:
    """Return a copy of a config with the settings of a choice."""
    config = config.copy_and_resolve_references()
    config.mesh.update(data=choice.data, fsdp=choice.fsdp, tensor=choice.tensor)
    config.model.remat = choice.remat
    config.training.accumulation = choice.accumulation
    return config


def guesses(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> list[Guess]:
    """Return guesses at all choices that divide the rows: those that seem to fit first, the fastest of them first.

    Choices that differ only in how data and fsdp share the rows are about equally fast. So that they do not all come in
    a row, each counts as 5% slower than the one before it.
    """
    chip = of_device(devices[0])
    room = math.inf if chip is None else chip.hbm
    every = [_guess(config, choice, chip) for choice in _choices(config, len(devices))]
    every.sort(key=lambda guess: (guess.seconds, guess.memory))
    alike: collections.Counter[tuple] = collections.Counter()
    keys = {}
    for guess in every:
        family = guess.choice[2:]
        keys[guess] = (guess.memory > room, guess.seconds * 1.05 ** alike[family], guess.memory)
        alike[family] += guess.memory <= room
    return sorted(every, key=keys.__getitem__)


def _choices(config: ml_collections.ConfigDict, devices: int) -> Iterator[Choice]:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    kinds = pattern.kinds(config.model)
    heads = {config.model.num_heads, *(MIXERS[kind.model.mixer].heads(kind.model) for kind in kinds)}
    for fsdp in divisors:
        for tensor in (n for n in divisors if devices // fsdp % n == 0 and all(each % n == 0 for each in heads)):
            rows = devices // tensor
            for accumulation in (2**i for i in range(8)):
                if config.data.batch_size % (rows * accumulation) == 0:
                    for remat in ("none", "block"):
                        yield Choice(rows // fsdp, fsdp, tensor, remat, accumulation)


def _guess(config: ml_collections.ConfigDict, choice: Choice, chip) -> Guess:
    """Guess memory and time of a choice from the sizes of the model alone.

    Memory is that of sharded parameters, gradients and moments, and of the activations of a micro-batch. Collectives of
    each micro-batch: weights gathered over fsdp, once for the forward and once for the backward pass; float32 gradients
    scattered over fsdp and summed over data; activations summed over tensor.
    """
    m, data, length = config.model, config.data, config.data.sequence_length
    shards, d = choice.fsdp * choice.tensor, m.width
    kinds = pattern.kinds(m)
    parameters = m.vocab_size * d + sum(kind.blocks * _parameters(kind.model, length) for kind in kinds)
    sequences = data.batch_size / (choice.data * choice.fsdp * choice.accumulation)  # of a micro-batch on one chip
    tokens = sequences * length
    itemsize = 2 if m.dtype == "bfloat16" else 4
    inside = [(kind.blocks, _inside_block(kind.model, length, itemsize, choice.tensor)) for kind in kinds]
    kept = d * itemsize
    activations = kept * m.num_layers
    if choice.remat == "block":
        activations += max(one for _, one in inside)
    else:
        activations += sum(blocks * one for blocks, one in inside)
    logits = 3 * 4 * m.vocab_size / choice.tensor
    memory = 16 * parameters / shards + tokens * (activations + logits)
    if chip is None:
        return Guess(choice, memory, 0.0)
    others = {axis: (size - 1) / size for axis, size in choice._asdict().items() if axis in ("data", "fsdp", "tensor")}
    sums = 5 if choice.remat == "block" else 4  # of activations per block: 2 forward, one of them again, 2 backward
    # Over all devices at once, the TPU compiler sums whole arrays in place of gathering and scattering.
    whole = 2 if choice.fsdp == choice.data * shards else 1
    sent = whole * (2 * itemsize + 4) * parameters / choice.tensor * others["fsdp"]
    sent += 2 * 4 * parameters / shards * others["data"]
    sent += 2 * sums * m.num_layers * tokens * kept * others["tensor"]
    count = m.num_layers * (_turns(3 * 7, choice.fsdp) + _turns(1, choice.data) + _turns(sums, choice.tensor))
    time = estimate.step_time(
        with_choice(config, choice),
        chip,
        choice.data * shards,
        memory_per_chip=memory,
        sent_per_chip=sent * choice.accumulation,
        collectives=count * choice.accumulation,
    )
    return Guess(choice, memory, time.total)


def _parameters(model: ml_collections.ConfigDict, length: int) -> float:
    """Return the number of parameters of a block, without vectors."""
    channel = len(channel_parts(model.channel)) * 3 * model.mlp_width
    return (channel + 4 * model.width) * model.width + MIXERS[model.mixer].memory(model, length).parameters


def _inside_block(model: ml_collections.ConfigDict, length: int, itemsize: int, tensor: int) -> float:
    """Return the bytes per token that a block keeps for its backward pass.

    The number of arrays is what the TPU compiler keeps in the plans of docs/benchmarks.md. Arrays with heads or the
    feed-forward width are split over tensor.
    """
    mixer, channel = MIXERS[model.mixer].memory(model, length), len(channel_parts(model.channel)) * 3 * model.mlp_width
    arrays = mixer.arrays * model.width
    return itemsize * ((channel + arrays) / tensor + arrays) + mixer.bytes_per_head * model.num_heads / tensor


def _turns(collectives: int, devices: int) -> float:
    """Return the number of collectives, increased by a twentieth for each further device of the ring.

    The TPU compiler turns some collectives into loops over the ring, in which each turn counts. The factor is fitted to
    plans of models with 1.3 G parameters.
    """
    return collectives * (1 + (devices - 1) / 20) if devices > 1 else 0
