"""Loss by token index: the statistics against plain loops, and the evaluation of a run against its logits."""

import csv
import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.data.source import TokenSource
from ttt_jax.evaluation import loss_by_position
from ttt_jax.models.build import language_model
from ttt_jax.parallel import sharding
from ttt_jax.training import program
from ttt_jax.training.checkpoint import Checkpoints

RNG = np.random.default_rng(0)

# ---- Statistics


def by_loops(nll, mask):
    """Mean, standard error and count of each position."""
    rows = []
    for t in range(nll.shape[1]):
        values = [float(nll[i, t]) for i in range(len(nll)) if mask[i, t]]
        n = len(values)
        mean = sum(values) / n if n else math.nan
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan
        rows.append((mean, error, n))
    return (np.array(column) for column in zip(*rows, strict=True))


def random_losses(n, tokens, density=0.6):
    nll = RNG.gamma(2.0, 1.0, (n, tokens)) + RNG.normal(0, 1, (n, 1))
    return nll.astype(np.float32), (RNG.random((n, tokens)) < density).astype(np.float32)


def test_positions():
    nll, mask = random_losses(6, 9)
    mask[:, 2] = 0  # counts in no window
    mask[:, 5] = [0, 0, 1, 0, 0, 0]  # in one
    mask[:, 7] = 1  # in all
    result = loss_by_position.summarise(nll, mask)
    loss, standard_error, count = by_loops(nll, mask)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(result.standard_error, standard_error, rtol=1e-12)
    np.testing.assert_array_equal(result.count, count)
    assert (result.count[2], result.count[5], result.count[7]) == (0, 1, 6)
    assert np.isnan(result.loss).tolist() == [t == 2 for t in range(9)]
    assert np.isnan(result.standard_error).tolist() == [t in (2, 5) for t in range(9)]
    assert result.count.dtype.kind == "i"
    assert result.windows == 6


def test_the_mean_is_of_tokens_not_of_windows_or_positions():
    nll, mask = random_losses(5, 8)
    mask[0] = [1, 0, 0, 0, 0, 0, 0, 0]
    nll[0] += 100
    counted = nll[mask == 1].astype(np.float64)
    result = loss_by_position.summarise(nll, mask)
    assert result.mean == pytest.approx(sum(counted.tolist()) / len(counted), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.mean), rel=1e-12)


def test_masked_losses_are_not_read():
    nll, mask = random_losses(5, 8)
    garbage = np.where(mask == 1, nll, 1e30)
    actual, expected = (dataclasses.asdict(loss_by_position.summarise(x, mask)) for x in (garbage, nll))
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])


def test_error_of_the_mean_is_that_of_window_means_where_windows_weigh_the_same():
    nll, _ = random_losses(7, 5)
    means = nll.astype(np.float64).mean(1)
    result = loss_by_position.summarise(nll, np.ones_like(nll))
    assert result.mean_standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(7), rel=1e-12)


def test_error_of_the_mean_is_what_drawing_other_windows_would_give():
    nll, mask = random_losses(200, 12, density=0.5)
    mask[:40, 3:] = 0  # windows of very different lengths
    nll[:, :3] += 4  # and of losses that depend on the position
    picks = RNG.integers(0, 200, (4000, 200))
    sums, counts = (nll * mask).sum(1)[picks].sum(1), mask.sum(1)[picks].sum(1)
    bootstrap = (sums / counts).std()
    assert loss_by_position.summarise(nll, mask).mean_standard_error == pytest.approx(bootstrap, rel=0.05)


def test_one_window_has_no_error():
    nll, mask = random_losses(1, 6, density=1)
    result = loss_by_position.summarise(nll, mask)
    assert math.isnan(result.mean_standard_error)
    assert np.isnan(result.standard_error).all()
    np.testing.assert_allclose(result.loss, nll[0], rtol=1e-12)


# ---- A run

CONTEXT, WINDOWS = 22, 5  # a context longer than that of training, which ends within a mini-batch
TOKENS = np.where(np.arange(400) % 9 == 0, 256, RNG.integers(0, 256, 400)).astype(np.uint16)
STEPS = (3, 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_params):
    """A workdir with two checkpoints of random parameters, the config, and the parameters."""
    config = config_lib.default()
    config.model.update(width=8, num_layers=1, num_heads=2, mlp_width=8)
    config.model.ttt.mini_batch = 4
    config.data.update(sequence_length=16, batch_size=4)
    config_lib.validate(config)
    workdir = tmp_path_factory.mktemp("evaluation") / "some-run"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))

    abstract = program.make(config, sharding.make_mesh(config_lib.mesh_shape(config, 1))).abstract_state
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    checkpoints = Checkpoints(workdir, keep_last=2)
    params = {}
    for step in STEPS:
        params[step] = random_params(language_model(config.model), np.zeros((1, 1), np.int32), seed=step)
        checkpoints.save(step, empty._replace(step=np.int32(step), params=params[step]), {})
    checkpoints.close()
    return workdir, config, params


@pytest.fixture
def data(monkeypatch):
    """A split with a BOS in every window."""

    def from_config(config, split):
        return TokenSource(f"{config.data.source}/{split}", TOKENS, vocab_size=257, bos=256)

    monkeypatch.setattr(loss_by_position.sources, "from_config", from_config)
    return from_config(config_lib.default(), "validation")


@pytest.fixture(scope="module")
def expected(run, quick_jit):
    """``expected(step)``: statistics of losses in float64, from the logits of windows that are cut here."""
    _, config, params = run
    model = language_model(config.model)
    forward = quick_jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
    total = (len(TOKENS) - 1) // CONTEXT
    starts = [CONTEXT * (i * total // WINDOWS) for i in range(WINDOWS)]
    windows = np.stack([TOKENS[start : start + CONTEXT + 1] for start in starts]).astype(np.int32)

    def compute(step):
        logits = np.asarray(forward(params[step], windows[:, :-1]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -np.take_along_axis(log_p, windows[:, 1:, None], axis=-1)[..., 0]
        return loss_by_position.summarise(nll, windows[:, 1:] != 256)

    return compute


def check_equal(actual, expected):
    assert (expected.count < WINDOWS).any()
    for name, value in dataclasses.asdict(expected).items():
        np.testing.assert_allclose(getattr(actual, name), value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("batch_size", "progress"),
    [(2, [(2, 5), (4, 5), (5, 5)]), (5, [(5, 5)]), (None, [(2, 5), (4, 5), (5, 5)])],  # 4 x 16 // 22 is 2
)
def test_evaluation_is_of_the_logits_whatever_the_batch_size(run, data, expected, batch_size, progress):
    workdir, _, params = run
    calls = []
    result, about = loss_by_position.evaluate(
        workdir,
        context=CONTEXT,
        most_windows=WINDOWS,
        batch_size=batch_size,
        progress=lambda done, total: calls.append((done, total)),
    )
    check_equal(result, expected(5))
    assert calls == progress
    assert about == {
        "workdir": "some-run",
        "model": "TTT-Linear (Mamba backbone)",
        "parameters": sum(x.size for x in jax.tree.leaves(params[5])),
        "step": 5,
        "source": "embedded/validation",
        "fingerprint": data.fingerprint(),
        "split": "validation",
        "of": "windows",
        "context": CONTEXT,
        "training_context": 16,
        "windows": WINDOWS,
        "tokens": result.count.sum(),
        "loss": result.mean,
        "loss_standard_error": result.mean_standard_error,
        "perplexity": math.exp(result.mean),
    }


def test_evaluation_of_an_earlier_step(run, data, expected):
    result, about = loss_by_position.evaluate(run[0], context=CONTEXT, most_windows=WINDOWS, batch_size=5, step=3)
    assert about["step"] == 3
    check_equal(result, expected(3))
    assert abs(expected(3).mean - expected(5).mean) > 0.01


def test_all_windows_of_a_split_that_has_fewer(run, data):
    result, about = loss_by_position.evaluate(run[0], context=100, most_windows=256, split="test", batch_size=3)
    assert (result.windows, about["windows"], about["split"]) == (3, 3, "test")
    starts = np.arange(3)[:, None] * 100
    np.testing.assert_array_equal(result.count, (TOKENS[starts + np.arange(1, 101)] != 256).sum(0))


@pytest.mark.parametrize("context", [20, 70])  # training context is 16: pieces end within and behind documents
def test_documents_are_read_whole(run, monkeypatch, quick_jit, context):
    """As one forward pass over each document, from its BOS, would have it: the state is carried over the pieces."""
    workdir, config, params = run
    lengths = [40, 7, 66, 2, 33]
    documents = [TOKENS[sum(lengths[:i]) + i :][: n - 1] % 256 for i, n in enumerate(lengths)]
    documents = [np.concatenate([[256], document]).astype(np.int32) for document in documents]
    source = TokenSource("books/validation", np.concatenate(documents), vocab_size=257, bos=256)
    monkeypatch.setattr(loss_by_position.sources, "from_config", lambda config, split: source)
    result, about = loss_by_position.evaluate(workdir, context=context, by_document=True, batch_size=2)

    model = language_model(config.model)
    forward = quick_jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
    nll, mask = np.zeros((5, context)), np.zeros((5, context))
    for row, document in enumerate(documents):
        padded = np.zeros((1, 70), np.int32)
        padded[0, : len(document)] = document
        logits = np.asarray(forward(params[5], padded), np.float64)[0]
        n = min(len(document) - 1, context)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll[row, :n], mask[row, :n] = -log_p[np.arange(n), document[1 : n + 1]], 1
    check_equal(result, loss_by_position.summarise(nll, mask))
    assert (about["of"], about["windows"], about["tokens"]) == ("documents", 5, mask.sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "expected 1 or more"),
        ({"most_windows": 0}, "expected 1 or more"),
        ({"batch_size": 0}, "expected 1 or more"),
        ({"step": 4}, r"--step 4: no such checkpoint in .*some-run; expected one of \[3, 5\]"),
        ({"context": 400}, "data.sequence_length=400: embedded/validation has 400 tokens, which is 0 windows"),
    ],
)
def test_what_cannot_be_evaluated(run, data, options, message):
    with pytest.raises(ConfigError, match=message):
        loss_by_position.evaluate(run[0], **{"context": CONTEXT, **options})


def test_saved_files_hold_the_result(tmp_path):
    nll, mask = random_losses(4, 6)
    mask[:, 1] = 0
    result = loss_by_position.summarise(nll, mask)
    about = {"split": "test", "of": "windows", "context": 6, "loss": result.mean}
    path = loss_by_position.save(result, about, tmp_path / "new" / "eval")
    assert path == tmp_path / "new" / "eval" / "test-6.npz"
    of_documents = loss_by_position.save(result, {**about, "of": "documents"}, tmp_path)
    assert of_documents == tmp_path / "test-documents-6.npz"
    with np.load(path, allow_pickle=False) as file:
        columns = dict(file)
    assert columns.keys() == {"position", "loss", "standard_error", "count"}
    np.testing.assert_array_equal(columns["position"], [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(columns["loss"], result.loss)
    np.testing.assert_array_equal(columns["standard_error"], result.standard_error)
    np.testing.assert_array_equal(columns["count"], result.count)
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, column in columns.items():
        np.testing.assert_array_equal([float(row[name]) for row in rows], column)
    assert json.loads(path.with_suffix(".json").read_text()) == about
