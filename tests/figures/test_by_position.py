"""Check ``ttt plot loss-by-position``: smoothing, curves, texts, and differences."""

import json

import numpy as np
import pytest
from matplotlib import colors, image
from saved_runs import lines, run, save_evaluation, words

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import evaluations
from ttt_jax.figures import by_position, style
from ttt_jax.figures.by_position import loss_by_position

LINEAR, MLP, TRANSFORMER = "TTT-Linear (Mamba backbone)", "TTT-MLP (Mamba backbone)", "Transformer"
MIXERS = {LINEAR: "ttt_linear", MLP: "ttt_mlp", TRANSFORMER: "attention"}


@pytest.fixture
def evaluated(tmp_path):
    """Return ``evaluated(name, model, ...)``: the workdir of an evaluated run that was trained at 64 tokens."""

    def make(name, model=LINEAR, *, context=64, loss=1.5, **about):
        more = {"context": context, **about}
        workdir = tmp_path / name
        run(workdir, noise=len(name), model__mixer=MIXERS[model], about={**more, "split": "train"})
        known = json.loads((workdir / f"eval/train-{context}.json").read_text())
        save_evaluation(workdir, {**known, "split": "validation", **about}, loss=loss, noise=ord(name[0]))
        return workdir

    return make


# ---- Smoothing


def test_smoothing_is_a_mean_over_a_constant_ratio():
    position = np.arange(1, 301)
    loss = np.random.default_rng(0).normal(size=300)
    loss[[0, 40, 41, 200]] = np.nan
    tokens = np.isfinite(loss).astype(int)
    smoothed = by_position.smooth(position, loss, 1.15, tokens)
    for i, p in enumerate(position):
        near = [x for q, x in zip(position, loss, strict=True) if p / 1.15 <= q <= p * 1.15 and np.isfinite(x)]
        assert smoothed[i] == pytest.approx(np.mean(near), rel=1e-9) if near else np.isnan(smoothed[i])
    assert np.isnan(smoothed[0])  # nothing is near
    tokens[40] = 1  # the NaN at position 41 counts
    gap = by_position.smooth(position, loss, 1.15, tokens)
    near = (position / 1.15 <= 41) & (position * 1.15 >= 41)
    assert np.isnan(gap[near]).all()
    np.testing.assert_array_equal(gap[~near], smoothed[~near])


def test_smoothing_keeps_constants_and_the_first_points():
    position = np.arange(1, 101)
    np.testing.assert_allclose(by_position.smooth(position, np.full(100, 2.5)), 2.5, rtol=1e-12)
    smoothed = by_position.smooth(position, position.astype(float))
    np.testing.assert_array_equal(smoothed[:6], position[:6])  # 7 / 1.15 > 6: alone in their windows
    assert smoothed[49] == np.mean(np.arange(44, 58))  # from 43.5 to 57.5


# ---- Figures


def test_a_figure_of_three_models(evaluated, tmp_path):
    runs = [
        evaluated("a", LINEAR, loss=1.0),
        evaluated("b", MLP, loss=1.5, parameters=123_456_789),
        evaluated("c", TRANSFORMER, loss=2.0),
    ]
    means = [json.loads((run / "eval/validation-64.json").read_text())["loss"] for run in runs]
    loss_by_position(runs, [tmp_path / "abc.png"])
    pixels = image.imread(tmp_path / "abc.png")[..., :3]
    assert pixels.shape == (800, 1152, 3)
    places = []
    for color in ("#0072B2", "#D55E00", "#000000"):
        drawn = np.abs(pixels - np.array(colors.to_rgb(color))).max(-1) < 0.02
        inside = drawn[60:600, 200:1100]  # within the axes
        assert 300 < inside.sum() < 5000, color
        places.append(np.nonzero(inside)[0].mean())
    assert places[0] > places[1] > places[2]  # a lower loss is further down

    loss_by_position(runs, [tmp_path / "abc.svg"])
    said = words(tmp_path / "abc.svg")
    for text in (
        "token index in the sequence (log scale)",
        "loss (nats per token)",
        "Loss by token index, books/validation, 6 windows of 64 tokens",
        f"{LINEAR}, 1.2 M parameters: mean {means[0]:.3f}",
        f"{MLP}, 123 M parameters: mean {means[1]:.3f}",
        f"{TRANSFORMER}, 1.2 M parameters: mean {means[2]:.3f}",
    ):
        assert text in said
    assert {"1", "2", "4", "8", "16", "32", "64"} < set(said)  # ticks

    loss_by_position(runs, [tmp_path / "abc.pdf"])
    assert (tmp_path / "abc.pdf").read_bytes().startswith(b"%PDF-")


def test_runs_of_one_model_are_told_apart_by_name(evaluated, tmp_path):
    runs = [evaluated("first"), evaluated("second", loss=2.0), evaluated("third", TRANSFORMER)]
    loss_by_position(runs, [tmp_path / "x.svg"])
    labels = [text for text in words(tmp_path / "x.svg") if "parameters" in text]
    assert [label.rpartition(": mean")[0] for label in labels] == [
        f"{LINEAR}, 1.2 M parameters, first",
        f"{LINEAR}, 1.2 M parameters, second",
        f"{TRANSFORMER}, 1.2 M parameters",
    ]
    drawing = (tmp_path / "x.svg").read_text().lower()
    assert "#0072b2" in drawing
    assert "#009e73" in drawing  # the second of its kind has a colour of its own


def test_runs_of_one_name_in_different_folders_are_told_apart(evaluated, tmp_path):
    runs = [evaluated("a/run"), evaluated("b/run", loss=2.0)]
    loss_by_position(runs, [tmp_path / "x.svg"], against=runs[0])
    said = words(tmp_path / "x.svg")
    labels = [text for text in said if ": mean" in text]
    assert labels == [
        f"{LINEAR}, 1.2 M parameters, a/run: mean 1.500",
        f"{LINEAR}, 1.2 M parameters, b/run: mean 2.000",
    ]


def test_the_training_context_is_marked_in_longer_ones(evaluated, tmp_path):
    for context, marked in ((64, False), (128, True)):
        loss_by_position([evaluated("a"), evaluated("a", context=128)], [tmp_path / "x.svg"], context=context)
        assert ("trained on 64" in words(tmp_path / "x.svg")) == marked


@pytest.mark.parametrize(("key", "value"), [("fingerprint", "f2"), ("windows", 7)])
def test_evaluations_of_other_text_are_not_compared(evaluated, tmp_path, key, value):
    runs = [evaluated("a"), evaluated("b"), evaluated("c", **{key: value})]
    with pytest.raises(ConfigError) as caught:
        loss_by_position(runs, [tmp_path / "x.png"])
    message = str(caught.value)
    assert message.startswith(f"c: its evaluation has {key} {value}, that of a ")
    assert "expected the same data, context and windows" in message
    assert not (tmp_path / "x.png").exists()


def test_the_context_is_the_longest_that_all_have(evaluated, tmp_path):
    for context in (64, 128):
        evaluated("a", context=context)
    loss_by_position([tmp_path / "a", evaluated("b")], [tmp_path / "x.svg"], against=tmp_path / "a")
    assert "Loss by token index, books/validation, 6 windows of 64 tokens" in words(tmp_path / "x.svg")
    with pytest.raises(ConfigError) as caught:
        loss_by_position([tmp_path / "a", evaluated("c", context=65)], [tmp_path / "x.svg"])
    command = f"ttt eval --workdir {tmp_path / 'c'} --split validation --context 128"
    there = "there are train-65, validation-65"
    assert (
        str(caught.value)
        == f"{tmp_path / 'c'}: no evaluation of the validation split with context 128; {there}; run: {command}"
    )


def test_the_title_names_a_carried_state(tmp_path):
    workdir = run(tmp_path / "a", about={"of": "documents", "carried": True})
    loss_by_position([workdir], [tmp_path / "x.svg"], by_document=True, carried=True)
    title = "Loss by token index, books/validation, 6 documents of up to 64 tokens, the state carried"
    assert title in " ".join(words(tmp_path / "x.svg"))  # in two lines


def test_bands_are_the_intervals_of_bins(evaluated, drawn):
    workdir = evaluated("a", context=128)
    loss_by_position([workdir], [])
    (axes,) = drawn[0].axes
    (band,) = axes.collections
    found = evaluations.read(workdir, "validation", 128)
    edge = {tuple(pair) for pair in band.get_paths()[0].vertices.round(9).tolist()}
    middles = np.sqrt(found.bin_first * found.bin_last)
    for bound in (found.bin_low, found.bin_high):
        valid = np.isfinite(bound)
        assert valid.sum() > 15
        assert {tuple(x) for x in np.stack([middles, bound], 1)[valid].round(9).tolist()} <= edge


def test_perplexity_is_that_of_the_mean_loss(evaluated, drawn):
    workdir = evaluated("a", loss=1.5)
    loss_by_position([workdir], [], perplexity=True)
    loss_by_position([workdir], [])
    ((as_perplexity,), (as_loss,)) = (figure.axes for figure in drawn)
    label = f"{LINEAR}, 1.2 M parameters: "
    curve = np.array(lines(as_perplexity)[f"{label}perplexity {np.exp(1.5):.2f}"])
    losses = np.array(lines(as_loss)[f"{label}mean 1.500"])
    np.testing.assert_allclose(curve[:, 1], np.exp(losses[:, 1]), rtol=1e-12)
    assert as_perplexity.get_yscale() == "log"
    assert as_perplexity.get_ylabel() == "perplexity (log scale)"


def test_differences_are_paired(evaluated, drawn, tmp_path):
    runs = [evaluated("a", LINEAR, loss=1.0), evaluated("b", MLP), evaluated("c", TRANSFORMER, loss=2.0)]
    loss_by_position(runs, [], against=runs[2])
    _, below = drawn[0].axes
    differences = [line for line in below.get_lines() if len(line.get_xdata()) > 2]
    colors_of_others = [style.of_model(name).color for name in (LINEAR, MLP)]
    assert [line.get_color() for line in differences] == colors_of_others
    found = [evaluations.read(workdir, "validation") for workdir in runs]
    for each, line, band in zip(found, differences, below.collections, strict=False):
        expected = evaluations.paired_difference(each, found[2])
        np.testing.assert_allclose(line.get_ydata(), expected.bin_loss, rtol=1e-12)
        top, bottom = band.get_paths()[0].vertices[:, 1].max(), band.get_paths()[0].vertices[:, 1].min()
        assert top == pytest.approx(np.nanmax(expected.bin_high))
        assert bottom == pytest.approx(np.nanmin(expected.bin_low))
    assert below.get_title() == "difference to Transformer, 1.2 M parameters; paired, 95 % intervals"
    assert below.get_xlim() == drawn[0].axes[0].get_xlim()

    loss_by_position(runs[:1], [tmp_path / "x.svg"], against=runs[2])
    assert "token index in the sequence (log scale)" in words(tmp_path / "x.svg")


@pytest.mark.parametrize("name", ["x.txt", "x", "x.jpeg"])
def test_other_kinds_of_files_are_refused(evaluated, tmp_path, name):
    with pytest.raises(ConfigError) as caught:
        loss_by_position([evaluated("a")], [tmp_path / name])
    assert str(caught.value) == f"--output {tmp_path / name}: expected a name that ends in .png, .pdf or .svg"
