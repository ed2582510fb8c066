"""Test that the check of splash attention finds kernels that are wrong, interpreted and in small blocks."""

import functools

import jax
import jax.numpy as jnp
import pytest

from ttt_jax.kernels import splash, splash_check
from ttt_jax.kernels.splash_check import Family

SMALL = Family(share=2, head_dim=64, windowed=True, tokens=128)
RIGHT = splash.causal_attention


@pytest.fixture
def report(monkeypatch):
    """Return a function that checks a kernel in place of splash attention."""
    splash_check.of_family.cache_clear()

    def of(kernel, family=SMALL):
        monkeypatch.setattr(splash, "causal_attention", kernel)
        return splash_check.of_family(family, jax.devices()[0], interpret=True)

    yield of
    splash_check.of_family.cache_clear()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def values_forgotten(q, k, v, window, interpret):
    return RIGHT(q, k, v, window, interpret=interpret)


def _forward(q, k, v, window, interpret):
    return jax.vjp(lambda *qkv: RIGHT(*qkv, window, interpret=interpret), q, k, v)


def _backward(window, interpret, pullback, g):
    q, k, v = pullback(g)
    return q, k, v.at[:, 128:].multiply(0.5)


values_forgotten.defvjp(_forward, _backward)


@pytest.mark.slow
@pytest.mark.parametrize("windowed", [False, True])
def test_the_kernel_passes_by_a_margin(report, windowed):
    found = report(RIGHT, SMALL._replace(windowed=windowed))
    assert sorted(found.errors) == ["gradient of k", "gradient of q", "gradient of v", "outputs"]
    assert max(found.errors.values()) < found.tolerance / 2, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        (lambda *qkv, window, interpret: values_forgotten(*qkv, window, interpret), ["gradient of v"]),
        (lambda *qkv, window, interpret: RIGHT(*qkv, window, interpret=interpret).at[1, 300, 3].set(jnp.nan), None),
        (lambda *qkv, window, interpret: RIGHT(*qkv, window - 1, interpret=interpret), None),
    ],
    ids=["gradient", "not finite", "window"],
)
def test_wrong_kernels_are_found(report, kernel, wrong):
    found = report(kernel)
    assert found.wrong == wrong if wrong else "outputs" in found.wrong


def test_the_small_problem_has_blocks_of_the_real_one():
    q, k, v, g = splash_check.problem(Family(4, 128, True), 3 * splash.blocks(splash.FROM_TOKENS)[0])
    assert q.shape == g.shape == (2, 3072, 8, 128)
    assert k.shape == v.shape == (2, 3072, 2, 128)
    assert splash.blocks(3072) == (1024, 3072)
    assert splash.blocks(32768)[0] == splash.blocks(splash.FROM_TOKENS)[0]
