"""Compile the training step of a config for the devices it is meant for, and read what it needs."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from ttt_jax import config as config_lib
from ttt_jax.distributed import sharding
from ttt_jax.distributed.chips import Chip, of_device
from ttt_jax.models import counts, pattern
from ttt_jax.planning import estimate, hlo
from ttt_jax.training import compiled_step


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip, the peak of a step.

    Attributes:
      parameters, moments, batch: arrays that a step is given, without the padding of their layouts.
      padding: of these; also counters of a few bytes.
      temporaries: activations, gradients and all else that lives within a step.
      outputs: that take no argument's place.
      code: the program itself.
    """

    parameters: int
    moments: int
    batch: int
    padding: int
    temporaries: int
    outputs: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """What the compiler said of a program that it gave up on, in bytes."""

    needed: int
    available: int


def memory_of_compiled(run: compiled_step.Program, compiled: jax.stages.Compiled) -> Memory:
    """As the compiler laid it out."""
    parameters, moments, batch = _given(run)
    analysis = compiled.memory_analysis()
    assert analysis is not None  # CPUs and TPUs have one
    return Memory(
        parameters=parameters,
        moments=moments,
        batch=batch,
        padding=analysis.argument_size_in_bytes - parameters - moments - batch,
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def memory_of_too_large(run: compiled_step.Program, too_large: TooLarge) -> Memory:
    """Of a step for which there is no room: what it is given is known, the rest is not told apart."""
    parameters, moments, batch = _given(run)
    rest = max(0, too_large.needed - parameters - moments - batch)
    return Memory(parameters, moments, batch, padding=0, temporaries=rest, outputs=0, code=0)


def _given(run: compiled_step.Program) -> tuple[int, int, int]:
    """Parameters, moments and batch."""
    data = run.config.data
    rows = run.batch_sharding.shard_shape((data.batch_size, data.sequence_length))
    batch = 3 * 4 * math.prod(rows)  # inputs, targets and mask
    return bytes_per_chip(run.abstract_state.params), bytes_per_chip(run.abstract_state.opt_state), batch


def bytes_per_chip(tree: Any) -> int:
    """Of the parts that one device holds of arrays with shardings, without padding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def read_too_large(message: str) -> TooLarge | None:
    """From the message of a compiler that ran out of memory for a chip; None from any other."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    for form in (rf"Used {size} of {size} hbm", rf"required for [\w ]+ \({size}\) exceeds available HBM \({size}\)"):
        if match := re.search(form, message):
            needed, available = (round(float(match[i]) * 1024 ** " KMGT".index(match[i + 1] or " ")) for i in (1, 3))
            return TooLarge(needed, available)
    return None


class CompilerError(RuntimeError):
    """The compiler failed, for another reason than memory; one line."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a kind in one step, of one chip."""

    count: int
    bytes: int  # of the whole arrays
    sent: float  # bytes, to other chips


@dataclasses.dataclass(frozen=True)
class Plan:
    """The report on one config and topology; per step unless said otherwise.

    Of a step that does not fit, there are no collectives and no time.
    """

    model: str
    parameters: int
    topology: str
    chips: int
    chip: Chip | None
    mesh: dict[str, int]
    sequences: int
    sequence_length: int
    accumulation: int
    steps: int  # of the whole run
    operations: float
    compile_seconds: float
    memory: Memory  # of a chip
    available: int | None  # bytes of a chip that a program may use; None where that is not known
    fits: bool | None
    collectives: dict[str, Traffic]
    step_time: estimate.StepTime | None

    @property
    def tokens(self) -> int:
        """Per step."""
        return self.sequences * self.sequence_length

    @property
    def utilization(self) -> float | None:
        """Model FLOPs of the estimated step over the peak of the chips (MFU)."""
        if self.step_time is None or self.chip is None:
            return None
        return self.operations / (self.step_time.total * self.chips * self.chip.peak_flops)

    @property
    def hours(self) -> float | None:
        """Estimated, of the whole run."""
        return None if self.step_time is None else self.step_time.total * self.steps / 3600

    def price(self, per_chip_hour: float) -> float | None:
        """Of the whole run."""
        return None if self.hours is None else self.hours * self.chips * per_chip_hour


def plan(config: ml_collections.ConfigDict, topology: str, devices: Sequence[Any]) -> Plan:
    """Compiles the training step of a validated config for devices, and reads what came out.

    Args:
      topology: how the devices are called.
      devices: of :func:`ttt_jax.planning.topology.devices`.

    Raises:
      ConfigError: where the config does not fit the devices; too little memory is no error.
      CompilerError: where the compiler fails at it.
    """
    shape = config_lib.mesh_shape(config, len(devices))
    run = compiled_step.make(config, sharding.make_mesh(shape, devices))
    chip, data = of_device(devices[0]), config.data
    start = time.perf_counter()
    compiled = _compile(run)
    seconds = time.perf_counter() - start
    available = None if chip is None else chip.hbm
    step_time = None
    if isinstance(compiled, TooLarge):
        used, available, found = memory_of_too_large(run, compiled), compiled.available, []
    else:
        used, found = memory_of_compiled(run, compiled), hlo.collectives(compiled.as_text() or "")
        if chip is not None:
            step_time = estimate.step_time(
                config,
                chip,
                len(devices),
                memory_per_chip=used.total,
                sent_per_chip=sum(c.times * c.sent for c in found if c.kind != hlo.BETWEEN_SLICES),
                sent_between_slices=sum(c.times * c.sent for c in found if c.kind == hlo.BETWEEN_SLICES),
                collectives=sum(c.times for c in found),
            )
    return Plan(
        model=pattern.describe(config.model),
        parameters=sum(x.size for x in jax.tree.leaves(run.abstract_state.params)),
        topology=topology,
        chips=len(devices),
        chip=chip,
        mesh=shape,
        sequences=data.batch_size,
        sequence_length=data.sequence_length,
        accumulation=config.training.accumulation,
        steps=config_lib.steps(config, "training.duration"),
        operations=counts.flops_per_step(config.model, data.sequence_length, data.batch_size),
        compile_seconds=seconds,
        memory=used,
        available=available,
        fits=None if available is None else not isinstance(compiled, TooLarge),
        collectives=by_kind(found),
        step_time=step_time,
    )


def by_kind(collectives: Sequence[hlo.Collective]) -> dict[str, Traffic]:
    """Sums over collectives of a kind, each as often as it is executed."""
    kinds = {}
    for kind in hlo.KINDS:
        some = [c for c in collectives if c.kind == kind]
        if some:
            kinds[kind] = Traffic(
                sum(c.times for c in some), sum(c.times * c.bytes for c in some), sum(c.times * c.sent for c in some)
            )
    return kinds


def _compile(run: compiled_step.Program) -> jax.stages.Compiled | TooLarge:
    """The compiled step, or how much memory it would have taken."""
    try:
        return run.compiled_step()
    except jax.errors.JaxRuntimeError as error:
        too_large = read_too_large(str(error))
        if too_large is None:
            reason = " ".join(str(error).partition("\n")[0].split())
            raise CompilerError(f"the compiler fails at this program: {reason}") from error
        return too_large
