"""Provide random problems for the inner loop, and its dual and primal form, each compiled once per shape."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from ttt_jax.ttt import primal, scan
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens, ttt_mlp
from ttt_jax.ttt.learner import Affine


class Case(NamedTuple):
    """The arguments of scan.run. B = H = 2."""

    loop: InnerLoop
    parameters: Parameters
    tokens: Tokens


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Return ``make_case(loop, tokens, b, seed)``, which draws a case with inner steps that move the outputs by O(1).

    NumPy draws it, so that nothing is compiled. An integer in place of a loop is the depth of a TTT-MLP; 1 is
    TTT-Linear.
    """

    def make(loop: InnerLoop | int, tokens: int, b: int, seed: int = 0, rate: float = 0.5, dtype=np.float32) -> Case:
        rng = np.random.default_rng(seed)
        if isinstance(loop, int):
            loop = ttt_mlp(6, depth=loop, width_factor=1.5)

        def normal(*shape):
            return rng.standard_normal(shape).astype(dtype)

        matrices, constants, features_out = loop.learner.structure
        width = loop.learner.features
        w0 = tuple(
            Affine(
                0.5 * normal(2, m.features_in, m.features_out), 0.5 * normal(2, 1, m.features_out) if m.bias else None
            )
            for m in matrices
        )
        inside = {c.name: float("scale" in c.name) + 0.3 * normal(2, *c.shape) for c in constants}
        per_matrix = (len(matrices),) if loop.rate.per_matrix else ()
        gates = {"momentum": rng.random((2, tokens, 2)), "log_decay": -rng.random((2, tokens, 2))}
        return Case(
            loop,
            Parameters(w0, inside, np.maximum(0, 1 / np.arange(1, b + 1) + 0.3 * rng.standard_normal(b)).astype(dtype)),
            Tokens(
                normal(2, tokens, 2, width),
                normal(2, tokens, 2, width),
                normal(2, tokens, 2, features_out),
                (rate * rng.random((2, tokens, 2, *per_matrix))).astype(dtype),
                {
                    gate: (gates[gate] if gate in gates else rng.random((2, tokens, 2))).astype(dtype)
                    for gate in (member.gate for member in loop.update)
                    if gate
                },
            ),
        )

    return make


@pytest.fixture(scope="session")
def run_scan(quick_jit) -> Callable[..., scan.Result]:
    return quick_jit(scan.run, static_argnames=("loop", "remat_group", "unroll", "statistics", "aligned"))


@pytest.fixture(scope="session")
def run_primal(quick_jit) -> Callable:
    return quick_jit(primal.run, static_argnames=("loop",))
