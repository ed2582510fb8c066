"""Compare the estimated time of a step with calculations by hand."""

import dataclasses

import pytest

from ttt_jax import config as config_lib
from ttt_jax.distributed.chips import Chip
from ttt_jax.planning import estimate

CHIP = Chip("x", ("X",), 1e12, 2**34, 1e9, 1e8, None, 1e6)
D, MLP, V, T, B = 64, 96, 100, 32, 4


def config(mixer, **model):
    c = config_lib.default()
    c.model.update(mixer=mixer, vocab_size=V, width=D, num_heads=2, num_layers=3, mlp_width=MLP, **model)
    c.data.update(sequence_length=T, batch_size=B)
    return c


def step_time(c, *, memory=0.0, sent=0.0, **more):
    return estimate.step_time(c, CHIP, 2, memory_per_chip=memory, sent_per_chip=sent, **{"collectives": 0, **more})


DENSE = 3 * (8 * D * D + 4 * D * (T + 1) / 2 + 6 * D * MLP) + 2 * D * V  # attention, per token, forward


def test_work_of_a_transformer():
    assert step_time(config("attention")).compute == pytest.approx(3 * DENSE * T * B / (2 * 1e12 * 0.5))
    assert step_time(config("attention", remat="block")).compute == pytest.approx(4 * DENSE * T * B / 1e12)


def test_work_of_windows_and_shared_heads():
    """Check two blocks with a window of 8 and one without; two heads share one of keys."""
    c = config("sliding*2 + attention")
    c.model.attention.update(window=8, num_kv_heads=1)
    of_window = (8 * 9 / 2 + (T - 8) * 8) / T
    seen = 4 * D * (2 * of_window + (T + 1) / 2)
    dense = 3 * (6 * D * D + 6 * D * MLP) + seen + 2 * D * V
    assert step_time(c).compute == pytest.approx(3 * dense * T * B / (2 * 1e12 * 0.5))


def test_each_turn_of_the_inner_loop_takes_a_least_time():
    """Check the 12 turns of two mini-batches, three layers, forward and backward, on a chip that computes at once."""
    fast = dataclasses.replace(CHIP, peak_flops=1e30)

    def compute(**model):
        c = config("ttt_linear")
        c.model.update(remat=model.pop("remat", "none"))
        c.model.ttt.update(model)
        return estimate.step_time(c, fast, 2, memory_per_chip=0, sent_per_chip=0, collectives=0).compute

    assert compute() == pytest.approx(12 * 5e-6)
    assert compute(remat="block") == pytest.approx(18 * 5e-6)
    assert compute(mini_batch=8) == pytest.approx(24 * 5e-6)
    assert compute(unroll=2) == pytest.approx(6 * 5e-6)


def test_products_of_the_inner_loop_fill_a_part_of_a_matrix_unit():
    """Check that heads of 32 with b = 16 fill 1/4 x 1/4 x 1/8; forward, backward (twice), and again (remat_group)."""
    c = config("ttt_linear")
    c.data.batch_size = 2**20  # so much work that turns do not matter
    h, d, b = 2, 32, 16
    inner = 3 * h * (3 * 2 * d * d + 2 * 2 * b * d)  # k W, K^T G, q W; q K^T and its product with G
    dense = 3 * (8 * D * D + 2 * D * h + 6 * D * MLP) + 2 * D * V
    expected = (3 * dense + 4 * inner * 128) * T * 2**20 / 1e12
    assert step_time(c).compute == pytest.approx(expected)


def test_fill_of_a_learner_is_weighted_by_the_work_of_its_matrices():
    """Check widths 32, 128, 128, 32: 2/3 of the work fills a matrix unit, the rest fills a quarter of it."""
    c = config("ttt_mlp")
    c.model.ttt.mlp_depth = 3
    assert any("fill 6.2% of a matrix unit" in line for line in step_time(c).assumptions)  # 16/128 / (2/3 + 4/3)


def test_a_fused_inner_loop_fills_a_matrix_unit_with_groups():
    """Check a fill of 64 tokens instead of 16, without recomputation or turns.

    For heads of 64 that is 6.2 % of the peak of a v5e, as in the schedule of the compiler.
    """
    c = config("ttt_linear", dtype="bfloat16")
    c.model.update(width=128, num_heads=2)
    c.data.batch_size = 2**20
    tpu = dataclasses.replace(CHIP, device_kinds=("TPU v5 lite",))

    def compute(kernel):
        c.model.ttt.kernel = kernel
        return estimate.step_time(c, tpu, 1, memory_per_chip=0, sent_per_chip=0, collectives=0).compute

    inner = 3 * 2 * (3 * 2 * 64 * 64 + 2 * 2 * 16 * 64) * T * 2**20 / 1e12
    assert compute("scan") - compute("auto") == pytest.approx(inner * (4 * 64 - 3 * 16), rel=1e-3)


def test_memory_and_communication():
    c = config("attention")
    one = step_time(c, memory=1e9, sent=3e8, collectives=7)
    assert one.memory == pytest.approx(2.0)
    assert one.communication == pytest.approx(3.0 + 7 * 10e-6)
    assert one.total == one.memory + one.communication
    two = step_time(c, memory=1e9, sent=3e8, collectives=7, sent_between_slices=5e6)
    assert two.communication == pytest.approx(3.0 + 5.0 + 7 * 10e-6)
    assert len(two.assumptions) == len(one.assumptions) + 1


def test_the_longer_of_compute_and_memory_counts():
    assert dataclasses.replace(step_time(config("attention")), compute=5.0, memory=2.0, communication=1.0).total == 6.0
