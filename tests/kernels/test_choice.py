"""Test the choice between kernel and scan, and the reason that is given for it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from ttt_jax.kernels import run
from ttt_jax.ttt.inner_loop import InnerLoop, ttt_linear, ttt_mlp
from ttt_jax.ttt.learner import Learner
from ttt_jax.ttt.learners import MLP, Linear, ResidualNorm, SwiGLU, normalise
from ttt_jax.ttt.objective import dot_product
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Decay, Momentum, Muon, Renormalise

D = 64


def loop_of(f, **choices):
    """Return an inner loop with keys of 64 features."""
    return InnerLoop(Learner(f, D), **choices)


def in_residual_norm(f):
    return loop_of(ResidualNorm(f))


@pytest.mark.parametrize(
    ("kernel", "loop", "b", "device", "expected"),
    [
        ("auto", ttt_linear(64), 16, "TPU v5 lite", ("kernel", "fused kernel, for TPU v5 lite")),
        ("auto", ttt_linear(64), 16, "TPU v4", ("scan", "scan, for too little fast memory on TPU v4")),
        ("auto", ttt_linear(64), 16, "TPU v6 lite", ("kernel", "fused kernel, for TPU v6 lite")),
        ("auto", ttt_mlp(64), 16, "TPU v5 lite", ("kernel", "fused kernel, for TPU v5 lite")),
        ("auto", ttt_mlp(64, width_factor=8), 16, "TPU v5 lite", ("scan", "has more than 4 times the 64 features")),
        ("auto", ttt_linear(64), 16, "cpu", ("scan", "scan, for cpu (fused kernels are for TPUs)")),
        ("auto", ttt_linear(64), 16, "NVIDIA H200", ("scan", "scan, for NVIDIA H200 (fused kernels are for TPUs)")),
        ("auto", ttt_linear(192), 16, "TPU v5 lite", ("scan", "scan, for heads of 192 features")),
        ("auto", ttt_linear(64), 12, "TPU v5 lite", ("scan", "mini-batches of 12 tokens do not fill registers")),
        ("auto", ttt_linear(64), 1, "TPU v5 lite", ("scan", "mini-batches of 1 tokens do not fill registers")),
        ("auto", ttt_mlp(64, depth=3), 16, "TPU v5 lite", ("scan", "scan, for the learner has 3 dense layers")),
        ("auto", loop_of(Linear()), 16, "TPU v5 lite", ("scan", "has no LN and residual")),
        ("auto", in_residual_norm(Linear(bias=False)), 16, "TPU v5 lite", ("scan", "has no biases")),
        ("scan", ttt_linear(64), 16, "TPU v5 lite", ("scan", "scan, as configured")),
        ("pallas", ttt_linear(64), 16, "TPU v5 lite", ("kernel", "fused kernel, as configured")),
        ("pallas", ttt_linear(64), 16, "cpu", ("interpreted", "fused kernel, as configured, interpreted: slow on cpu")),
    ],
)
def test_choose_returns_kernel_or_scan_with_a_reason(kernel, loop, b, device, expected):
    found = run.choose(kernel, loop, b, device)
    way = "scan" if found.kernel is None else "kernel"
    if isinstance(found.kernel, partial) and found.kernel.keywords["interpret"]:
        way = "interpreted"
    assert (way, expected[1] in found.why) == (expected[0], True), found.why


def test_choose_refuses_pallas_where_no_kernel_exists():
    with pytest.raises(ValueError, match="no kernel: the learner has 3 dense layers"):
        run.choose("pallas", ttt_mlp(64, depth=3), 16, "TPU v5 lite")
    assert run.unsupported(ttt_linear(128), 64) is None


def affine(dense, x):
    """Compute the same as Linear, by another function."""
    return dense(x, x.shape[-1])


def relu(dense, x):
    """Compute a learner of the widths of MLP with another nonlinearity."""
    return dense(jax.nn.relu(dense(x, 4 * x.shape[-1])), x.shape[-1])


class Doubled(Linear):
    """A learner with the fields of Linear."""

    def __call__(self, dense, x):
        return 2 * super().__call__(dense, x)


class NormAlone(ResidualNorm):
    """A wrap with the parameters of the paper's wrap."""

    def __call__(self, dense, x):
        return super().__call__(dense, x) - x


def with_norm(dense, x):
    """Compute TTT-Linear without the residual, in one function of the same widths and parameters."""
    d = (x.shape[-1],)
    return normalise(dense(x, *d)) * dense.param("norm_scale", d) + dense.param(
        "norm_bias", d, jax.nn.initializers.zeros
    )


def huber(f_k, v):
    """Compute an objective that equals the squared error for small errors."""
    error = jnp.abs(f_k - v)
    return jnp.where(error < 1, 0.5 * error**2, error - 0.5).sum(-1)


class Later(Learner):
    """A learner of another class, equal in all fields."""


class Elsewhere(InnerLoop):
    """An inner loop of another class, equal in all fields."""


WRAPPED = ResidualNorm(Linear())
REFUSED = {
    "affine": (in_residual_norm(affine), "the learner is affine, which the kernels do not compute"),
    "relu": (in_residual_norm(relu), "the learner is relu, which the kernels do not compute"),
    "subclass": (in_residual_norm(Doubled()), "the learner is Doubled, which the kernels do not compute"),
    "swiglu": (in_residual_norm(SwiGLU()), "the learner is SwiGLU, which the kernels do not compute"),
    "biases": (in_residual_norm(Linear(bias=False)), "the learner has no biases"),
    "biases_of_mlp": (in_residual_norm(MLP(bias=False)), "the learner has no biases"),
    "no_output": (loop_of(MLP()), "the learner has no LN and residual"),
    "own_output": (loop_of(NormAlone(Linear())), "the learner has no LN and residual"),
    "own_function": (loop_of(with_norm), "the learner has no LN and residual"),
    "dot_product": (loop_of(WRAPPED, objective=dot_product), "the objective is dot_product"),
    "huber": (loop_of(WRAPPED, objective=huber), "the objective is huber"),
    "decay": (loop_of(WRAPPED, update=(Decay(0.9),)), "the update is decay"),
    "momentum": (loop_of(ResidualNorm(MLP()), update=(Momentum(),)), "the update is momentum"),
    "chain": (
        loop_of(WRAPPED, update=(Momentum(), Muon(), Renormalise()), reading="previous"),
        "the update is momentum + muon + renormalise",
    ),
    "previous": (loop_of(WRAPPED, reading="previous"), "the reading is previous"),
    "rates": (loop_of(ResidualNorm(MLP()), rate=Rate(per_matrix=True)), "each weight matrix has its own rate"),
    "class_of_learner": (InnerLoop(Later(WRAPPED, D)), "is not one that the kernels compute"),
    "class_of_loop": (Elsewhere(Learner(WRAPPED, D)), "is not one that the kernels compute"),
}


@pytest.mark.parametrize("device", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("name", REFUSED)
def test_inner_loops_without_a_kernel_use_the_scan(name, device):
    """Check inner loops that have the widths of one with a kernel."""
    loop, reason = REFUSED[name]
    kernel, why = run.choose("auto", loop, 16, device)
    assert kernel is None
    assert why.startswith("scan, for ")
    assert why.endswith(reason)
    with pytest.raises(ValueError, match=f"^no kernel: .*{reason.replace('+', '[+]')}$"):
        run.choose("pallas", loop, 16, device)


@pytest.mark.parametrize("f", [Linear(), MLP(), MLP(width_factor=2.5)])
def test_kernels_exist_for_any_rate_per_token_and_position(f):
    for token in ("sigmoid/d", "sigmoid", "softplus"):
        for position in ("1/t", "1"):
            assert run.unsupported(loop_of(ResidualNorm(f), rate=Rate(token, position)), 16) is None


def test_learner_with_an_unknown_field_uses_the_scan(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class WithScale(Linear):
        scale: float = 1.0

    monkeypatch.setattr(run, "Linear", WithScale)  # as if the field had been added to it
    assert run.unsupported(in_residual_norm(WithScale()), 16) is None
    assert "scale=2" in run.unsupported(in_residual_norm(WithScale(scale=2)), 16)


def test_inner_loop_with_an_unknown_field_uses_the_scan(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class WithOrder(InnerLoop):
        order: str = "forwards"

    monkeypatch.setattr(run, "InnerLoop", WithOrder)  # as if the field had been added to it
    assert run.unsupported(WithOrder(Learner(WRAPPED, D)), 16) is None
    assert "'backwards'" in run.unsupported(WithOrder(Learner(WRAPPED, D), order="backwards"), 16)


def test_scan_options_are_the_fastest_of_each_platform():
    assert run.scan_options(None, None, "TPU v5 lite") == {"remat_group": 4, "unroll": 4}
    assert run.scan_options(None, None, "cpu") == {"remat_group": 1, "unroll": 1}
    assert run.scan_options(0, 2, "TPU v5 lite") == {"remat_group": 0, "unroll": 2}
