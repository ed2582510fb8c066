"""Test the fused kernels of TTT-Linear (depth 1) and TTT-MLP (depth 2), interpreted, against the scan."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from ttt_jax.kernels import run
from ttt_jax.ttt import scan
from ttt_jax.ttt.inner_loop import initial_state

# Heads that do not fill a pack, features that do not fill their lanes, tokens that do not fill a block. The size of the
# compiled program grows with the number of packs.
SHAPES = [
    {"tokens": 208, "heads": 1},
    {"batch": 2, "tokens": 272, "heads": 3},
    {"tokens": 40, "heads": 1, "head_dim": 96, "b": 8},
    {"tokens": 64, "heads": 2, "head_dim": 128, "b": 32},
    {"tokens": 64, "heads": 1, "head_dim": 20, "b": 64},
]
# tests/kernels/test_restarts.py reads the others.
CASES = [*((1, SHAPES[i]) for i in (0, 1, 3, 4)), *((2, SHAPES[i]) for i in (0, 2, 3, 4))]
two_blocks = pytest.mark.parametrize(
    ("depth", "shape"), [(1, {"batch": 2, "tokens": 304, "heads": 2}), (2, {"batch": 2, "tokens": 304, "heads": 1})]
)


@pytest.fixture(scope="module")
def kernel_solution(make_problem, by_kernel, with_gradients):
    """Return ``kernel_solution(depth, shape, dtype)``: gradients and results by the kernel, computed once each."""
    found = {}

    def solve(depth, shape, dtype=jnp.float32):
        key = depth, tuple(shape.items()), dtype
        if key not in found:
            found[key] = with_gradients(by_kernel, make_problem(depth, dtype=dtype, **shape))
        return found[key]

    return solve


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "shape"), CASES)
def test_outputs_end_and_gradients_equal_those_of_the_scan(
    make_problem, by_scan, kernel_solution, with_gradients, relative_error, depth, shape
):
    gradients, results = kernel_solution(depth, shape)
    expected_gradients, expected = with_gradients(by_scan, make_problem(depth, **shape))
    assert relative_error(results, expected) < 1e-6
    assert relative_error(gradients, expected_gradients) < 5e-6


@pytest.mark.slow
@two_blocks
def test_bfloat16_is_near_the_scan_in_float32(
    make_problem, by_scan, kernel_solution, with_gradients, relative_error, depth, shape
):
    gradients, (z, end) = kernel_solution(depth, shape, jnp.bfloat16)
    problem = make_problem(depth, dtype=jnp.bfloat16, **shape)
    expected_gradients, expected = with_gradients(by_scan, problem.in_float32())
    assert z.dtype == gradients[1].q.dtype == jnp.bfloat16
    assert end[0].weight.dtype == jnp.float32
    assert relative_error((z, end), expected) < 1e-2
    assert relative_error(gradients, expected_gradients) < 2e-2


@pytest.mark.slow
@two_blocks
def test_remat_group_changes_nothing(
    make_problem, by_kernel, kernel_solution, with_gradients, relative_error, depth, shape
):
    """Check that the weights at the start of a block are stored without rounding: others are computed from them."""
    problem = make_problem(depth, dtype=jnp.bfloat16, **shape)
    apart = with_gradients(partial(by_kernel, remat_group=16), problem)
    assert relative_error(apart, kernel_solution(depth, shape, jnp.bfloat16)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("first", "padding"), [(37, 0), (61, 7)])
def test_pieces_with_a_state_between_them_equal_the_whole(make_problem, quick_jit, assert_close, first, padding):
    """Read pieces of which the second begins and ends inside a mini-batch, and pieces with padding at their end."""
    problem = make_problem(tokens=131, heads=2)
    loop, parameters, tokens = problem
    kernel = partial(run.run, interpret=True)

    def read(start, stop, state):
        def piece(x):
            return jnp.pad(x[:, start:stop], [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)], constant_values=jnp.nan)

        valid = jnp.arange(stop - start + padding)[None] < stop - start if padding else None
        result = scan.run(loop, parameters, jax.tree.map(piece, tokens), state, valid=valid, kernel=kernel)
        return result._replace(z=result.z[:, : stop - start])

    def pieces():
        one = read(0, first, initial_state(parameters.w0, 1))
        two = read(first, 131, one.state)
        return jnp.concatenate([one.z, two.z], axis=1), two.state

    whole = quick_jit(lambda: scan.run(*problem))()
    assert_close(quick_jit(pieces)(), (whole.z, whole.state))


def test_statistics_are_computed_by_the_scan(make_problem, quick_jit):
    """Pass a kernel that would raise if it were called."""
    problem = make_problem(tokens=32, head_dim=8)
    result = quick_jit(lambda: scan.run(*problem, statistics=True, kernel=None))()
    same = quick_jit(lambda: scan.run(*problem, statistics=True, kernel=lambda *_: 1 / 0))()
    assert (result.statistics.loss_after == same.statistics.loss_after).all()
