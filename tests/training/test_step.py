"""Test the schedules and the optimizer step against NumPy and against one another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ttt_jax.distributed import sharding
from ttt_jax.mixers import ttt_loop
from ttt_jax.mixers.ttt_layer import warmup_scale
from ttt_jax.training import optimizer as optimizer_lib
from ttt_jax.training.loss import mean_over_rows, token_nll
from ttt_jax.training.step import build_program, initial_state, train_step


class _Bigrams:
    """A model whose logits are a row of a table."""

    dtype = jnp.dtype("float32")

    def apply(self, variables, tokens, state, context, read_out):
        return read_out(jax.nn.one_hot(tokens, 5), variables["params"]), state


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("valid", [(1, 7, 0, 8), (0, 0, 0, 0), (0, 8, 8, 0)])
def test_masked_targets_have_no_part_in_the_gradient(accumulation, valid):
    """Compare one step with NumPy where micro-batches have few valid targets or none."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((5, 5)).astype(np.float32)
    inputs, targets = rng.integers(0, 5, (2, 4, 8))
    mask = (np.arange(8) >= 8 - np.array(valid)[:, None]).astype(np.float32)
    schedule = lambda step: 1.0  # noqa: E731
    step = jax.jit(train_step(_Bigrams(), optax.sgd(1.0), schedule, schedule, accumulation))
    state, metrics = step(
        initial_state(jnp.asarray(table), optax.sgd(1.0)), {"inputs": inputs, "targets": targets, "mask": mask}
    )

    p = np.exp(table.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    weights = mask / np.maximum(mask.sum(-1, keepdims=True), 1) / 4
    expected = np.zeros((5, 5))
    np.add.at(expected, inputs, weights[..., None] * (p[inputs] - np.eye(5)[targets]))
    np.testing.assert_allclose(metrics["loss"], -(weights * np.log(p[inputs, targets])).sum(), rtol=1e-6)
    np.testing.assert_allclose(table - np.asarray(state.params), expected, atol=1e-6)


def test_learning_rate_schedule_follows_its_formula():
    schedule = optimizer_lib.learning_rate(peak=3e-3, end=1e-5, warmup_steps=10, total_steps=100)

    def formula(k):
        if k < 10:
            return 3e-3 * k / 10
        return 1e-5 + (3e-3 - 1e-5) * 0.5 * (1 + np.cos(np.pi * (k - 10) / 90))

    for k in (0, 1, 9, 10, 11, 55, 99, 100):
        np.testing.assert_allclose(schedule(jnp.asarray(k)), formula(k), rtol=1e-5)


@pytest.mark.parametrize(("mixer", "expected"), [("ttt_mlp", [0.1, 0.55, 1.0, 1.0]), ("ttt_linear", [1.0] * 4)])
def test_inner_learning_rate_warms_up_for_ttt_mlp_only(mixer, expected, tiny_config):
    config = tiny_config({"model.mixer": mixer, "optimizer.warmup": "10 steps"})
    _, warmup = optimizer_lib.schedules(config)
    rates = ttt_loop.base_lr_start(config.model), ttt_loop.base_lr(config.model)
    scales = [warmup_scale(*rates, warmup(jnp.asarray(k))) for k in (0, 5, 10, 20)]
    np.testing.assert_allclose(scales, expected, rtol=1e-6)


def _one_step(run, accumulation, batch, params=None):
    schedule = lambda step: jnp.asarray(1e-3)  # noqa: E731
    optimizer = optimizer_lib.adamw(schedule)
    step = jax.jit(train_step(run.model, optimizer, schedule, lambda s: jnp.ones(()), accumulation))
    return step(initial_state(params or run.initial_state().params, optimizer), batch)


@pytest.fixture(scope="module")
def run_and_batch(tiny_config):
    run = build_program(tiny_config(), sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    tokens = np.random.default_rng(1).integers(0, 257, (4, 33)).astype(np.int32)
    mask = (tokens[:, 1:] % 5 > 0).astype(np.float32)
    return run, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


@pytest.mark.slow
def test_accumulation_equals_the_whole_batch_at_once(run_and_batch):
    run, batch = run_and_batch
    whole, whole_metrics = _one_step(run, 1, batch)
    parts, parts_metrics = _one_step(run, 2, batch)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-5)
    # The first moments are the gradient; the parameters after one Adam step are little more than its sign.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-7), parts.opt_state, whole.opt_state)


@pytest.mark.slow
def test_weight_decay_and_clipping_reach_every_parameter(run_and_batch):
    """Compare with the first step of AdamW, written out: the gradient is clipped to norm 1, all parameters decay."""
    run, batch = run_and_batch
    params = jax.tree.map(lambda p: 4 * p, run.initial_state().params)  # for a gradient above 1

    def loss_fn(params):
        logits, _ = run.model.apply({"params": params}, batch["inputs"])
        return mean_over_rows(token_nll(logits, batch["targets"]), batch["mask"])

    gradient = jax.device_get(jax.jit(jax.grad(loss_fn))(params))
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(gradient)))
    assert norm > 1, "clipping would change nothing"
    state, metrics = _one_step(run, 1, batch, params)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)

    def expected(p, g):
        g = g.astype(np.float64) / norm
        return p - 1e-3 * (g / (np.abs(g) + 1e-8) + 0.1 * p)

    for p, g, new in zip(*(jax.tree.leaves(x) for x in (params, gradient, state.params)), strict=True):
        certain = np.abs(g) > 1e-6  # smaller ones are rounding noise, and Adam scales them to steps of full size
        np.testing.assert_allclose(np.asarray(new)[certain], expected(np.asarray(p), g)[certain], atol=2e-6)


@pytest.mark.slow
def test_seed_sets_the_initial_parameters(tiny_config):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    first, again, other = (
        build_program(tiny_config({"seed": seed}), mesh).initial_state().params["embedding"] for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert np.std(first) == pytest.approx(0.02, rel=0.05)
