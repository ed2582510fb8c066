"""Check ``ttt plot loss-by-position`` and ``inner-loss``: smoothing, curves, texts, and differences."""

import json

import numpy as np
import pytest
from matplotlib import colors, image
from saved_runs import lines, run, save_evaluation, save_inspection, words

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import evaluations
from ttt_jax.figures import by_position, style
from ttt_jax.figures.by_position import inner_loss, loss_by_position

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


@pytest.mark.slow
def test_a_figure_of_three_models(evaluated, tmp_path):
    runs = [
        evaluated("a", LINEAR, loss=1.0),
        evaluated("b", MLP, loss=1.5, parameters=123_456_789),
        evaluated("c", TRANSFORMER, loss=2.0),
    ]
    means = [json.loads((run / "eval/validation-64.json").read_text())["loss"] for run in runs]
    loss_by_position(runs, [tmp_path / "abc.png", tmp_path / "abc.svg"])
    pixels = image.imread(tmp_path / "abc.png")[..., :3]
    assert pixels.shape == (800, 1152, 3)
    places = []
    for color in ("#0072B2", "#D55E00", "#000000"):
        drawn = np.abs(pixels - np.array(colors.to_rgb(color))).max(-1) < 0.02
        inside = drawn[60:600, 200:1100]  # within the axes
        assert 300 < inside.sum() < 5000, color
        places.append(np.nonzero(inside)[0].mean())
    assert places[0] > places[1] > places[2]  # a lower loss is further down

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


def test_runs_of_one_model_are_told_apart_by_name(evaluated, drawn):
    runs = [evaluated("first"), evaluated("second", loss=2.0), evaluated("third", TRANSFORMER)]
    loss_by_position(runs, [])
    (axes,) = drawn[0].axes
    assert [label.rpartition(": mean")[0] for label in lines(axes)] == [
        f"{LINEAR}, 1.2 M parameters, first",
        f"{LINEAR}, 1.2 M parameters, second",
        f"{TRANSFORMER}, 1.2 M parameters",
    ]
    curves = [line for line in axes.get_lines() if line.get_label() in lines(axes)]
    assert [line.get_color() for line in curves] == ["#0072B2", "#009E73", "#000000"]  # the second has one of its own


def test_runs_of_one_name_in_different_folders_are_told_apart(evaluated, drawn):
    runs = [evaluated("a/run"), evaluated("b/run", loss=2.0)]
    loss_by_position(runs, [], against=runs[0])
    assert list(lines(drawn[0].axes[0])) == [
        f"{LINEAR}, 1.2 M parameters, a/run: mean 1.500",
        f"{LINEAR}, 1.2 M parameters, b/run: mean 2.000",
    ]


def test_the_training_context_is_marked_in_longer_ones(evaluated, drawn):
    run, _ = (evaluated("a", context=context) for context in (64, 128))
    for context, marked in ((64, []), (128, ["trained on 64"])):
        loss_by_position([run], [], context=context)
        assert [text.get_text() for text in drawn[-1].axes[0].texts] == marked


@pytest.mark.parametrize(("key", "value"), [("fingerprint", "f2"), ("windows", 7)])
def test_evaluations_of_other_text_are_not_compared(evaluated, tmp_path, key, value):
    runs = [evaluated("a"), evaluated("b"), evaluated("c", **{key: value})]
    with pytest.raises(ConfigError) as caught:
        loss_by_position(runs, [tmp_path / "x.png"])
    message = str(caught.value)
    assert message.startswith(f"c: its evaluation has {key} {value}, that of a ")
    assert "expected the same data, context and windows" in message
    assert not (tmp_path / "x.png").exists()


def test_the_context_is_the_longest_that_all_have(evaluated, drawn, tmp_path):
    for context in (64, 128):
        evaluated("a", context=context)
    loss_by_position([tmp_path / "a", evaluated("b")], [], against=tmp_path / "a")
    assert drawn[0].axes[0].get_title() == "Loss by token index, books/validation, 6 windows of 64 tokens"
    with pytest.raises(ConfigError) as caught:
        loss_by_position([tmp_path / "a", evaluated("c", context=65)], [])
    command = f"ttt eval --workdir {tmp_path / 'c'} --split validation --context 128"
    there = "there are train-65, validation-65"
    assert (
        str(caught.value)
        == f"{tmp_path / 'c'}: no evaluation of the validation split with context 128; {there}; run: {command}"
    )


def test_the_title_names_a_carried_state(tmp_path, drawn):
    workdir = run(tmp_path / "a", about={"of": "documents", "carried": True})
    loss_by_position([workdir], [], by_document=True, carried=True)
    title = "Loss by token index, books/validation, 6 documents of up to 64 tokens, the state carried"
    assert drawn[0].axes[0].get_title() == title


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


def test_differences_are_paired(evaluated, drawn):
    runs = [evaluated("a", LINEAR, loss=1.0), evaluated("b", MLP), evaluated("c", TRANSFORMER, loss=2.0)]
    loss_by_position(runs, [], against=runs[2])
    _, below = drawn[0].axes
    differences = [line for line in below.get_lines() if len(line.get_xdata()) > 2]
    colors_of_others = [style.of_model(name).color for name in (LINEAR, MLP)]
    assert [line.get_color() for line in differences] == colors_of_others
    found = [evaluations.read(workdir, "validation") for workdir in runs]
    for each, line, band in zip(found, differences, below.collections, strict=False):
        expected = evaluations.paired_difference(each, found[2]).bins
        np.testing.assert_allclose(line.get_ydata(), expected.mean, rtol=1e-12)
        top, bottom = band.get_paths()[0].vertices[:, 1].max(), band.get_paths()[0].vertices[:, 1].min()
        assert top == pytest.approx(np.nanmax(expected.high))
        assert bottom == pytest.approx(np.nanmin(expected.low))
    assert below.get_title() == "difference to Transformer, 1.2 M parameters; paired, 95 % intervals"
    assert below.get_xlim() == drawn[0].axes[0].get_xlim()
    assert below.get_xlabel() == "token index in the sequence (log scale)"


@pytest.mark.parametrize("name", ["x.txt", "x", "x.jpeg"])
def test_other_kinds_of_files_are_refused(evaluated, tmp_path, name):
    with pytest.raises(ConfigError) as caught:
        loss_by_position([evaluated("a")], [tmp_path / name])
    assert str(caught.value) == f"--output {tmp_path / name}: expected a name that ends in .png, .pdf or .svg"


# ---- Losses of the inner loop

NAMES = ("loss_at_w0", "loss_before", "loss_after")
LABELS = (r"$\ell(W_0; x_t)$", r"$\ell(W_{t-1}; x_t)$", r"$\ell(W_t; x_t)$")


@pytest.fixture
def losses():
    rng = np.random.default_rng(0)
    return {name: 3 - i + rng.random((4, 40)) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize(("layers", "window", "mini_batch"), [(None, 10, 1), ([2, 0], 1, 16)])
def test_curves_are_sliding_means(tmp_path, losses, drawn, layers, window, mini_batch):
    save_inspection(tmp_path, losses, mini_batch=mini_batch)
    inner_loss(tmp_path, [], layers=layers, window=window)
    chosen = layers or range(4)
    assert [axes.get_title() for axes in drawn[0].axes] == [f"layer {layer}" for layer in chosen]
    for axes, layer in zip(drawn[0].axes, chosen, strict=True):
        found = lines(axes)
        assert tuple(found) == LABELS if mini_batch == 1 else [label[-10:] for label in found][1:] == ["mini-batch"] * 2
        for name, pairs in zip(NAMES, found.values(), strict=True):
            curve = losses[name][layer]
            expected = [
                (1 + (2 * i + window - 1) / 2, curve[i : i + window].mean()) for i in range(len(curve) + 1 - window)
            ]
            np.testing.assert_allclose(pairs, expected, rtol=1e-9)


def test_texts_of_inner_losses(tmp_path, losses, drawn):
    save_inspection(tmp_path, losses)
    inner_loss(tmp_path, [])
    (figure,) = drawn
    assert [axes.get_xlabel() for axes in figure.axes] == ["token index t"] * 4
    assert [axes.get_ylabel() for axes in figure.axes] == ["inner loss", "", "", ""]
    title = "Loss of the inner loop, TTT-Linear (Mamba backbone), books/validation, 6 windows of 40 tokens; "
    assert figure.get_suptitle() == f"{title}mean over 10 positions"


def test_the_longest_context_is_drawn(tmp_path, losses, drawn):
    for context in (40, 20):
        save_inspection(tmp_path, {name: values[:, :context] for name, values in losses.items()})
    for context in (None, 20):
        inner_loss(tmp_path, [], context=context, window=1)
    assert [len(lines(figure.axes[0])[LABELS[0]]) for figure in drawn] == [40, 20]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": [4]}, "--layers 4: no layer of this number learns; expected 0 to 3"),
        ({"window": 41}, "--window 41: expected 1 to 40, the context"),
        (
            {"split": "test"},
            "test split; there is validation-40; run: ttt inspect --workdir .* --split test --context 2048",
        ),
        (
            {"context": 80},
            "context 80; there is validation-40; run: ttt inspect --workdir .* --split validation --context 80",
        ),
    ],
)
def test_missing_inspections_and_wrong_options_are_refused(tmp_path, losses, options, said):
    save_inspection(tmp_path, losses)
    with pytest.raises(ConfigError, match=said):
        inner_loss(tmp_path, [tmp_path / "x.png"], **options)
    assert not (tmp_path / "x.png").exists()


def test_damaged_files_are_named(tmp_path, losses):
    save_inspection(tmp_path, losses)
    (tmp_path / "inspect" / "validation-40.npz").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"validation-40.npz: damaged, or not of the .json beside it; run ttt inspect again"
    ):
        inner_loss(tmp_path, [tmp_path / "x.png"])


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path, losses, drawn):
    losses["loss_before"][1, 20], losses["loss_before"][1, 30] = np.nan, np.inf
    save_inspection(tmp_path, losses)
    inner_loss(tmp_path, [], window=3)
    assert [axes.get_title() for axes in drawn[0].axes][:3] == ["layer 0", "layer 1: 2 losses not finite", "layer 2"]
    curve = drawn[0].axes[1].lines[1].get_ydata()
    assert np.flatnonzero(np.isnan(curve)).tolist() == [18, 19, 20, 28, 29, 30]
    assert curve[21] == pytest.approx(losses["loss_before"][1, 21:24].mean(), rel=1e-12)
