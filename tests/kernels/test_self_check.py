"""Test the check of a kernel: a right kernel passes, and the errors of wrong kernels are found and named."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from kernel_by_scan import outputs_shifted, right

from ttt_jax.kernels import linear, run, self_check
from ttt_jax.kernels.self_check import Family
from ttt_jax.ttt.inner_loop import ttt_linear, ttt_mlp

TINY = Family(ttt_linear(8), mini_batch=32, heads=1, dtype="float32")  # 352 tokens, of which 256 in a first block


@pytest.fixture(autouse=True)
def _nothing_known():
    self_check.of_family.cache_clear()


@pytest.fixture
def device():
    return jax.devices()[0]


# ---- Kernels made wrong on purpose


def second_block_shifted(*arguments, **_):
    z, end = right(*arguments)
    return z.at[1, 256, 0].add(0.01), end


def one_output_not_finite(*arguments, **_):
    z, end = right(*arguments)
    return z.at[0, 300, 0, 5].add(jnp.nan), end


def last_step_left_out(loop, parameters, start, tokens, **_):
    """Leave out the last step, on which no output depends."""
    z, end = right(loop, parameters, start, tokens)
    shorter = tokens._replace(eta=tokens.eta.at[:, -len(parameters.position_eta) :].set(0))
    _, short = right(loop, parameters, start, shorter)
    return z, jax.tree.map(lambda x, y: x + jax.lax.stop_gradient(y - x), end, short)


@jax.custom_vjp
def scaled_backwards(x):
    """Return ``x``, with a gradient that is too large."""
    return x


scaled_backwards.defvjp(lambda x: (x, None), lambda _, g: (1.001 * g,))


def gradient_of_k_scaled(loop, parameters, start, tokens, **_):
    return right(loop, parameters, start, tokens._replace(k=scaled_backwards(tokens.k)))


def gradient_of_v_scaled_in_second_block(loop, parameters, start, tokens, **_):
    v = jnp.concatenate([tokens.v[:, :256], scaled_backwards(tokens.v[:, 256:])], 1)
    return right(loop, parameters, start, tokens._replace(v=v))


def second_sequence_left_out_backwards(loop, parameters, start, tokens, **_):
    """Leave the second sequence out of the gradient of the weights that the sequences share."""
    start = jax.tree.map(lambda x: x.at[1].set(jax.lax.stop_gradient(x[1])), start)
    return right(loop, parameters, start, tokens)


def inference_shifted(loop, *arrays, **_):
    """Shift outputs only in the program that runs where no backward pass follows."""
    without_gradient = jax.custom_vjp(lambda arrays: outputs_shifted(loop, *arrays))
    without_gradient.defvjp(
        lambda arrays: jax.vjp(lambda arrays: right(loop, *arrays), arrays), lambda pullback, g: pullback(g)
    )
    return without_gradient(arrays)


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        slow(right, set()),
        (outputs_shifted, {"outputs", "outputs of inference"}),
        slow(gradient_of_k_scaled, {"gradient of k"}),
        slow(second_block_shifted, {"outputs", "outputs of inference"}),
        slow(one_output_not_finite, {"outputs", "outputs of inference"}),
        slow(last_step_left_out, {f"sum of steps 0 {x}{y}" for x in ("weight", "bias") for y in ("", " of inference")}),
        slow(gradient_of_v_scaled_in_second_block, {"gradient of v"}),
        slow(second_sequence_left_out_backwards, {"gradient of w0 0 weight", "gradient of w0 0 bias"}),
        slow(inference_shifted, {"outputs of inference"}),
    ],
)
def test_check_names_the_arrays_that_are_wrong(monkeypatch, device, kernel, wrong):
    monkeypatch.setattr(run, "run", kernel)
    report = self_check.of_family(TINY, device)
    assert set(report.wrong) == wrong, report
    if wrong:
        assert report.wrong[0] in str(report)


def test_check_runs_once_for_a_family_and_a_device(monkeypatch, device):
    traced = []

    def kernel(*arguments, **_):
        traced.append(arguments)
        return right(*arguments)

    monkeypatch.setattr(run, "run", kernel)
    first = self_check.of_family(TINY, device)
    traces = len(traced)
    assert self_check.of_family(TINY._replace(), device) is first
    assert len(traced) == traces > 0
    assert self_check.of_family(TINY._replace(dtype="bfloat16"), device).tolerance == 2e-2
    assert len(traced) == 2 * traces


# ---- The kernels themselves, interpreted

WIDER = {"loop": ttt_linear(16), "dtype": "bfloat16"}  # with 8 features, some variances of LN are almost zero
CASES = [
    TINY,
    pytest.param(TINY._replace(**WIDER, remat_group=4), marks=pytest.mark.slow),
    pytest.param(TINY._replace(**{**WIDER, "loop": ttt_mlp(16)}), marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_kernels_pass_by_a_margin(device, family):
    """Check for half of the tolerance in bfloat16 and a tenth in float32, so that no right kernel is reported."""
    report = self_check.of_family(family, device)
    margin = 2 if family.dtype == "bfloat16" else 10
    assert max(report.errors.values()) < report.tolerance / margin, report


@pytest.mark.slow
def test_check_finds_a_fused_kernel_with_a_wrong_step(monkeypatch, device):
    """Let the bias take a step that is too short after each group of mini-batches."""
    group = linear.group

    def wrong(numerics, state, *others):
        new, z, chain = group(numerics, state, *others)
        return new._replace(bias=0.99 * new.bias + 0.01 * state.bias), z, chain

    monkeypatch.setattr(linear, "group", wrong)
    report = self_check.of_family(TINY, device)
    assert "sum of steps 0 bias" in report.wrong
    assert "outputs" in report.wrong


# ---- The small problem


@pytest.mark.parametrize("loop", [ttt_linear(64), ttt_linear(96), ttt_mlp(64), ttt_mlp(128)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [1, 2, 5, 12, 25, 32, 64])
def test_small_problem_has_the_blocks_of_the_real_one(loop, dtype, heads):
    family = Family(loop, 16, heads, dtype)
    size = self_check.small_size(family)
    real, unroll = run.blocks(loop, 16, heads, dtype)
    small, _ = run.blocks(loop, 16, size.heads, dtype, most_packs=size.most_packs)
    assert size.unroll == unroll
    assert size.heads <= heads
    assert small.block_packs == min(real.block_packs, size.most_packs)
    assert small.packs // small.block_packs == min(real.packs // real.block_packs, 2)
    assert size.heads % small.pack == heads % real.pack  # a pack that is not full
    assert size.tokens % small.block_tokens  # nor is a block of tokens
    assert size.tokens > small.block_tokens


def test_all_heads_of_the_smallest_model_of_the_paper_are_checked():
    assert self_check.small_size(Family(ttt_linear(64), 16, 12, "bfloat16")).heads == 12


def test_report_lists_the_worst_difference_first():
    report = self_check.Report({"a": 1e-3, "b": math.nan, "c": 0.5, "d": math.inf}, 2e-2, 1.0)
    assert report.wrong == ["b", "d", "c"]
    assert str(report) == "nan of the largest entry of the b and of 2 other arrays (2e-02 is allowed)"
    assert self_check.Report({"outputs": 1e-3, "gradient of k": 2e-3}, 2e-2, 1.0).wrong == []
    assert (
        str(report._replace(errors={"outputs": 0.25}))
        == "2.5e-01 of the largest entry of the outputs (2e-02 is allowed)"
    )


def test_both_sides_compute_products_in_float32_for_float32():
    """Check the precision of matrix products: by default, TPUs round operands by more than the tolerance."""
    arguments, _ = self_check.problem_of(TINY, "cpu")
    for dtype, exact in (("float32", {"scan", "kernel", "inference"}), ("bfloat16", {"scan"})):
        functions = self_check.programs(TINY.loop, partial(right), jnp.dtype(dtype))
        inputs = arguments, self_check.cotangents(TINY.loop, arguments)
        texts = {name: str(jax.make_jaxpr(function)(*inputs)) for name, function in functions.items()}
        assert {name for name, text in texts.items() if "HIGHEST" in text} == exact
