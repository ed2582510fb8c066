"""Provide problems for the fused kernels, of the sizes that the kernels are made for."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels import run
from ttt_jax.ttt import scan
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens, initial_state, ttt_mlp
from ttt_jax.ttt.learner import Affine


class Problem(NamedTuple):
    """The arguments of scan.run."""

    loop: InnerLoop
    parameters: Parameters
    tokens: Tokens

    def in_float32(self) -> "Problem":
        """Return the problem with all tokens in float32."""
        return self._replace(tokens=jax.tree.map(lambda x: x.astype(jnp.float32), self.tokens))


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    """Return ``make_problem(depth, batch, tokens, heads, head_dim, b)``, which draws by NumPy and compiles nothing.

    With ``initial``, sizes are as at the start of training; else every array is large enough to matter.
    """

    def make(
        depth: int = 1, batch: int = 1, tokens: int = 64, heads: int = 1, head_dim: int = 64, b: int = 16, **options
    ) -> Problem:
        dtype, initial = options.get("dtype", jnp.float32), options.get("initial", False)
        rng = np.random.default_rng(options.get("seed", 0))

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        loop = ttt_mlp(head_dim, depth=depth)
        weight, bias, inputs = (0.02, 0.0, 0.55) if initial else (0.1, 0.1, 1.0)
        w0 = tuple(
            Affine(weight * normal(heads, n_in, n_out), bias * normal(heads, 1, n_out))
            for n_in, n_out, _ in loop.learner.structure.matrices
        )
        rate = (1.0 if depth == 1 else 0.1) / head_dim
        noise = 0.0 if initial else 0.01
        norm = {
            "norm_scale": 1 + 0.1 * normal(heads, 1, head_dim),
            "norm_bias": 0.1 * normal(heads, 1, head_dim),
        }
        drawn = Tokens(
            *((inputs * normal(batch, tokens, heads, head_dim)).astype(dtype) for _ in "qkv"),
            np.float32(rate) / (1 + np.exp(-normal(batch, tokens, heads))),
        )
        position_eta = (1 / np.arange(1, b + 1) + noise * normal(b)).astype(np.float32)
        return Problem(loop, *jax.tree.map(jnp.asarray, (Parameters(w0, norm, position_eta), drawn)))

    return make


@pytest.fixture(scope="session")
def by_scan() -> Callable:
    """Return a function from a problem to z and the weights at the end, computed by the scan."""

    def solve(loop, parameters, tokens):
        result = scan.run(loop, parameters, tokens)
        return result.z, result.state.weights

    return solve


@pytest.fixture(scope="session")
def by_kernel() -> Callable:
    """Return the same function for the interpreted fused kernels, with options of run.run."""

    def solve(loop, parameters, tokens, **options):
        start = initial_state(parameters.w0, len(tokens.q)).weights
        return run.run(loop, parameters, start, tokens, interpret=True, **options)

    return solve


@pytest.fixture(scope="session")
def with_gradients(quick_jit) -> Callable:
    """Return ``with_gradients(solve, problem)``: gradients of a random functional of the results, and the results."""

    def compute(solve, problem):
        def functional(arguments):
            results = solve(problem.loop, *arguments)
            rng = np.random.default_rng(1)
            products = jax.tree.map(lambda x: (x.astype(jnp.float32) * rng.standard_normal(x.shape)).sum(), results)
            return sum(jax.tree.leaves(products)), results

        return quick_jit(jax.grad(functional, has_aux=True))(problem[1:])

    return compute


@pytest.fixture(scope="session")
def relative_error() -> Callable[..., float]:
    """Return a function for the largest relative error among the arrays of a tree, in the Euclidean norm."""

    def error(actual, desired):
        def of(x, y):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            return np.linalg.norm(x - y) / (np.linalg.norm(y) or 1.0)

        return max(jax.tree.leaves(jax.tree.map(of, actual, desired)))

    return error
