"""What a run will need: its training step compiled for the devices that it is meant for, and read."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from ttt_jax import config as config_lib
from ttt_jax.distributed import sharding
from ttt_jax.distributed.chips import Chip, of_device
from ttt_jax.models import build, flops
from ttt_jax.planning import estimate, hlo
from ttt_jax.planning import memory as memory_lib
from ttt_jax.planning.memory import Memory, TooLarge
from ttt_jax.training import compiled_step


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
        used, available, found = memory_lib.of_too_large(run, compiled), compiled.available, []
    else:
        used, found = memory_lib.of_compiled(run, compiled), hlo.collectives(compiled.as_text() or "")
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
        model=build.describe(config.model),
        parameters=sum(x.size for x in jax.tree.leaves(run.abstract_state.params)),
        topology=topology,
        chips=len(devices),
        chip=chip,
        mesh=shape,
        sequences=data.batch_size,
        sequence_length=data.sequence_length,
        accumulation=config.training.accumulation,
        steps=config_lib.steps(config, "training.duration"),
        operations=flops.per_step(config.model, data.sequence_length, data.batch_size),
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
        too_large = memory_lib.too_large(str(error))
        if too_large is None:
            reason = " ".join(str(error).partition("\n")[0].split())
            raise CompilerError(f"the compiler fails at this program: {reason}") from error
        return too_large
