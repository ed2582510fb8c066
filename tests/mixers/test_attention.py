"""Check the layer of attention: its positions, norms, heads, choice of the kernel, and the ring of its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import numpy_attention, seen

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.kernels import splash
from ttt_jax.layers import rope
from ttt_jax.layers.blocked_attention import Keys
from ttt_jax.layers.context import places
from ttt_jax.mixers import attention
from ttt_jax.mixers.attention import MIXERS, Attention, AttentionState, _written
from ttt_jax.mixers.mixer import Context


def test_layer_attends_with_absolute_positions(random_params, assert_close):
    module = Attention(num_heads=2, dtype=jnp.float32, rope_theta=100.0)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    params = random_params(module, x)
    q, k, v = ((x @ params[name]["kernel"]).reshape(2, 5, 2, 4) for name in ("wq", "wk", "wv"))
    y = numpy_attention(*(rope.rotate(a, jnp.arange(5), 100.0) for a in (q, k)), v, seen(5)).reshape(2, 5, 8)
    assert_close(module.apply({"params": params}, x)[0], y @ params["wo"]["kernel"])


def test_heads_of_keys_divide_the_heads_and_are_divided_by_the_mesh():
    config = config_lib.default()
    config.model.update(mixer="sliding*2 + attention", num_heads=6, width=24, num_layers=3)
    config.model.attention.num_kv_heads = 4
    with pytest.raises(ConfigError, match=r"^model.attention.num_kv_heads=4: does not divide model.num_heads=6; expe"):
        config_lib.validate(config)
    config.model.attention.num_kv_heads = 3
    config.mesh.tensor = 2
    with pytest.raises(ConfigError, match=r"^mesh.tensor=2: does not divide the 3 heads of keys of sliding; expected"):
        config_lib.mesh_shape(config, 2)
    config.mesh.tensor = 3
    assert config_lib.mesh_shape(config, 3)["tensor"] == 3


def test_a_kernel_that_the_device_lacks_is_refused():
    model = config_lib.default().model
    model.attention.kernel = "splash"
    with pytest.raises(ConfigError, match=r"^model.attention.kernel=splash: the dtype is float32, and the products"):
        MIXERS["attention"].check(model)
    model.dtype = "bfloat16"
    MIXERS["attention"].check(model)
    with pytest.raises(
        ConfigError, match=r"^model.attention.kernel=splash: there is none for cpu; expected auto or xla$"
    ):
        MIXERS["attention"].computed(model)
    module, x = MIXERS["attention"].module(model)(), jnp.zeros((1, 2, 768))
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    with pytest.raises(ConfigError, match=r"^model.attention.kernel=splash: there is none for cpu"):
        jax.eval_shape(module.apply, params, x)


def test_the_log_says_which_kernel_and_why(monkeypatch):
    model = config_lib.default().model
    model.dtype = "bfloat16"

    def said(device, **keys):
        monkeypatch.setattr(attention, "device_kind", lambda: device)
        model.attention.update(keys)
        return MIXERS["attention"].computed(model)

    assert said("cpu") == ""
    assert said("TPU v5 lite") == "attention by splash from 2048 tokens on, where it is faster, below by XLA"
    assert said("NVIDIA H200") == "attention by XLA; model.attention.kernel=cudnn may be faster on GPUs"
    assert said("TPU v5 lite", kernel="xla") == "attention by xla, as model.attention.kernel says"
    with pytest.raises(ConfigError, match=r"^model.attention.kernel=cudnn: it is used on .*, and not on TPU v5 lite"):
        said("TPU v5 lite", kernel="cudnn")
    model.dtype = "float32"
    assert said("NVIDIA H200", kernel="auto").startswith("attention by XLA: the dtype is float32")


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 4])
def test_documents_and_padding_by_splash_are_as_in_blocks(monkeypatch, random_params, quick_jit, assert_close, window):
    """Check outputs and gradients, and that padding gives and takes none whatever its output is multiplied by."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 2, 24, 8)).astype(np.float32)
    valid, reset = rng.random((2, 2, 24)) < np.array([0.7, 0.2])[:, None, None]
    valid[1, :5] = False  # a row that begins with padding
    module = Attention(num_heads=2, dtype=jnp.float32, window=window, num_kv_heads=1)
    params = {"params": random_params(module, x)}

    def found():
        def both(params, x):
            y, pull = jax.vjp(lambda *inputs: module.apply(*inputs, context=Context(valid, reset))[0], params, x)
            return y, *pull(g)

        return quick_jit(both)(params, x)

    expected = found()
    monkeypatch.setattr(splash, "choose", lambda *_: True)
    monkeypatch.setattr(splash, "causal_attention", functools.partial(splash.causal_attention, interpret=True))
    y, of_params, of_x = found()
    assert_close((y, of_params, of_x), expected, 1e-5)
    assert not y[~valid].any()
    assert not of_x[~valid].any()


def test_normalised_queries_and_keys_have_a_scale_for_each_feature_of_a_head(random_params, assert_close):
    module = Attention(num_heads=4, dtype=jnp.float32, num_kv_heads=2, qk_norm=True, rope_pairs="half_split")
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    params = random_params(module, x)
    assert params["q_norm"]["scale"].shape == params["k_norm"]["scale"].shape == (4,)
    q, k, v = ((x @ params[name]["kernel"]).reshape(2, 5, -1, 4) for name in ("wq", "wk", "wv"))
    normed = (
        a / np.sqrt((a.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * params[name]["scale"]
        for a, name in ((q, "q_norm"), (k, "k_norm"))
    )
    rotated = (rope.rotate(a.astype(np.float32), jnp.arange(5), 10000.0, "half_split") for a in normed)
    y = numpy_attention(*rotated, v, seen(5)).reshape(2, 5, 16)
    assert_close(module.apply({"params": params}, x)[0], y @ params["wo"]["kernel"])


@pytest.fixture(scope="module")
def window_of_four(random_params, quick_jit):
    """Return a layer with a window of 4, a function that applies it, sequences of 16, and their outputs."""
    module = Attention(num_heads=2, dtype=jnp.float32, window=4)
    x = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    params = {"params": random_params(module, x)}
    apply = quick_jit(module.apply)
    return module, functools.partial(apply, params), x, apply(params, x)[0]


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 9])
def test_decode_matches_prefill_around_the_window(window_of_four, assert_close, prompt):
    """Read a prompt, six tokens one by one, and the rest in one piece."""
    module, apply, x, whole = window_of_four
    state, found = module.initial_state(2, 8, 16), []
    assert state.keys.shape == (2, 4, 2, 4)
    for piece in np.split(x, [prompt, *range(prompt + 1, prompt + 7)], axis=1):
        y, state = apply(piece, state)
        found.append(y)
    assert_close(np.concatenate(found, 1), whole, 1e-5)


@pytest.mark.slow
def test_no_slot_of_a_ring_is_written_twice():
    """Check that the content of the ring does not depend on the order of writing.

    Tokens of earlier documents, tokens out of the window and padding are not written.
    """
    rng = np.random.default_rng(0)
    valid, reset = rng.random((2, 32, 9)) < np.array([0.8, 0.2])[:, None, None]
    placed = places(Context(valid, reset), 9, rng.integers(0, 6, 32).astype(np.int32))
    marks = 1.0 + np.broadcast_to(np.arange(9.0)[:, None, None], (32, 9, 1, 1))
    empty = np.zeros((32, 4, 1, 1))
    piece = Keys(marks, marks, placed.position, np.where(valid, placed.document, -1))
    state = AttentionState(empty, empty, placed.end)
    forwards = _written(state, piece, placed).keys
    np.testing.assert_array_equal(forwards, _written(state, Keys(*(x[:, ::-1] for x in piece)), placed).keys)
    for row in range(32):
        last = [t + 1.0 for t in range(9) if valid[row, t] and placed.document[row, t] == placed.document[row, -1]]
        assert sorted(forwards[row][forwards[row] > 0]) == last[-4:]


def test_a_ring_is_no_longer_than_the_sequence(window_of_four, assert_close):
    module, apply, x, whole = window_of_four
    state = module.initial_state(2, 8, 3)
    assert state.keys.shape == (2, 3, 2, 4)
    y, state = apply(x[:, :2], state)
    assert_close(np.concatenate([y, apply(x[:, 2:3], state)[0]], 1), whole[:, :3], 1e-5)


def test_each_document_may_be_as_long_as_the_cache(random_params, quick_jit, assert_close):
    """Check that earlier documents take no room in the state."""
    module = Attention(num_heads=2, dtype=jnp.float32)
    x = np.random.default_rng(0).standard_normal((1, 24, 8)).astype(np.float32)
    apply = functools.partial(quick_jit(module.apply), {"params": random_params(module, x)})
    state, found = module.initial_state(1, 8, 8), []
    reset = np.arange(24)[None] % 8 == 0
    for start in range(0, 24, 6):
        y, state = apply(x[:, start : start + 6], state, Context(reset=reset[:, start : start + 6]))
        found.append(y)
    expected = [apply(x[:, start : start + 8])[0] for start in (0, 8, 16)]
    assert_close(np.concatenate(found, 1), np.concatenate(expected, 1), 1e-5)


@pytest.mark.parametrize(("length", "window"), [(1, 4), (4, 4), (5, 4), (11, 4)])
def test_operations_count_the_keys_that_a_token_sees(length, window):
    c = config_lib.default().model
    c.attention.window = window
    products = MIXERS["sliding"].operations(c, length) - 8 * c.width**2
    c.attention.num_kv_heads = c.num_heads // 4
    assert MIXERS["sliding"].operations(c, length) == pytest.approx(products + (4 + 1) * c.width**2)
    assert products == pytest.approx(4 * c.width * np.mean([min(t, window) for t in range(1, length + 1)]))
