"""Check the interface of a mixer for every registered one: causality, pieces, states and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from mixer_cases import (
    CASES,
    COTANGENT,
    HEADS,
    MASKS,
    PIECE,
    ROWS,
    SECTIONS,
    TOKENS,
    WIDTH,
    X,
    every_mixer,
    every_mixer_but_slow_ones,
    mixer,
    position,
)

from ttt_jax.mixers import MIXERS
from ttt_jax.mixers.mixer import Context


def influence(quick_jit, f):
    """Return |d output[t] / d input[s]|, [T, T]."""
    x, direction = (a[0, :PIECE] for a in (X, COTANGENT))
    jacobian = quick_jit(jax.jacrev(lambda x: (f(x[None])[0] * direction).sum(-1)))(x)  # [T, T, D]
    return np.abs(jacobian).max(-1)


@every_mixer_but_slow_ones
def test_outputs_depend_on_earlier_tokens_and_their_own(params_of, quick_jit, case):
    found = influence(quick_jit, lambda x: mixer(case).apply({"params": params_of(case)}, x)[0])
    t = np.arange(PIECE)
    heard = t <= t[:, None]
    np.testing.assert_array_equal(found[~heard], 0)
    if CASES[case][0] == "sliding":
        window = t > t[:, None] - SECTIONS["attention"]["window"]
        np.testing.assert_array_equal(found[~window], 0)
        heard &= window
    assert found[heard].min() > 1e-6


@every_mixer_but_slow_ones
def test_pieces_cut_anywhere_match_the_whole_sequence(quick_jit, params_of, assert_close, case):
    """Cut in the middle of mini-batches and windows; two pieces are of one token."""
    step = quick_jit(lambda params, *arguments: mixer(case).apply({"params": params}, *arguments))
    whole, no_state = step(params_of(case), X)
    assert no_state is None
    state, found = mixer(case).initial_state(ROWS, WIDTH, TOKENS), []
    begin = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for piece in np.split(X, [5, 6, 7], axis=1):
        y, state = step(params_of(case), piece, state)
        found.append(y)
    assert_close(np.concatenate(found, 1), whole, 1e-5)
    np.testing.assert_array_equal(position(state), TOKENS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == begin


@every_mixer
def test_a_state_names_its_axes(case):
    """Check that names match the axes: rows are batch, and only an axis called time grows with the length."""

    def shapes(rows, length):
        return jax.eval_shape(lambda: mixer(case).initial_state(rows, WIDTH, length))

    state, axes = shapes(ROWS, TOKENS), mixer(case).state_axes()
    assert jax.tree.structure(state) == jax.tree.structure(axes)
    assert position(state).shape == (ROWS,)
    assert position(state).dtype == jnp.int32
    assert position(axes) == PartitionSpec("batch")

    def check(axes, this, more_rows, longer):
        assert len(axes) == this.ndim
        expected = {"batch": (ROWS, 2 * ROWS, ROWS), "time": (TOKENS, TOKENS, 2 * TOKENS)}
        for name, sizes in zip(axes, zip(this.shape, more_rows.shape, longer.shape, strict=True), strict=True):
            assert sizes == expected.get(name, (sizes[0],) * 3)
            assert name != "num_heads" or HEADS % sizes[0] == 0
        assert axes[0] == "batch"

    jax.tree.map(check, axes, state, shapes(2 * ROWS, TOKENS), shapes(ROWS, 2 * TOKENS))


@every_mixer_but_slow_ones
def test_only_mixers_that_learn_have_statistics(params_of, case):
    def run():
        return mixer(case).apply({"params": params_of(case)}, X, None, Context(*MASKS["any, 0"]), mutable="statistics")

    _, found = jax.eval_shape(run)
    assert MIXERS[CASES[case][0]].learns == bool(found)
    if found:
        losses = {name: x.shape for name, x in found["statistics"].items() if name.startswith("loss")}
        assert losses == dict.fromkeys(("loss_at_w0", "loss_before", "loss_after"), (ROWS, TOKENS, HEADS))
