"""Which mesh, rematerialisation and accumulation a run is fastest with, of those that fit."""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections

from ttt_jax.distributed.chips import of_device
from ttt_jax.errors import ConfigError
from ttt_jax.mixers import MIXERS
from ttt_jax.models import pattern
from ttt_jax.models.block import channel_parts
from ttt_jax.planning import estimate
from ttt_jax.planning.plan import CompilerError, Plan, plan

MOST_FAILURES = 24


class Choice(NamedTuple):
    """What a search varies; the global batch stays."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int

    def overrides(self) -> str:
        """As arguments of a command."""
        values = {f"mesh.{axis}": getattr(self, axis) for axis in ("data", "fsdp", "tensor")}
        values |= {"model.remat": self.remat, "training.accumulation": self.accumulation}
        return " ".join(f"--config.{key}={value}" for key, value in values.items())


class Guess(NamedTuple):
    """What is known of a choice before it is compiled: bytes of a chip, and seconds; good for an order only."""

    choice: Choice
    memory: float
    seconds: float


class Tried(NamedTuple):
    """A choice and what came of it; None where the compiler failed at it."""

    choice: Choice
    plan: Plan | None


def search(
    config: ml_collections.ConfigDict,
    topology: str,
    devices: Sequence[Any],
    most: int,
    progress: Callable[[Tried], None] = lambda tried: None,
) -> list[Tried]:
    """Compiles choices, the most promising first, until so many were found that fit, or :data:`MOST_FAILURES` that do
    not, for which the compiler takes seconds. Choices that no mesh splits cost nothing.

    What a choice turned out to need corrects the guesses of those with the same remat and fsdp; a choice is passed over
    that would then not fit.

    Returns:
      What was compiled; the fastest that fits is :func:`best` of it.
    """
    tried: list[Tried] = []
    corrections: dict[tuple[str, int], float] = {}
    for guess in guesses(config, devices):
        plans = [one.plan for one in tried if one.plan is not None]
        failed = len(tried) - sum(one.fits is not False for one in plans)
        if len(tried) - failed == most or failed == MOST_FAILURES:
            break
        alike = (guess.choice.remat, guess.choice.fsdp)
        limit = next((one.available for one in plans if one.available), math.inf)
        if guess.memory * corrections.get(alike, 0) > limit:
            continue
        result: Plan | None
        try:
            result = plan(with_choice(config, guess.choice), topology, devices)
        except ConfigError:  # a parameter does not divide
            continue
        except CompilerError:
            result = None
        tried.append(Tried(guess.choice, result))
        progress(tried[-1])
        if result is not None:
            corrections[alike] = max(corrections.get(alike, 0), result.memory.total / guess.memory)
    return tried


def best(tried: Sequence[Tried]) -> tuple[Choice, Plan] | None:
    """The fastest by estimate of those that fit; where there is no estimate, the one that takes the least memory."""

    def rank(one: tuple[Choice, Plan]):
        plan = one[1]
        return plan.memory.total if plan.step_time is None else plan.step_time.total

    fit = [(one.choice, one.plan) for one in tried if one.plan is not None and one.plan.fits is not False]
    return min(fit, key=rank, default=None)


def with_choice(config: ml_collections.ConfigDict, choice: Choice) -> ml_collections.ConfigDict:
    """The config with the choice for its own."""
    config = config.copy_and_resolve_references()
    config.mesh.update(data=choice.data, fsdp=choice.fsdp, tensor=choice.tensor)
    config.model.remat = choice.remat
    config.training.accumulation = choice.accumulation
    return config


def guesses(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> list[Guess]:
    """All choices whose rows can be split, those that seem to fit first, and of those the fastest first.

    Choices that differ only in how data and fsdp share the rows are about as fast; that not all of them come in a row,
    each counts as 5% slower than the one before.
    """
    chip = of_device(devices[0])
    room = math.inf if chip is None else chip.hbm
    found = [_guess(config, choice, chip) for choice in _choices(config, len(devices))]
    found.sort(key=lambda guess: (guess.seconds, guess.memory))
    alike: collections.Counter[tuple] = collections.Counter()
    keys = {}
    for guess in found:
        family = guess.choice[2:]
        keys[guess] = (guess.memory > room, guess.seconds * 1.05 ** alike[family], guess.memory)
        alike[family] += guess.memory <= room
    return sorted(found, key=keys.__getitem__)


def _choices(config: ml_collections.ConfigDict, devices: int) -> Iterator[Choice]:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp in divisors:
        for tensor in (n for n in divisors if devices // fsdp % n == 0 and config.model.num_heads % n == 0):
            rows = devices // tensor
            for accumulation in (2**i for i in range(8)):
                if config.data.batch_size % (rows * accumulation) == 0:
                    for remat in ("none", "block"):
                        yield Choice(rows // fsdp, fsdp, tensor, remat, accumulation)


def _guess(config: ml_collections.ConfigDict, choice: Choice, chip) -> Guess:
    """What a choice would take, from the sizes of the model alone.

    Memory: sharded parameters, gradients and moments, and the activations of a micro-batch. Collectives of each
    micro-batch: weights gathered over fsdp, once for the forward and once for the backward pass; float32 gradients
    scattered over fsdp and summed over data; activations summed over tensor.
    """
    m, data, length = config.model, config.data, config.data.sequence_length
    shards, d = choice.fsdp * choice.tensor, m.width
    kinds = pattern.kinds(m)
    parameters = m.vocab_size * d + sum(kind.blocks * _parameters(kind.model, length) for kind in kinds)
    tokens = data.batch_size / (choice.data * choice.fsdp * choice.accumulation) * length  # of a micro-batch, on a chip
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
    sums = 5 if choice.remat == "block" else 4  # of activations, per block: 2 forwards, 1 of them again, 2 backwards
    # Over all devices at once, the TPU compiler neither gathers nor scatters: it sums whole arrays.
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
    """Return the parameters of a block, but for vectors."""
    channel = len(channel_parts(model.channel)) * 3 * model.mlp_width
    return (channel + 4 * model.width) * model.width + MIXERS[model.mixer].memory(model, length).parameters


def _inside_block(model: ml_collections.ConfigDict, length: int, itemsize: int, tensor: int) -> float:
    """Return what the backward pass of a block reads, bytes a token: as many arrays as the TPU compiler keeps, by the
    plans in docs/benchmarks.md. Those that are split between heads or over the feed-forward width lie in parts."""
    mixer, channel = MIXERS[model.mixer].memory(model, length), len(channel_parts(model.channel)) * 3 * model.mlp_width
    arrays = mixer.arrays * model.width
    return itemsize * ((channel + arrays) / tensor + arrays) + mixer.bytes_per_head * model.num_heads / tensor


def _turns(collectives: int, devices: int) -> float:
    """So many collectives over so many devices, which cost more the longer the ring is: the TPU compiler makes loops of
    some, of which each turn counts. A twentieth for each device is what plans of 1.3 G parameters come to."""
    return collectives * (1 + (devices - 1) / 20) if devices > 1 else 0
