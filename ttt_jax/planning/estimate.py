"""Estimate the time of a training step by a simple model, and list its assumptions.

step = max(compute, memory) + communication
"""

import dataclasses

import ml_collections

from ttt_jax.distributed.chips import Chip
from ttt_jax.kernels import run as kernels
from ttt_jax.kernels.layout import GROUP_TOKENS
from ttt_jax.models import counts, pattern
from ttt_jax.ttt.learner import Learner

EFFICIENCY = 0.5  # share of the peak that products reach where they fill a matrix unit
MATRIX_UNIT = 128  # rows and columns of a matrix unit of a TPU
TURN = 5e-6  # least seconds of one turn of the scan over mini-batches
COLLECTIVE = 10e-6  # seconds of a collective, in addition to sending


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The estimated seconds of a training step, and the assumptions behind them."""

    compute: float
    memory: float
    communication: float
    assumptions: tuple[str, ...]

    @property
    def total(self) -> float:
        """Return the seconds of the whole step."""
        return max(self.compute, self.memory) + self.communication


def step_time(
    config: ml_collections.ConfigDict,
    chip: Chip,
    chips: int,
    *,
    memory_per_chip: float,
    sent_per_chip: float,
    sent_between_slices: float = 0.0,
    collectives: float,
) -> StepTime:
    """Estimate the time of a step of a config.

    Args:
      memory_per_chip: bytes in the memory of a chip at the peak of a step.
      sent_per_chip: bytes that a chip sends to other chips of its slice.
      sent_between_slices: bytes that a chip sends to other slices.
      collectives: number of collectives that a chip takes part in.
    """
    model, data = config.model, config.data
    tokens = data.batch_size * data.sequence_length
    inner = counts.inner_flops_per_token(model, data.sequence_length)
    dense = counts.flops_per_token(model, data.sequence_length) - inner
    recomputed = 1 if model.remat == "block" else 0  # forward passes that are computed again
    rate = chips * chip.peak_flops * EFFICIENCY
    compute = (3 + recomputed) * dense * tokens / rate
    assumptions = [
        f"matrix products at {EFFICIENCY:.0%} of the peak of {chip.peak_flops / 1e12:.0f} TFLOP/s"
        + ("; the forward pass of every block twice (model.remat=block)" if recomputed else ""),
    ]
    for kind in pattern.learning_kinds(model):
        seconds, assumption = _inner_loop(kind, config, chip, rate)
        compute += seconds
        assumptions += [assumption] if assumption not in assumptions else []
    assumptions += [
        f"memory: everything in it is read and written once, at {chip.hbm_bandwidth / 1e9:,.0f} GB/s",
        f"communication: at {chip.ici_bandwidth / 1e9:,.0f} GB/s over all links, and {COLLECTIVE * 1e6:.0f} us per "
        "collective, while nothing is computed",
    ]
    communication = sent_per_chip / chip.ici_bandwidth + collectives * COLLECTIVE
    if sent_between_slices and chip.dcn_bandwidth:
        communication += sent_between_slices / chip.dcn_bandwidth
        assumptions.append(
            f"between slices: at {chip.dcn_bandwidth / 1e9:.3g} GB/s per chip, while nothing else is done"
        )
    assumptions.append("waiting for data, checkpoints and restarts not counted")
    return StepTime(
        compute,
        2 * memory_per_chip / chip.hbm_bandwidth,
        communication,
        tuple(assumptions),
    )


def _inner_loop(kind: pattern.Run, config: ml_collections.ConfigDict, chip: Chip, rate: float) -> tuple[float, str]:
    """Return the seconds of the inner loops of all blocks of a kind, and the assumption behind them.

    Args:
      rate: operations per second of all chips together, for products that fill their matrix units.
    """
    model, length, device = kind.model, config.data.sequence_length, chip.device_kinds[0]
    loop, tokens = pattern.inner_loop(model), config.data.batch_size * length
    fused = kernels.choose(model.ttt.kernel, loop, model.ttt.mini_batch, device).kernel is not None
    scan = kernels.scan_options(model.ttt.remat_group, model.ttt.unroll, device)
    b = min(model.ttt.mini_batch, length)
    fill = _part(max(b, GROUP_TOKENS) if fused else b) * _fill_of_widths(loop.learner)
    kept = kernels.keeps_blocks(b, model.ttt.remat_group) if fused else scan["remat_group"] > 0
    recomputed = 1 if model.remat == "block" else 0
    operations = kind.blocks * counts.inner_flops_of_block(model, length) * tokens
    by_work = (3 + recomputed + kept) * operations / (rate * fill)
    turns = length / b * kind.blocks * config.training.accumulation * (2 + recomputed)
    by_turns = turns / scan["unroll"] * TURN
    assumption = (
        f"inner loop, {'fused' if fused else 'scan'}: its products fill {fill:.1%} of a matrix unit "
        f"({MATRIX_UNIT} x {MATRIX_UNIT})" + ("" if fused else f"; {TURN * 1e6:.0f} us per turn at least")
    )
    return by_work if fused else max(by_work, by_turns), assumption


def _part(size: int) -> float:
    """Return the share of a side of a matrix unit that ``size`` rows or columns fill."""
    return min(1.0, size / MATRIX_UNIT)


def _fill_of_widths(learner: Learner) -> float:
    """Return the share of a matrix unit that the products of a learner fill, averaged over the time that they take."""
    matrices = learner.structure.matrices
    work = [m.features_in * m.features_out for m in matrices]
    time = [w / (_part(m.features_in) * _part(m.features_out)) for w, m in zip(work, matrices, strict=True)]
    return sum(work) / sum(time)
