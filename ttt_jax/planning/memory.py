"""What a chip will hold while it trains, by kind, and what the compiler says when that is too much."""

import dataclasses
import math
import re
from typing import Any

import jax

from ttt_jax.training.compiled_step import Program


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


def of_compiled(run: Program, compiled: jax.stages.Compiled) -> Memory:
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


def of_too_large(run: Program, too_large: TooLarge) -> Memory:
    """Of a step for which there is no room: what it is given is known, the rest is not told apart."""
    parameters, moments, batch = _given(run)
    rest = max(0, too_large.needed - parameters - moments - batch)
    return Memory(parameters, moments, batch, padding=0, temporaries=rest, outputs=0, code=0)


def _given(run: Program) -> tuple[int, int, int]:
    """Parameters, moments and batch."""
    data = run.config.data
    rows = run.batch_sharding.shard_shape((data.batch_size, data.sequence_length))
    batch = 3 * 4 * math.prod(rows)  # inputs, targets and mask
    return bytes_per_chip(run.abstract_state.params), bytes_per_chip(run.abstract_state.opt_state), batch


def bytes_per_chip(tree: Any) -> int:
    """Of the parts that one device holds of arrays with shardings, without padding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def too_large(message: str) -> TooLarge | None:
    """From the message of a compiler that ran out of memory for a chip; None from any other."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    for pattern in (rf"Used {size} of {size} hbm", rf"required for [\w ]+ \({size}\) exceeds available HBM \({size}\)"):
        if match := re.search(pattern, message):
            needed, available = (round(float(match[i]) * 1024 ** " KMGT".index(match[i + 1] or " ")) for i in (1, 3))
            return TooLarge(needed, available)
    return None
