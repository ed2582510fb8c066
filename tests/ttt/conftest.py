"""Random problems for the inner loop, and its two ways to solve them, each compiled once per shape."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from ttt_jax.ttt import primal, scan
from ttt_jax.ttt.learner import Dense, LayerNormParams, Learner, Weights


class Case(NamedTuple):
    """The arguments of scan.run. B = H = 2."""

    learner: Learner
    norm: LayerNormParams
    w0: Weights
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    token_eta: np.ndarray
    position_eta: np.ndarray


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """``make_case(depth, tokens, b, seed)``: drawn by NumPy, with inner steps that move the outputs by O(1)."""

    def make(depth: int, tokens: int, b: int, seed: int = 0, rate: float = 0.5, width: int = 6) -> Case:
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        learner = Learner((width, *(width + 3,) * (depth - 1), width))
        w0 = tuple(
            Dense(0.5 * normal(2, n_in, n_out), 0.5 * normal(2, 1, n_out)) for n_in, n_out in pairwise(learner.widths)
        )
        return Case(
            learner,
            LayerNormParams(1 + 0.3 * normal(2, 1, width), 0.3 * normal(2, 1, width)),
            w0,
            *(normal(2, tokens, 2, width) for _ in "qkv"),
            (rate * rng.random((2, tokens, 2))).astype(np.float32),
            np.maximum(0, 1 / np.arange(1, b + 1) + 0.3 * rng.standard_normal(b)).astype(np.float32),
        )

    return make


@pytest.fixture(scope="session")
def run_scan(quick_jit) -> Callable[..., scan.Result]:
    return quick_jit(scan.run, static_argnames=("learner", "remat_group", "unroll", "statistics"))


@pytest.fixture(scope="session")
def run_primal(quick_jit) -> Callable:
    return quick_jit(primal.run, static_argnames=("learner",))
