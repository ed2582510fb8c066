"""Which mesh, rematerialisation and accumulation a run is fastest with, of those that fit."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections

from ttt_jax.config import ConfigError
from ttt_jax.models import build
from ttt_jax.parallel.chips import of_device
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
    """All choices whose rows can be split, those that seem to fit first, and of those the fastest first."""
    chip = of_device(devices[0])
    found = [_guess(config, choice, chip) for choice in _choices(config, len(devices))]
    room = math.inf if chip is None else chip.hbm
    return sorted(found, key=lambda guess: (guess.memory > room, guess.seconds, guess.memory))


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
    """Sharded parameters, gradients and moments; activations of a micro-batch; weights gathered and gradients summed
    over fsdp and data, activations over tensor."""
    m, shards = config.model, choice.fsdp * choice.tensor
    block = (3 * m.mlp_width + 5 * m.width) * m.width
    parameters = m.num_layers * block + m.vocab_size * m.width
    rows = config.data.batch_size / (choice.data * choice.fsdp * choice.accumulation)
    tokens = rows * config.data.sequence_length  # of a micro-batch, on a chip
    width = 2 if m.dtype == "bfloat16" else 4  # bytes
    inside = 4 * (3 * m.mlp_width / choice.tensor + 20 * m.width)  # arrays of a block that its backward pass reads
    if m.mixer != "attention":
        states = sum(a * b for a, b in zip(build.learner(m).widths, build.learner(m).widths[1:], strict=False))
        inside += 4 * states * m.num_heads / choice.tensor / m.ttt.mini_batch  # W once per mini-batch
    kept = m.width * width
    activations = kept * m.num_layers + inside if choice.remat == "block" else (kept + inside) * m.num_layers
    logits = 3 * 4 * m.vocab_size / choice.tensor
    memory = 16 * parameters / shards + tokens * (activations + logits)
    if chip is None:
        return Guess(choice, memory, 0.0)
    passes = 3 if choice.remat == "block" else 2
    sent = 8 * parameters / choice.tensor * (choice.data * choice.fsdp > 1)
    if choice.fsdp > 1:
        sent += passes * width * parameters / choice.tensor * choice.accumulation
    if choice.tensor > 1:
        sent += 4 * passes * width * tokens * choice.accumulation * m.width * m.num_layers
    count = (
        m.num_layers * choice.accumulation * passes * ((8 if choice.fsdp > 1 else 0) + (4 if choice.tensor > 1 else 0))
    )
    chips = choice.data * shards
    config = with_choice(config, choice)
    time = estimate.step_time(config, chip, chips, memory_per_chip=memory, sent_per_chip=sent, collectives=count)
    return Guess(choice, memory, time.total)
