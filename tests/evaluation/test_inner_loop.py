"""Inner-loop diagnostics of a run, against the primal form: one token after another, every W_t formed."""

import jax
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.data.source import TokenSource
from ttt_jax.evaluation import inner_loop
from ttt_jax.evaluation.trained import Trained
from ttt_jax.layers import ttt as ttt_layer
from ttt_jax.models.build import language_model
from ttt_jax.parallel import sharding
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import primal, scan
from ttt_jax.ttt.state import initial_state
from ttt_jax.workdir import at

B, HEADS, LAYERS, TRAINING = 4, 2, 2, 14  # a training context that ends within a mini-batch
CONTEXT = 22  # and a longer one
RNG = np.random.default_rng(0)
LENGTHS = (30, 9, 22, 40, 23)  # of documents; three have more tokens than the context
TOKENS = np.concatenate([[256, *RNG.integers(0, 256, n - 1)] for n in LENGTHS]).astype(np.uint16)
DOCUMENTS = [0, 61, 101]  # where those three begin
MEANS = ("loss_at_w0", "loss_before", "loss_after", "target_spread", "weight_change", "eta")


def tiny(mixer="ttt_mlp", **ttt):
    config = config_lib.default()
    config.model.update(mixer=mixer, width=8, num_layers=LAYERS, num_heads=HEADS, mlp_width=8)
    config.model.ttt.update(mini_batch=B, base_lr=1.0, **ttt)
    config.data.update(sequence_length=TRAINING, batch_size=2)
    config_lib.validate(config)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, random_params):
    config = tiny()
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    model, rules = language_model(config.model), sharding.ShardingRules()
    params = random_params(model, np.zeros((1, 1), np.int32))
    place = sharding.batch_sharding(mesh, rules)
    return Trained(at(tmp_path_factory.mktemp("run")), config, model, params, 5, mesh, rules, place)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    def from_config(config, split):
        return TokenSource(f"books/{split}", TOKENS, vocab_size=257, bos=256)

    monkeypatch.setattr(inner_loop.sources, "from_config", from_config)


def by_the_primal_form(learner, norm, w0, q, k, v, token_eta, position_eta):
    """What the diagnostics of one layer are, from every W_t, in float64 NumPy. [B, T, H], and |W0| [H]."""
    b, tokens = len(position_eta), q.shape[1]
    state = initial_state(w0, len(q))
    before, after = [], []
    for start in range(0, tokens, b):
        piece = [x[:, start : start + b] for x in (q, k, v, token_eta)]
        used = piece[0].shape[1]
        _, new = primal.run(learner, norm, state, *piece, position_eta)
        end = learner_lib.gradient_step(state.weights, new.pending, position_eta[used - 1]) if used < b else new.weights
        before += [state.weights] * used
        after += [end] * used
        state = new

    def loss(weights, t):
        one = learner_lib.loss(learner, norm, weights, k[:, t, :, None], v[:, t, :, None])
        return np.asarray(one, np.float64)[..., 0]  # [B, H]

    def distance(weights):
        leaves = zip(jax.tree.leaves(weights), jax.tree.leaves(w0), strict=True)
        return np.sqrt(
            sum(((np.asarray(w, np.float64) - np.asarray(old, np.float64)) ** 2).sum((2, 3)) for w, old in leaves)
        )

    start = initial_state(w0, len(q)).weights
    return {
        "loss_at_w0": np.stack([loss(start, t) for t in range(tokens)], 1),
        "loss_before": np.stack([loss(before[t], t) for t in range(tokens)], 1),
        "loss_after": np.stack([loss(after[t], t) for t in range(tokens)], 1),
        "weight_distance": np.stack([distance(after[t]) for t in range(tokens)], 1),
        "w0_norm": np.sqrt(sum((np.asarray(w, np.float64) ** 2).sum((1, 2)) for w in jax.tree.leaves(w0))),
        "eta": np.asarray(token_eta, np.float64),
    }


@pytest.fixture(scope="module")
def expected(trained):
    """``expected(starts, tokens)``: the diagnostics of windows that are read in one go; each layer of the model is
    given to the primal form with the very inputs that it has there."""

    def read(starts, tokens):
        found, run = [], scan.run

        def spy(learner, norm, w0, q, k, v, token_eta, position_eta, state, **options):
            inputs = (norm, w0, q, k, v, token_eta, position_eta)
            jax.debug.callback(lambda *xs: found.append((learner, *xs)), *inputs, ordered=True)
            return run(learner, *inputs, state, **options)

        spreads = []
        spread = ttt_layer._target_spread

        def spy_spread(k, v):
            jax.debug.callback(lambda k, v: spreads.append(np.asarray(v, np.float64) - np.asarray(k, np.float64)), k, v)
            return spread(k, v)

        inputs = np.stack([TOKENS[start : start + tokens] for start in starts]).astype(np.int32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "run", spy)
            patch.setattr(ttt_layer, "_target_spread", spy_spread)
            jax.block_until_ready(trained.model.apply({"params": trained.params}, inputs, mutable=["statistics"]))
            jax.effects_barrier()
        layers = []
        for inputs, target in zip(found, spreads, strict=True):
            layer = by_the_primal_form(*inputs)
            pieces = [target[:, i : i + TRAINING] for i in range(0, tokens, TRAINING)]
            layer["target_spread"] = np.concatenate(
                [0.5 * ((x - x.mean(1, keepdims=True)) ** 2).sum(-1) for x in pieces], axis=1
            )
            layer["weight_change"] = layer["weight_distance"] / layer["w0_norm"]
            layers.append(layer)
        return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}  # [L, ...]

    return read


def check(found, expected, windows, tokens, tolerance=1e-4):
    ends = sorted({*range(B - 1, tokens, B), tokens - 1})
    np.testing.assert_array_equal(found.position, np.arange(1, tokens + 1))
    np.testing.assert_array_equal(found.weight_position, np.array(ends) + 1)
    for name in MEANS:
        by_window = expected[name].mean(-1)  # [L, N, T]
        if name == "weight_change":
            by_window = by_window[..., ends]
        error = by_window.std(1, ddof=1) / np.sqrt(windows)
        mine = found.eta.mean(1) if name == "eta" else getattr(found, name)
        np.testing.assert_allclose(mine, by_window.mean(1), rtol=tolerance, err_msg=name)
        np.testing.assert_allclose(getattr(found, f"{name}_standard_error"), error, rtol=1e-2, err_msg=name)
    np.testing.assert_allclose(found.eta, expected["eta"].mean(1).swapaxes(1, 2), rtol=tolerance)
    distance = expected["weight_distance"].mean(1).swapaxes(1, 2)[..., ends]
    np.testing.assert_allclose(found.weight_distance, distance, rtol=tolerance)
    np.testing.assert_allclose(found.w0_norm, expected["w0_norm"], rtol=tolerance)


def test_windows(trained, expected):
    """Of the training context, in one go."""
    found = inner_loop.inspect(trained, context=TRAINING, most_windows=3, batch_size=2)
    windows = (len(TOKENS) - 1) // TRAINING
    check(found, expected([i * windows // 3 * TRAINING for i in range(3)], TRAINING), 3, TRAINING)
    tau = trained.params["layers"]["mixer"]["tau"]
    np.testing.assert_allclose(found.position_eta, np.maximum(0, 1 / np.arange(1, B + 1) + tau), rtol=1e-6)
    assert (found.about["windows"], found.about["tokens"], found.about["of"]) == (3, 42, "windows")
