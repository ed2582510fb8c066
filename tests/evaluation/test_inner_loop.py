"""Inner-loop diagnostics of a run, against the primal form: one token after another, every W_t formed."""

import csv
import dataclasses
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest
from rich.console import Console

from ttt_jax import config as config_lib
from ttt_jax.cli import inspect
from ttt_jax.config import ConfigError
from ttt_jax.data.token_source import TokenSource
from ttt_jax.distributed import sharding
from ttt_jax.evaluation import inner_loop, inspections
from ttt_jax.evaluation.trained import Trained
from ttt_jax.mixers import ttt_layer
from ttt_jax.models.language_model import build_model
from ttt_jax.storage.workdir import at
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
def trained(tmp_path_factory, random_params):
    config = tiny()
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    model, rules = build_model(config.model), sharding.ShardingRules()
    params = random_params(model, np.zeros((1, 1), np.int32))
    place = sharding.batch_sharding(mesh, rules)
    return Trained(at(tmp_path_factory.mktemp("run")), config, model, params, 5, "", mesh, rules, place)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    def from_config(config, split):
        return TokenSource(f"books/{split}", TOKENS, vocab_size=257, bos=256)

    monkeypatch.setattr(inner_loop.named_sources, "from_config", from_config)


def by_the_primal_form(run, loss_of, loop, parameters, tokens):
    """Return the diagnostics of one layer, from the weights of the primal form: [B, T, H], and |W0| [H]."""
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
    """``expected(starts, tokens)``: the diagnostics of windows that are read in one go; each layer of the model is
    given to the primal form with the very inputs that it has there."""

    primal_run = quick_jit(primal.run, static_argnums=0)

    def loss(learner, constants, weights, k, v):
        return ((learner.apply(weights, constants, k) - v) ** 2).sum(-1) / 2

    loss_of = quick_jit(loss, static_argnums=0)

    class Inputs(NamedTuple):
        """Stands where the statistics of a scan stood, so that the layer hands out the inputs of its scan."""

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


def test_windows(trained, expected):
    """Read windows of the training context, in one go."""
    found = inner_loop.inspect(trained, context=TRAINING, most_windows=3, batch_size=2)
    windows = (len(TOKENS) - 1) // TRAINING
    check(found, expected([i * windows // 3 * TRAINING for i in range(3)], TRAINING), 3, TRAINING)
    tau = trained.params["layers"]["mixer"]["tau"]
    np.testing.assert_allclose(found.position_eta, np.maximum(0, 1 / np.arange(1, B + 1) + tau), rtol=1e-6)
    assert (found.about["windows"], found.about["tokens"], found.about["of"]) == (3, 42, "windows")


def test_beginnings_of_documents_in_pieces(trained, expected):
    """Those with more tokens than the context; a batch that is not full; W goes on from piece to piece."""
    found = inner_loop.inspect(trained, context=CONTEXT, by_document=True, batch_size=2)
    check(found, expected(DOCUMENTS, CONTEXT), 3, CONTEXT)
    assert (found.about["windows"], found.about["of"], found.about["training_context"]) == (3, "documents", TRAINING)


def arrays_of(found):
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)[1:]}


def test_no_number_depends_on_the_batch_size(trained):
    few, many = (inner_loop.inspect(trained, context=TRAINING, most_windows=3, batch_size=n) for n in (2, 3))
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
def test_what_there_is_not(trained, options, message):
    with pytest.raises(ConfigError, match=message):
        inner_loop.inspect(trained, **options)


def test_a_model_without_an_inner_loop(trained):
    message = r"its Transformer has no inner loop; expected .* model\.mixer=ttt_linear or ttt_mlp or ttt$"
    with pytest.raises(ConfigError, match=message):
        inner_loop.inspect(trained._replace(config=tiny("attention")), context=TRAINING)


def test_rates_of_each_weight_matrix_and_no_spread_of_targets(trained, random_params, quick_jit):
    """Inspect a point with neither a rate for all matrices nor a squared error, also in pieces that are whole
    mini-batches."""
    config = tiny(
        "ttt", learner="swiglu", output="none", objective="dot_product", rate="softplus", rate_per_matrix=True
    )
    config.model.ttt.update({"update": "momentum + muon + renormalise", "reading": "previous", "base_lr": 0.1})
    model = build_model(config.model)
    params = random_params(model, np.zeros((1, 1), np.int32))
    found = inner_loop.inspect(trained._replace(config=config, model=model, params=params), context=16, most_windows=3)
    starts = [i * ((len(TOKENS) - 1) // 16) // 3 * 16 for i in range(3)]
    windows = np.stack([TOKENS[start : start + 16] for start in starts]).astype(np.int32)
    _, filled = quick_jit(lambda params: model.apply({"params": params}, windows, mutable=["statistics"]))(params)
    expected = filled["statistics"]["layers"]["mixer"]  # [L, N, T, H, ...]
    assert "target_spread" not in expected
    assert (found.target_spread, found.target_spread_standard_error) == (None, None)
    assert found.eta.shape == (LAYERS, HEADS, 3, 16)
    assert np.ptp(found.eta.mean((1, 3)), axis=1).min() > 0  # rates of matrices differ
    np.testing.assert_allclose(found.eta, np.moveaxis(expected["eta"], 2, -1).mean(1), rtol=1e-4)
    error = np.moveaxis(expected["eta"].mean(3), 2, -1).std(1, ddof=1) / np.sqrt(3)  # [L, M, T]
    np.testing.assert_allclose(found.eta_standard_error, error, rtol=1e-2)
    for name in inspections.LOSSES:
        np.testing.assert_allclose(getattr(found, name), expected[name].mean((1, 3)), rtol=1e-3, atol=1e-5)
    change = (expected["weight_distance"] / expected["w0_norm"][:, None, None]).mean((1, 3))[:, B - 1 :: B]
    np.testing.assert_allclose(found.weight_change, change, rtol=1e-4)


# ---- Files


def made_up(context=9, step=7, matrices=None):
    """Arrays of numbers all different, two layers, three heads, mini-batches of four; of an inner loop with a rate for
    each weight matrix and no spread of targets, where their number is given."""
    shapes = dict.fromkeys(("loss_at_w0", "loss_before", "loss_after", "target_spread"), (2, context))
    shapes |= {"weight_change": (2, 3)}
    shapes |= {f"{name}_standard_error": shape for name, shape in shapes.items()}
    shapes |= {"weight_distance": (2, 3, 3), "w0_norm": (2, 3), "eta": (2, 3, context), "position_eta": (2, 4)}
    shapes |= {"eta_standard_error": (2, context)}
    if matrices is not None:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("target_spread")}
        shapes |= {"eta": (2, 3, matrices, context), "eta_standard_error": (2, matrices, context)}
    arrays = {name: RNG.random(shape) for name, shape in shapes.items()}
    places = {"position": np.arange(1, context + 1), "weight_position": np.array([4, 8, 9])}
    return inspections.Inspection({"step": step, "context": context}, **places, **arrays)


def test_a_layer_in_a_line():
    """The last quarter of nine positions begins at the seventh."""
    found = made_up()
    for i, line in enumerate(inspections.summary(found)):
        assert line.loss_at_w0 == pytest.approx(found.loss_at_w0[i, 6:].mean())
        assert line.loss_after == pytest.approx(found.loss_after[i, 6:].mean())
        assert line.explained == pytest.approx(1 - found.loss_before[i, 6:].sum() / found.target_spread[i, 6:].sum())
        assert line.weight_change == found.weight_change[i, -1]
        heads = found.eta[i].mean(1)
        assert (line.eta, line.eta_min, line.eta_max) == pytest.approx((heads.mean(), heads.min(), heads.max()))


def test_what_does_not_exist_is_left_out(tmp_path):
    """The spread of targets, and the change of a W0 that is zero; each weight matrix has its rate."""
    found = made_up(matrices=4)
    found.weight_change[0], found.w0_norm[0] = np.nan, 0
    path = inspections.save(found, tmp_path, "validation-9")
    back = inspections.read(tmp_path, "validation")
    assert back.target_spread is None
    np.testing.assert_array_equal(back.eta, found.eta)
    with np.load(path, allow_pickle=False) as file:
        assert not [name for name in file if "target_spread" in name]
    first, second = json.loads(path.with_suffix(".json").read_text())["layers"]
    assert (first["explained"], second["explained"], first["weight_change"]) == (None, None, None)
    rates = found.eta.mean(-1)
    assert [second[key] for key in ("eta", "eta_min", "eta_max")] == pytest.approx(
        [rates[1].mean(), rates[1].min(), rates[1].max()]
    )
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [row for row in rows if row["quantity"] in ("eta", "target_spread") or "nan" in row.values()]
    third = [row for row in rows if (row["quantity"], row["layer"]) == ("eta_3", "1")]
    means, heads = [row for row in third if not row["head"]], [row for row in third if row["head"]]
    np.testing.assert_allclose([float(row["value"]) for row in means], found.eta[1, :, 3].mean(0))
    np.testing.assert_allclose([float(row["standard_error"]) for row in means], found.eta_standard_error[1, 3])
    np.testing.assert_allclose([float(row["value"]) for row in heads], found.eta[1, :, 3].mean(1))
    table = Console(width=120, record=True)
    table.print(inspect._table(found.blocks, inspections.summary(found), per_matrix=True))
    text = table.export_text()
    assert "explained" not in text
    assert "nan" not in text
    assert text.count("W0 = 0") == 1
    assert "of heads and weight matrices" in text


def test_files_hold_what_was_found(tmp_path):
    found = made_up()
    found.weight_change[1] = found.loss_after_standard_error[0] = np.nan
    path = inspections.save(found, tmp_path, "validation-9")
    assert path == tmp_path / "inspect" / "validation-9.npz"
    with np.load(path, allow_pickle=False) as file:
        assert file.keys() == arrays_of(found).keys()
    back = inspections.read(tmp_path, "validation")
    for name, value in arrays_of(found).items():
        np.testing.assert_array_equal(getattr(back, name), value)
    layers = back.about.pop("layers")
    assert back.about.pop("not_finite") == 0
    assert back.about == found.about
    assert layers[0] == inspections.summary(found)[0]._asdict()
    assert layers[1]["weight_change"] is None
    json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)

    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def column(quantity, layer, key="value", by_head=False):
        chosen = [row for row in rows if (row["quantity"], row["layer"]) == (quantity, str(layer))]
        return [float(row[key] or "nan") for row in chosen if bool(row["head"]) is by_head]

    for name in ("loss_at_w0", "loss_before", "loss_after", "target_spread", "weight_change"):
        for layer in (0, 1):
            np.testing.assert_array_equal(column(name, layer), getattr(found, name)[layer])
            errors = getattr(found, f"{name}_standard_error")[layer]
            np.testing.assert_array_equal(
                column(name, layer, "standard_error"), np.where(np.isnan(errors), np.nan, errors)
            )
    np.testing.assert_array_equal(column("weight_change", 0, "position"), [4, 8, 9])
    np.testing.assert_allclose(column("eta", 1), found.eta[1].mean(0))
    np.testing.assert_allclose(column("eta", 1, by_head=True), found.eta[1].mean(1))
    np.testing.assert_allclose(column("weight_distance", 1), found.weight_distance[1].mean(0))
    np.testing.assert_array_equal(column("w0_norm", 0, by_head=True), found.w0_norm[0])
    np.testing.assert_array_equal(column("position_eta", 0), found.position_eta[0])
    np.testing.assert_array_equal(column("position_eta", 0, "position"), [1, 2, 3, 4])


def test_the_longest_is_read_where_no_context_is_given(tmp_path):
    for context in (9, 17, 12):
        inspections.save(made_up(context), tmp_path, inspections.name("test", context))
    inspections.save(made_up(30), tmp_path, inspections.name("test", 30, by_document=True))
    inspections.save(made_up(40, step=3), tmp_path, inspections.name("test", 40, step=3))

    def read(*arguments, **kind):
        about = inspections.read(tmp_path, "test", *arguments, **kind).about
        return about["context"], about["step"]

    assert read() == (17, 7)
    assert read(12) == (12, 7)
    assert read(by_document=True) == (30, 7)
    assert read(step=3) == (40, 3)
    for arguments, kind, asked in (
        (
            (13,),
            {},
            "with context 13; there are .*test-9, test-documents-30; run: ttt inspect .* --split test --context 13$",
        ),
        ((), {"step": 4}, "of the test split; there are .*; run: ttt inspect .* --split test --context 2048 --step 4$"),
        ((9,), {"by_document": True}, "--context 9 --by-document$"),
    ):
        with pytest.raises(ConfigError, match=asked):
            read(*arguments, **kind)


def test_losses_that_are_not_finite_show(tmp_path):
    found = made_up()
    found.loss_before[1, 7], found.loss_after[1, 7], found.loss_at_w0[0, 0] = np.nan, np.inf, np.inf
    path = inspections.save(found, tmp_path, "validation-9")
    about = json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert about["not_finite"] == inspections.not_finite(found) == 2  # positions of layers
    assert [layer["loss_before"] is None for layer in about["layers"]] == [False, True]
    assert (about["layers"][1]["loss_after"], about["layers"][1]["explained"]) == (None, None)
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert [line for line in lines if line.startswith("loss_before,1,,8,nan")]
    table = Console(width=120, record=True)
    table.print(inspect._table(found.blocks, inspections.summary(found)))
    assert table.export_text().count("not finite") == 2
