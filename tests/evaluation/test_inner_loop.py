"""Compare inspections of the inner loop with the primal form, which forms every W_t, one token after another."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.data.token_source import TokenSource
from ttt_jax.evaluation import inner_loop, inspections
from ttt_jax.mixers import ttt_layer
from ttt_jax.models.language_model import build_model
from ttt_jax.ttt import primal, scan
from ttt_jax.ttt.inner_loop import Parameters, Tokens, initial_state, ttt_linear

B, HEADS, LAYERS = 4, 2, 2
TRAINING, PIECE, CONTEXT = 14, 12, 22  # both contexts end within a mini-batch; pieces of the longer one do not
RNG = np.random.default_rng(0)
LENGTHS = (30, 9, 22, 40, 23)  # of documents; three have more tokens than the context
TOKENS = np.concatenate([[256, *RNG.integers(0, 256, n - 1)] for n in LENGTHS]).astype(np.uint16)
DOCUMENTS = [0, 61, 101]  # where those three begin
MEANS = ("loss_at_w0", "loss_before", "loss_after", "target_spread", "weight_change", "eta")


def tiny(mixer="ttt_linear", **ttt):
    config = config_lib.default()
    config.model.update(mixer=mixer, width=8, num_layers=LAYERS, num_heads=HEADS, mlp_width=8)
    config.model.ttt.update({"mini_batch": B, **ttt})
    config.data.update(sequence_length=TRAINING, batch_size=2)
    config_lib.validate(config)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, with_random_params):
    return with_random_params(tiny(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module", autouse=True)
def data():
    def from_config(config, split):
        return TokenSource(f"books/{split}", TOKENS, vocab_size=257, bos=256)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner_loop.named_sources, "from_config", from_config)
        yield


@pytest.fixture(scope="module")
def of_windows(trained, data):
    """Return the inspection of three windows of the training context, which are read in one pass."""
    return inner_loop.inspect(trained, context=TRAINING, most_windows=3, batch_size=2)


def by_the_primal_form(run, loss_of, loop, parameters, tokens):
    """Return the statistics of one layer, from the weights of the primal form: [B, T, H], and |W0| [H]."""
    w0, constants, position_eta = parameters
    b, start = len(position_eta), initial_state(w0, len(tokens.q))
    state, found = start, {"loss_at_w0": [], "loss_before": [], "loss_after": [], "weight_distance": []}
    for t in range(0, tokens.q.shape[1], b):
        piece = jax.tree.map(lambda x, t=t: x[:, t : t + b], tokens)
        used = piece.q.shape[1]
        _, new = run(loop, parameters, piece, state)
        if used == b:
            step = new.weights
        else:
            rate = position_eta[used - 1]
            step = jax.tree.map(lambda w, g, rate=rate: w - rate * g, state.weights, new.pending)
        at = {"loss_at_w0": start.weights, "loss_before": state.weights, "loss_after": step}
        for name, weights in at.items():
            loss = loss_of(loop.learner, constants, weights, piece.k.swapaxes(1, 2), piece.v.swapaxes(1, 2))
            found[name].append(np.asarray(loss, np.float64).swapaxes(1, 2))
        change = [
            np.asarray(w, np.float64) - old for w, old in zip(*map(jax.tree.leaves, (step, start.weights)), strict=True)
        ]
        found["weight_distance"] += [np.sqrt(sum((x**2).sum((2, 3)) for x in change))[:, None]] * used
        state = new
    w0_norm = np.sqrt(sum((np.asarray(w, np.float64) ** 2).sum((1, 2)) for w in jax.tree.leaves(w0)))
    return {name: np.concatenate(parts, axis=1) for name, parts in found.items()} | {
        "w0_norm": w0_norm,
        "eta": np.asarray(tokens.eta, np.float64),
    }


@pytest.fixture(scope="module")
def expected(trained, quick_jit):
    """Return ``expected(starts, tokens)``: the statistics of windows that are read in one pass.

    The primal form gets the inputs that each layer of the model has.
    """

    primal_run = quick_jit(primal.run, static_argnums=0)

    def loss(learner, constants, weights, k, v):
        return ((learner.apply(weights, constants, k) - v) ** 2).sum(-1) / 2

    loss_of = quick_jit(loss, static_argnums=0)

    class Inputs(NamedTuple):
        """The inputs of a scan, which replace its statistics, so that the layer returns them."""

        parameters: Parameters
        tokens: Tokens

    def recording(run):
        def spy(loop, parameters, tokens, *state, **options):
            return run(loop, parameters, tokens, *state, **options)._replace(statistics=Inputs(parameters, tokens))

        return spy

    def read(starts, tokens):
        inputs = np.stack([TOKENS[start : start + tokens] for start in starts]).astype(np.int32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "run", recording(scan.run))
            patch.setattr(ttt_layer, "_spread", lambda target, _context: target)
            forward = quick_jit(lambda params: trained.model.apply({"params": params}, inputs, mutable=["statistics"]))
            _, filled = forward(trained.params)
        recorded = filled["statistics"]["layers"]["mixer"]
        loop, layers = ttt_linear(trained.config.model.width // HEADS), []
        for i in range(LAYERS):
            of_layer = jax.tree.map(lambda x, i=i: x[i], recorded)
            layer = by_the_primal_form(primal_run, loss_of, loop, *(of_layer[name] for name in Inputs._fields))
            target = np.asarray(of_layer["target_spread"], np.float64)
            length = tokens if tokens <= TRAINING else PIECE
            pieces = [target[:, i : i + length] for i in range(0, tokens, length)]
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


def test_windows_match_the_primal_form(trained, expected, of_windows):
    found = of_windows
    windows = (len(TOKENS) - 1) // TRAINING
    check(found, expected([i * windows // 3 * TRAINING for i in range(3)], TRAINING), 3, TRAINING)
    tau = trained.params["layers"]["mixer"]["tau"]
    np.testing.assert_allclose(found.position_eta, np.maximum(0, 1 / np.arange(1, B + 1) + tau), rtol=1e-6)
    assert (found.about["windows"], found.about["tokens"], found.about["of"]) == (3, 42, "windows")


@pytest.mark.slow
def test_documents_in_pieces_match_the_primal_form(trained, expected):
    """Read documents with more tokens than the context, with a batch that is not full; pieces carry W."""
    found = inner_loop.inspect(trained, context=CONTEXT, by_document=True, batch_size=2)
    check(found, expected(DOCUMENTS, CONTEXT), 3, CONTEXT)
    assert (found.about["windows"], found.about["of"], found.about["training_context"]) == (3, "documents", TRAINING)


def arrays_of(found):
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)[1:]}


@pytest.mark.slow
def test_no_number_depends_on_the_batch_size(trained, of_windows):
    few, many = of_windows, inner_loop.inspect(trained, context=TRAINING, most_windows=3, batch_size=3)
    for name, value in arrays_of(few).items():
        np.testing.assert_allclose(value, getattr(many, name), rtol=1e-4, atol=1e-6, err_msg=name)
    assert few.about == many.about


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 200}, "--context 200: books/validation has 124 tokens, which is 0 windows"),
        ({"context": 40, "by_document": True}, "--context 40: no document of books/validation has more tokens; .* 40"),
    ],
)
def test_missing_data_is_refused(trained, options, message):
    with pytest.raises(ConfigError, match=message):
        inner_loop.inspect(trained, **options)


def test_a_model_without_an_inner_loop_is_refused(trained):
    message = r"its Transformer has no inner loop; expected .* model\.mixer=ttt_linear or ttt_mlp or ttt$"
    with pytest.raises(ConfigError, match=message):
        inner_loop.inspect(trained._replace(config=tiny("attention")), context=TRAINING)


@pytest.mark.slow
def test_rates_of_each_weight_matrix_and_no_spread_of_targets(trained, random_params, quick_jit):
    """Inspect an inner loop with rates per matrix and the dot product, in two pieces of one length."""
    config = tiny(
        "ttt", learner="swiglu", output="none", objective="dot_product", rate="softplus", rate_per_matrix=True
    )
    config.model.ttt.update({"update": "momentum + muon + renormalise", "reading": "previous", "base_lr": 0.1})
    model = build_model(config.model)
    params = random_params(model, np.zeros((1, 1), np.int32))
    found = inner_loop.inspect(
        trained._replace(config=config, model=model, params=params), context=2 * PIECE, most_windows=3
    )
    starts = [i * ((len(TOKENS) - 1) // (2 * PIECE)) // 3 * 2 * PIECE for i in range(3)]
    windows = np.stack([TOKENS[start : start + 2 * PIECE] for start in starts]).astype(np.int32)
    _, filled = quick_jit(lambda params: model.apply({"params": params}, windows, mutable=["statistics"]))(params)
    expected = filled["statistics"]["layers"]["mixer"]  # [L, N, T, H, ...]
    assert "target_spread" not in expected
    assert (found.target_spread, found.target_spread_standard_error) == (None, None)
    assert found.eta.shape == (LAYERS, HEADS, 3, 2 * PIECE)
    assert np.ptp(found.eta.mean((1, 3)), axis=1).min() > 0  # rates of matrices differ
    np.testing.assert_allclose(found.eta, np.moveaxis(expected["eta"], 2, -1).mean(1), rtol=1e-4)
    error = np.moveaxis(expected["eta"].mean(3), 2, -1).std(1, ddof=1) / np.sqrt(3)  # [L, M, T]
    np.testing.assert_allclose(found.eta_standard_error, error, rtol=1e-2)
    for name in inspections.LOSSES:
        np.testing.assert_allclose(getattr(found, name), expected[name].mean((1, 3)), rtol=1e-3, atol=1e-5)
    change = (expected["weight_distance"] / expected["w0_norm"][:, None, None]).mean((1, 3))[:, B - 1 :: B]
    np.testing.assert_allclose(found.weight_change, change, rtol=1e-4)
