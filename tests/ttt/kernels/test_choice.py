"""Which way the inner loop is computed, and why."""

import dataclasses
from functools import partial

import pytest

from ttt_jax.ttt.kernels import choice, run
from ttt_jax.ttt.learner import Learner, linear, mlp


@pytest.mark.parametrize(
    ("kernel", "learner", "b", "device", "expected"),
    [
        ("auto", linear(64), 16, "TPU v5 lite", ("kernel", "fused kernel, for TPU v5 lite")),
        ("auto", linear(64), 16, "TPU v4", ("scan", "scan, for too little fast memory on TPU v4")),
        ("auto", linear(64), 16, "TPU v6 lite", ("kernel", "fused kernel, for TPU v6 lite")),
        ("auto", mlp(64), 16, "TPU v5 lite", ("kernel", "fused kernel, for TPU v5 lite")),
        ("auto", mlp(64, width_factor=8), 16, "TPU v5 lite", ("scan", "has more than 4 times the 64 features")),
        ("auto", linear(64), 16, "cpu", ("scan", "scan, for cpu (fused kernels are for TPUs)")),
        ("auto", linear(64), 16, "NVIDIA H200", ("scan", "scan, for NVIDIA H200 (fused kernels are for TPUs)")),
        ("auto", linear(192), 16, "TPU v5 lite", ("scan", "scan, for heads of 192 features")),
        ("auto", linear(64), 12, "TPU v5 lite", ("scan", "mini-batches of 12 tokens do not fill registers")),
        ("auto", linear(64), 1, "TPU v5 lite", ("scan", "mini-batches of 1 tokens do not fill registers")),
        ("auto", mlp(64, depth=3), 16, "TPU v5 lite", ("scan", "scan, for the learner has 3 dense layers")),
        ("auto", Learner((64, 64), norm_residual=False), 16, "TPU v5 lite", ("scan", "has no LN and residual")),
        ("auto", Learner((64, 64), bias=False), 16, "TPU v5 lite", ("scan", "has no biases")),
        ("scan", linear(64), 16, "TPU v5 lite", ("scan", "scan, as configured")),
        ("pallas", linear(64), 16, "TPU v5 lite", ("kernel", "fused kernel, as configured")),
        ("pallas", linear(64), 16, "cpu", ("interpreted", "fused kernel, as configured, interpreted: slow on cpu")),
    ],
)
def test_choice(kernel, learner, b, device, expected):
    found = choice.choose(kernel, learner, b, device)
    way = "scan" if found.kernel is None else "kernel"
    if isinstance(found.kernel, partial) and found.kernel.keywords["interpret"]:
        way = "interpreted"
    assert (way, expected[1] in found.why) == (expected[0], True), found.why


def test_a_kernel_that_there_is_not():
    with pytest.raises(ValueError, match="no kernel: the learner has 3 dense layers"):
        choice.choose("pallas", mlp(64, depth=3), 16, "TPU v5 lite")
    assert run.unsupported(linear(128), 64) is None


@dataclasses.dataclass(frozen=True)
class Relu(Learner):
    """A learner of the same widths with another nonlinearity."""


@pytest.mark.parametrize("device", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("widths", [(64, 64), (64, 256, 64)])
def test_a_learner_that_kernels_do_not_compute_uses_the_scan(widths, device):
    found = choice.choose("auto", Relu(widths), 16, device)
    assert found == (None, "scan, for the learner is a Relu, which the kernels do not compute")
    with pytest.raises(ValueError, match="no kernel: the learner is a Relu"):
        choice.choose("pallas", Relu(widths), 16, device)


def test_a_learner_with_a_field_that_kernels_do_not_know_uses_the_scan(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class WithActivation(Learner):
        activation: str = "gelu"

    monkeypatch.setattr(run, "Learner", WithActivation)  # as if the field had been added to it
    assert run.unsupported(WithActivation((64, 64)), 16) is None
    assert "'relu'" in run.unsupported(WithActivation((64, 64), activation="relu"), 16)


def test_the_scan_as_it_is_best_on_each_platform():
    assert choice.scan_options(None, None, "TPU v5 lite") == {"remat_group": 4, "unroll": 4}
    assert choice.scan_options(None, None, "cpu") == {"remat_group": 1, "unroll": 1}
    assert choice.scan_options(0, 2, "TPU v5 lite") == {"remat_group": 0, "unroll": 2}
