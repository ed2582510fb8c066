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
from ttt_jax.planning import collectives, estimate
from ttt_jax.training.step import Program, build_program


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip at the peak of a step.

    Attributes:
      parameters, moments, batch: arguments of a step, without the padding of their layouts.
      padding: padding of the arguments, and counters of a few bytes.
      temporaries: activations, gradients and everything else that exists within a step only.
      outputs: outputs that do not reuse the memory of an argument.
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
        """Return the sum of all parts."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """The memory of a program that the compiler gave up on, in bytes."""

    needed: int
    available: int


def memory_of_compiled(run: Program, compiled: jax.stages.Compiled) -> Memory:
    """Return the memory of a compiled step, from the compiler's analysis."""
    parameters, moments, batch = _argument_bytes(run)
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


def memory_of_too_large(run: Program, too_large: TooLarge) -> Memory:
    """Return the memory of a step that does not fit; only its arguments are told apart, the rest is ``temporaries``."""
    parameters, moments, batch = _argument_bytes(run)
    rest = max(0, too_large.needed - parameters - moments - batch)
    return Memory(parameters, moments, batch, padding=0, temporaries=rest, outputs=0, code=0)


def _argument_bytes(run: Program) -> tuple[int, int, int]:
    """Return the bytes per chip of parameters, moments and batch."""
    data = run.config.data
    rows = run.batch_sharding.shard_shape((data.batch_size, data.sequence_length))
    batch = 3 * 4 * math.prod(rows)  # inputs, targets and mask
    return bytes_per_chip(run.abstract_state.params), bytes_per_chip(run.abstract_state.opt_state), batch


def bytes_per_chip(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of sharded arrays, without padding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def read_too_large(message: str) -> TooLarge | None:
    """Read the message of a compiler for which a program is too large; return None for any other message."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    for form in (rf"Used {size} of {size} hbm", rf"required for [\w ]+ \({size}\) exceeds available HBM \({size}\)"):
        if match := re.search(form, message):
            needed, available = (round(float(match[i]) * 1024 ** " KMGT".index(match[i + 1] or " ")) for i in (1, 3))
            return TooLarge(needed, available)
    return None


class CompilerError(RuntimeError):
    """The compiler failed for another reason than memory. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a config on a topology; numbers are per step where not said otherwise.

    A step that does not fit has no collectives and no time.
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
    steps: int  # in the whole run
    operations: float
    compile_seconds: float
    memory: Memory  # per chip
    available: int | None  # bytes of a chip that a program may use; None where unknown
    fits: bool | None
    collectives: dict[str, collectives.Traffic]
    step_time: estimate.StepTime | None

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return self.sequences * self.sequence_length

    @property
    def utilization(self) -> float | None:
        """Return the model FLOPs of the estimated step over the peak of the chips (MFU)."""
        if self.step_time is None or self.chip is None:
            return None
        return self.operations / (self.step_time.total * self.chips * self.chip.peak_flops)

    @property
    def hours(self) -> float | None:
        """Return the estimated hours of the whole run."""
        return None if self.step_time is None else self.step_time.total * self.steps / 3600

    def price(self, per_chip_hour: float) -> float | None:
        """Return the price of the whole run."""
        return None if self.hours is None else self.hours * self.chips * per_chip_hour


def plan(config: ml_collections.ConfigDict, topology: str, devices: Sequence[Any]) -> Plan:
    """Compile the training step of a validated config for devices, and read memory and collectives from it.

    Args:
      topology: name of the devices, for reports.
      devices: from :func:`ttt_jax.planning.topology.devices`.

    Raises:
      ConfigError: where the mesh of the config does not fit the devices. Too little memory is not an error.
      CompilerError: where the compiler fails.
    """
    shape = config_lib.mesh_shape(config, len(devices))
    run = build_program(config, sharding.make_mesh(shape, devices))
    chip, data = of_device(devices[0]), config.data
    start = time.perf_counter()
    compiled = _compile(run)
    seconds = time.perf_counter() - start
    available = None if chip is None else chip.hbm
    step_time = None
    if isinstance(compiled, TooLarge):
        used, available, found = memory_of_too_large(run, compiled), compiled.available, []
    else:
        used, found = memory_of_compiled(run, compiled), collectives.read(compiled.as_text() or "")
        if chip is not None:
            step_time = estimate.step_time(
                config,
                chip,
                len(devices),
                memory_per_chip=used.total,
                sent_per_chip=sum(c.times * c.sent for c in found if c.kind != collectives.BETWEEN_SLICES),
                sent_between_slices=sum(c.times * c.sent for c in found if c.kind == collectives.BETWEEN_SLICES),
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
        collectives=collectives.by_kind(found),
        step_time=step_time,
    )


def _compile(run: Program) -> jax.stages.Compiled | TooLarge:
    """Return the compiled step, or the memory that it would have needed."""
    try:
        return run.compiled_step()
    except jax.errors.JaxRuntimeError as error:
        too_large = read_too_large(str(error))
        if too_large is None:
            reason = " ".join(str(error).partition("\n")[0].split())
            raise CompilerError(f"the compiler fails at this program: {reason}") from error
        return too_large
