"""Compare attention by cuDNN with float64, through the same function computed by XLA, as no GPU need be there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import numpy_attention, numpy_gradients, seen

from ttt_jax.kernels import cudnn

BFLOAT16 = jnp.dtype(jnp.bfloat16)


SLOW = [pytest.param(*each, marks=pytest.mark.slow) for each in ((4, None), (1, 1), (2, 20))]


@pytest.mark.parametrize(("groups", "window"), [(2, 2), *SLOW])
def test_masks_and_grouped_queries_match_float64(quick_jit, assert_close, groups, window):
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((2, 11, n, 8)).astype(np.float32) for n in (4, groups, groups, 4))
    attend = functools.partial(cudnn.causal_attention, window=window, implementation="xla")

    def both(q, k, v):
        y, pull = jax.vjp(attend, q, k, v)
        return y, pull(g)

    y, found = quick_jit(both)(q, k, v)
    visible = seen(11, window)
    assert_close(y, numpy_attention(q, k, v, visible), 1e-5)
    expected = numpy_gradients(q, k, v, visible, g)
    scale = max(abs(x).max() for x in expected)  # with a window of 1, weights are constant and two gradients are 0
    for actual, one in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, one, atol=1e-5 * scale)


def test_it_is_chosen_by_name_on_gpus_that_have_it():
    assert cudnn.choose("cudnn", 64, BFLOAT16, "NVIDIA H200")
    assert cudnn.choose("cudnn", 128, jnp.dtype(jnp.float16), "NVIDIA A100-SXM4-80GB")
    assert not cudnn.choose("xla", 64, BFLOAT16, "NVIDIA H200")
    assert not cudnn.choose("splash", 64, BFLOAT16, "NVIDIA H200")
    for device in ("cpu", "TPU v5 lite", "Tesla T4", "NVIDIA H200"):
        assert not cudnn.choose("auto", 64, BFLOAT16, device)
    with pytest.raises(ValueError, match=r"^it is used on NVIDIA A100, .*, and not on cpu$"):
        cudnn.choose("cudnn", 64, BFLOAT16, "cpu")


def test_what_it_is_not_used_for():
    assert "float32" in cudnn.unsupported(64, jnp.dtype(jnp.float32))
    assert "heads have 12 features" in cudnn.unsupported(12, BFLOAT16)
    assert "heads have 256 features" in cudnn.unsupported(256, BFLOAT16)
    with pytest.raises(ValueError, match=r"^heads have 256 features, and cuDNN takes multiples of 8 up to 128$"):
        cudnn.choose("cudnn", 256, BFLOAT16, "NVIDIA H200")
