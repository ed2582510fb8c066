"""Test the guard against loss spikes, against NumPy and inside a step."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ttt_jax.training import optimizer as optimizer_lib
from ttt_jax.training.optimizer import WINDOW
from ttt_jax.training.step import TrainState, initial_state, train_step

judge = jax.jit(optimizer_lib.judge_update, static_argnums=2)
bad = st.sampled_from([np.inf, -np.inf, np.nan])
norms = st.lists(st.one_of(st.floats(0.125, 30, width=32), bad), min_size=1, max_size=40)


def numpy_guard(sequence, factor):
    """Return for each gradient norm whether its update is allowed, as the docstring of the guard says."""
    remembered, allowed = [], []
    for norm in sequence:
        ok = np.isfinite(norm)
        if ok and len(remembered) >= WINDOW:
            ok = norm <= factor * np.float32(np.median(np.float32(remembered[-WINDOW:])))
        if np.isfinite(norm):
            remembered.append(norm)
        allowed.append(bool(ok))
    return allowed


@hypothesis.given(tail=norms, before=st.integers(WINDOW - 3, WINDOW + 30), factor=st.sampled_from([1.5, 4.0]))
@hypothesis.settings(max_examples=10)
def test_the_guard_judges_as_numpy(tail, before, factor):
    sequence = [*np.random.default_rng(before).uniform(0.5, 2, before).astype(np.float32), *tail]
    state, actual = optimizer_lib.initial_guard(), []
    for norm in sequence:
        allowed, state = judge(state, jnp.float32(norm), factor)
        actual.append(bool(allowed))
    expected = numpy_guard(sequence, factor)
    assert actual == expected
    assert int(state.skipped) == expected.count(False)
    assert int(state.in_a_row) == next((i for i, ok in enumerate(reversed(expected)) if ok), len(expected))


def test_a_level_that_lasts_is_accepted():
    state = optimizer_lib.initial_guard()
    for _ in range(WINDOW):
        _, state = judge(state, jnp.float32(1), 3.0)
    allowed = []
    for _ in range(WINDOW):
        ok, state = judge(state, jnp.float32(10), 3.0)
        allowed.append(bool(ok))
    assert allowed.index(True) == WINDOW // 2  # then the median lies between 1 and 10
    assert all(allowed[WINDOW // 2 :])


@pytest.mark.parametrize("norm", [np.nan, np.inf, 1e9])
def test_without_a_factor_every_update_is_made(norm):
    state = optimizer_lib.initial_guard()
    for _ in range(WINDOW):
        _, state = judge(state, jnp.float32(1), 0.0)
    allowed, state = judge(state, jnp.float32(norm), 0.0)
    assert bool(allowed)
    assert int(state.skipped) == 0
    assert not np.isnan(np.asarray(state.norms)).any()


class Quadratic:
    """A model of one number whose loss has the gradient that the batch says."""

    dtype = jnp.dtype("float32")

    def apply(self, variables, inputs, state, scale, read_out):
        w = variables["params"]["w"]
        return read_out(inputs[..., None], jnp.stack([w, jnp.zeros_like(w)])[None]), None


def test_a_step_that_is_left_out_changes_counts_only():
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 10))
    step = jax.jit(train_step(Quadratic(), optimizer, lambda s: 0.1, lambda s: 1.0, 1, 2.0))

    def batch(size):
        return {
            "inputs": jnp.full((1, 1), size, jnp.float32),
            "targets": jnp.zeros((1, 1), jnp.int32),
            "mask": jnp.ones((1, 1)),
        }

    state = initial_state({"w": jnp.float32(0.5)}, optimizer)
    state, metrics = step(state, batch(1.0))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (0, 0)
    before = jax.device_get(state)
    state, metrics = step(state, batch(np.nan))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1)
    after = jax.device_get(state)
    assert isinstance(after, TrainState)
    assert after.step == before.step + 1
    assert after.params == before.params
    moments = [(a.mu["w"], a.nu["w"]) for a in (before.opt_state[0], after.opt_state[0])]
    assert moments[0] == moments[1]
    assert after.opt_state[0].count == before.opt_state[0].count + 1  # the schedule continues
    state, metrics = step(state, batch(1.0))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)
    assert state.params["w"] != after.params["w"]
