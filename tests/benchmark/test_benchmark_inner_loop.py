"""Check the inner loops that are built to be compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.benchmark import inner_loop
from ttt_jax.errors import ConfigError

SMALL = {"heads": 2, "head_dim": 4, "tokens": 16, "batch": 2, "mini_batch": 4, "remat_group": 2}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_baseline_computes_the_same_as_the_scan(kind, assert_close, quick_jit):
    found = []
    for path in ("official", "scan"):
        run, shapes = inner_loop.build(kind=kind, path=path, dtype="f32", **SMALL)
        rng = np.random.default_rng(0)
        arguments = jax.tree.map(lambda s, rng=rng: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype), shapes)
        found.append(quick_jit(run)(*arguments))
    assert found[0].shape == (2, 16, 2 * 4)
    assert_close(*found)


def test_any_registered_learner_is_scanned():
    run, arguments = inner_loop.build(kind="swiglu", **SMALL)
    assert len(arguments[5]) == 3  # matrices of W0
    assert jax.eval_shape(run, *arguments).shape == (2, 16, 2 * 4)
    for path, message in (
        ("official", "official: has no swiglu; expected kind=linear or mlp"),
        ("pallas", "pallas: no kernel"),
    ):
        with pytest.raises(ConfigError, match=f"path={message}"):
            inner_loop.build(kind="swiglu", path=path, **SMALL)
    with pytest.raises(ConfigError, match="restarts=true: expected path=pallas, not path=scan"):
        inner_loop.build(kind="swiglu", restarts=True, **SMALL)


@pytest.mark.parametrize("path", ["official", "scan"])
def test_backward_gives_gradients_of_everything(path):
    run, (gradient, *arguments) = inner_loop.build(kind="mlp", path=path, backward=True, **SMALL)
    z, gradients = jax.eval_shape(run, gradient, *arguments)
    assert (z.shape, z.dtype) == (gradient.shape, gradient.dtype) == ((2, 16, 8), jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradients) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tuple(arguments)
    )
