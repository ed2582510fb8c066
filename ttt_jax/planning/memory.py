"""What a chip will hold while it trains, by kind, and what the compiler says when that is too much."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip, the peak of a step.

    Attributes:
      parameters, moments, batch: arrays that a step is given; the first two without the padding of their layouts,
        which is in ``other_arguments``, as are the counters.
      temporaries: activations, gradients and all else that lives within a step.
      outputs: that take no argument's place.
      code: the program itself.
    """

    parameters: int
    moments: int
    batch: int
    other_arguments: int
    temporaries: int
    outputs: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def of_program(run: Any, compiled: jax.stages.Compiled) -> Memory:
    """Of a :class:`ttt_jax.training.program.Program` and its compiled step."""
    analysis = compiled.memory_analysis()
    assert analysis is not None  # CPUs and TPUs have one
    parameters, moments = bytes_per_chip(run.abstract_state.params), bytes_per_chip(run.abstract_state.opt_state)
    data = run.config.data
    batch = 3 * 4 * int(np.prod(run.batch_sharding.shard_shape((data.batch_size, data.sequence_length))))
    return Memory(
        parameters=parameters,
        moments=moments,
        batch=batch,
        other_arguments=analysis.argument_size_in_bytes - parameters - moments - batch,
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def bytes_per_chip(tree: Any) -> int:
    """Of the parts that one device holds of arrays with shardings, without padding."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """What the compiler said of a program that it gave up on, in bytes."""

    needed: int
    available: int


def too_large(message: str) -> TooLarge | None:
    """From the message of a compiler that ran out of memory for a chip; None from any other."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    for pattern in (rf"Used {size} of {size} hbm", rf"required for [\w ]+ \({size}\) exceeds available HBM \({size}\)"):
        if match := re.search(pattern, message):
            needed, available = (round(float(match[i]) * 1024 ** " KMGT".index(match[i + 1] or " ")) for i in (1, 3))
            return TooLarge(needed, available)
    return None
