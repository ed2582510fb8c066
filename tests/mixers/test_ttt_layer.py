"""Compare the parts of the TTT layer around its inner loop with NumPy: rates, positions, convolutions, gate, norm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.mixers.mixer import Context
from ttt_jax.mixers.ttt import TTT
from ttt_jax.ttt import scan
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens, ttt_linear, ttt_mlp
from ttt_jax.ttt.learner import Affine, Learner
from ttt_jax.ttt.learners import Linear
from ttt_jax.ttt.objective import dot_product
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Decay, Momentum

BATCH, TOKENS, WIDTH, HEADS, B = 2, 7, 8, 2, 3
HEAD_DIM = WIDTH // HEADS
LINEAR = ttt_linear(HEAD_DIM)
GATES = {"log_decay": np.log(99), "momentum": 0.0}  # added to the logits, so that a decay starts at 0.99
X = np.random.default_rng(5).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)


def layer(backbone="mamba", loop=LINEAR, **options):
    return TTT(loop, HEADS, jnp.float32, backbone, mini_batch=B, **options)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def heads(x):
    return x.reshape(BATCH, TOKENS, HEADS, HEAD_DIM)


def numpy_conv(conv, x):
    padded = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    return sum(conv["kernel"][j] * padded[:, j : j + TOKENS] for j in range(4)) + conv["bias"]


def numpy_rope_modulo_b(x):
    turns = np.exp(1j * (np.arange(TOKENS) % B)[:, None, None] * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    z = (x[..., ::2] + 1j * x[..., 1::2]) * turns
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def numpy_inputs(p, backbone, base_lr=1.0, scale=1.0):
    """Return q, k, v, token_eta and position_eta by their definitions, in float64."""
    if backbone == "mamba":
        shared = X @ p["wq"]["kernel"]
        q, k = numpy_conv(p["conv_q"], shared), numpy_conv(p["conv_k"], shared)
    else:
        q, k = X @ p["wq"]["kernel"], X @ p["wk"]["kernel"]
    token_eta = base_lr * scale * sigmoid(X @ p["eta_kernel"] + p["eta_bias"]) / HEAD_DIM
    position_eta = np.maximum(0, 1 / np.arange(1, B + 1) + p["tau"])
    rotated = (numpy_rope_modulo_b(heads(x)) for x in (q, k))
    return *rotated, heads(X @ p["wv"]["kernel"]), token_eta, position_eta


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


class Recorder:
    """A stand-in for ``scan.run`` that keeps its inputs and returns q."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(scan, "run", self)

    def __call__(self, loop, parameters, tokens, *_, **__):
        self.inputs, self.gates = (*tokens[:4], parameters.position_eta), tokens.gates
        return scan.Result(tokens.q, None, None)


@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
def test_inputs_of_the_inner_loop_match_numpy(random_params, assert_close, monkeypatch, backbone):
    """Check positions modulo b, and eta = base_lr * scale * max(0, 1/t + tau) * sigmoid(w.x + c) / d."""
    module = layer(backbone, base_lr=0.3)
    params = random_params(module, X)
    params["tau"] = np.array([0.25, -2.0, -0.1], np.float32)  # the second one is clipped: 1/2 - 2 < 0
    recorder = Recorder(monkeypatch)
    module.apply({"params": params}, X, None, Context(inner_lr_warmup=0.7))
    assert_close(recorder.inputs, numpy_inputs(float64(params), backbone, 0.3, 0.7), 1e-6)
    np.testing.assert_allclose(recorder.inputs[4], [1.25, 0, 1 / 3 - 0.1], rtol=1e-6)


@pytest.mark.parametrize(("base_lr", "scale"), [(1.0, 1.0), (0.1, 1.0), (1.0, 0.25), (0.1, 0.25)])
def test_inner_rate_is_linear_in_base_lr_and_its_scale(random_params, assert_close, monkeypatch, base_lr, scale):
    params = random_params(layer(), X)
    recorder = Recorder(monkeypatch)
    layer(base_lr=base_lr).apply({"params": params}, X, None, Context(inner_lr_warmup=scale))
    gate = sigmoid(float64(X) @ params["eta_kernel"] + params["eta_bias"])
    assert_close(recorder.inputs[3] * HEAD_DIM, base_lr * scale * gate, 1e-6)


def test_a_rate_that_is_not_learned_keeps_its_initial_value(random_params, assert_close, monkeypatch):
    """Check eta = base_lr * scale / (2 t d), without parameters."""
    module = layer(base_lr=0.3, learned_eta=False)
    params = random_params(module, X)
    assert not {"eta_kernel", "eta_bias", "tau"} & params.keys()
    recorder = Recorder(monkeypatch)
    module.apply({"params": params}, X, None, Context(inner_lr_warmup=0.7))
    token_eta, position_eta = recorder.inputs[3:]
    assert_close(token_eta, np.full((BATCH, TOKENS, HEADS), 0.3 * 0.7 / 2 / HEAD_DIM), 1e-6)
    np.testing.assert_allclose(position_eta, [1, 1 / 2, 1 / 3], rtol=1e-6)


def test_softplus_rates_per_matrix_match_numpy(random_params, assert_close, monkeypatch):
    """Check eta = scale * softplus(w.x + c + softplus^-1(base_lr)), which does not depend on the position."""
    loop = dataclasses.replace(ttt_mlp(HEAD_DIM), rate=Rate("softplus", "1", per_matrix=True))
    module = layer(loop=loop, base_lr=0.3)
    params = random_params(module, X)
    assert params["eta_kernel"].shape == (WIDTH, HEADS, 2)
    assert "tau" not in params
    recorder = Recorder(monkeypatch)
    module.apply({"params": params}, X, None, Context(inner_lr_warmup=0.7))
    logits = np.einsum("btd,dhm->bthm", X, float64(params)["eta_kernel"]) + params["eta_bias"]
    token_eta, position_eta = recorder.inputs[3:]
    assert_close(token_eta, 0.7 * np.log1p(np.exp(logits + np.log(np.expm1(0.3)))), 1e-6)
    np.testing.assert_array_equal(position_eta, np.ones(B))


def test_gates_of_the_update_match_numpy(random_params, assert_close, monkeypatch):
    """Check functions of w.x + c; a decay that is the same for all tokens has no parameters."""
    module = layer(loop=dataclasses.replace(LINEAR, update=(Decay(), Momentum())))
    params = random_params(module, X)
    recorder = Recorder(monkeypatch)
    module.apply({"params": params}, X)
    p = float64(params)
    decay, momentum = (sigmoid(X @ p[f"{name}_kernel"] + p[f"{name}_bias"] + shift) for name, shift in GATES.items())
    assert_close(recorder.gates, {"log_decay": np.log(decay), "momentum": momentum}, 1e-5)
    fixed = layer(loop=dataclasses.replace(LINEAR, update=(Decay(0.9),)))
    assert random_params(fixed, X).keys() == random_params(layer(), X).keys()


def test_w0_that_is_not_learned_is_zero(random_params, quick_jit, assert_close):
    """Compare with a learned W0 of zeros."""
    module = layer(learned_w0=False)
    params = random_params(module, X)
    zeros = {"inner_kernel_0": np.zeros((HEADS, HEAD_DIM, HEAD_DIM)), "inner_bias_0": np.zeros((HEADS, 1, HEAD_DIM))}
    expected, _ = quick_jit(layer().apply)({"params": {**params, **zeros}}, X)
    assert not zeros.keys() & params.keys()
    assert_close(quick_jit(module.apply)({"params": params}, X)[0], expected, 1e-6)


def test_aligned_is_passed_to_the_scan(random_params, quick_jit, assert_close):
    """Check equal results where the promise is kept, and NaN in rows where it is broken."""
    module, x = layer(), np.concatenate([X, X], 1)[:, : 4 * B]
    params = random_params(module, x)

    def run(reset, aligned):
        return module.apply({"params": params}, x, None, Context(reset=reset, aligned=aligned))[0]

    read = quick_jit(run, static_argnums=1)
    reset = np.zeros(x.shape[:2], bool)
    reset[:, 2 * B] = True
    assert_close(read(reset, True), read(reset, False), 1e-5)
    reset[1, 2 * B + 1] = True
    broken = read(reset, True)
    assert np.isfinite(broken[0]).all()
    assert np.isnan(broken[1]).any()


@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
def test_layer_is_norm_gate_and_projection_of_the_inner_loop(random_params, quick_jit, assert_close, backbone):
    module = layer(backbone)
    params = random_params(module, X)
    y, state = quick_jit(module.apply)({"params": params}, X)
    assert state is None

    w0 = (Affine(params["inner_kernel_0"], params["inner_bias_0"]),)
    norm = {name: params[f"inner_{name}"] for name in ("norm_scale", "norm_bias")}
    p = float64(params)
    *tokens, position_eta = (x.astype(np.float32) for x in numpy_inputs(p, backbone))
    z = quick_jit(scan.run, static_argnums=0)(module.loop, Parameters(w0, norm, position_eta), Tokens(*tokens)).z
    z = np.asarray(z, np.float64).reshape(X.shape)
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    z = z * p["post_norm"]["scale"] + p["post_norm"]["bias"]
    if backbone == "mamba":
        gate = X @ p["wg"]["kernel"]
        z *= 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    assert_close(y, z @ p["wo"]["kernel"], 1e-4)


def test_post_norm_epsilon_is_1e_6(random_params, monkeypatch):
    """Check a variance of 1e-6, where this epsilon halves the square: 1e-5 would give 0.30 instead of 0.71."""
    module = layer("transformer")
    params = random_params(module, X)
    params["wo"]["kernel"] = np.eye(WIDTH, dtype=np.float32)
    params["post_norm"] = {"scale": np.ones(WIDTH, np.float32), "bias": np.zeros(WIDTH, np.float32)}
    z = np.broadcast_to(1e-3 * np.resize([1, -1], (HEADS, HEAD_DIM)), (BATCH, TOKENS, HEADS, HEAD_DIM))
    monkeypatch.setattr(scan, "run", lambda *_, **__: scan.Result(jnp.asarray(z, jnp.float32), None, None))
    y, _ = module.apply({"params": params}, X)
    np.testing.assert_allclose(y, np.broadcast_to(np.resize([1, -1], WIDTH) * 0.5**0.5, X.shape), rtol=1e-5)


def test_target_spread_is_the_loss_of_the_mean_target(random_params, quick_jit, assert_close):
    module = layer("transformer")
    params = random_params(module, X)
    _, extra = quick_jit(lambda p: module.apply({"params": p}, X, mutable=["statistics"]))(params)
    target = heads(X @ params["wv"]["kernel"] - X @ params["wk"]["kernel"]).astype(np.float64)
    expected = ((target - target.mean(1, keepdims=True)) ** 2).sum(-1) / 2
    assert_close(extra["statistics"]["target_spread"], expected)


def test_target_spread_without_a_residual_is_that_of_the_values(random_params, quick_jit, assert_close):
    """Check also that an objective without a target has no spread."""

    def statistics(**choices):
        module = layer("transformer", InnerLoop(Learner(Linear(), HEAD_DIM), **choices))
        params = random_params(module, X)
        _, extra = quick_jit(lambda p: module.apply({"params": p}, X, mutable=["statistics"]))(params)
        return params, extra["statistics"]

    params, found = statistics()
    target = heads(X @ params["wv"]["kernel"]).astype(np.float64)
    assert_close(found["target_spread"], ((target - target.mean(1, keepdims=True)) ** 2).sum(-1) / 2)
    assert found.keys() - statistics(objective=dot_product)[1].keys() == {"target_spread"}


@pytest.mark.slow
@pytest.mark.parametrize("learned", [True, False])
def test_rates_and_the_norm_of_w0_are_recorded(random_params, quick_jit, assert_close, learned):
    """Compare a read from the start with two pieces, of which the first ends within a mini-batch."""
    module = layer(base_lr=0.3, learned_eta=learned, learned_w0=learned)
    params = random_params(module, X)

    @quick_jit
    def run(params):
        _, whole = module.apply({"params": params}, X, None, Context(inner_lr_warmup=0.7), mutable=["statistics"])
        state = module.initial_state(BATCH, WIDTH, TOKENS)
        (_, state), first = module.apply(
            {"params": params}, X[:, :4], state, Context(inner_lr_warmup=0.7), mutable=["statistics"]
        )
        _, rest = module.apply(
            {"params": params}, X[:, 4:], state, Context(inner_lr_warmup=0.7), mutable=["statistics"]
        )
        return whole["statistics"], first["statistics"], rest["statistics"]

    whole, *pieces = run(params)
    if learned:
        *_, eta, position_eta = numpy_inputs(float64(params), "mamba", 0.3, 0.7)
        w0 = np.concatenate([params["inner_kernel_0"], params["inner_bias_0"]], axis=1).astype(np.float64)
        w0_norm = np.sqrt((w0**2).sum((1, 2)))
    else:
        eta, position_eta, w0_norm = (
            np.full((BATCH, TOKENS, HEADS), 0.3 * 0.7 / 2 / HEAD_DIM),
            [1, 1 / 2, 1 / 3],
            [0, 0],
        )
    for found in (whole, *pieces):
        assert_close(found["position_eta"], position_eta, 1e-6)
        assert_close(found["w0_norm"], w0_norm, 1e-6)
    assert_close(whole["eta"], eta, 1e-6)
    for name in ("eta", "loss_at_w0", "loss_before"):
        assert_close(np.concatenate([piece[name] for piece in pieces], axis=1), whole[name])
    ends = [2, 5, 6]  # the last tokens of mini-batches
    for name in ("loss_after", "weight_distance"):
        joined = np.concatenate([piece[name] for piece in pieces], axis=1)
        assert_close(joined[:, ends], whole[name][:, ends])
