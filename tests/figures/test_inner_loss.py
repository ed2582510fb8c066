"""Check ``ttt plot inner-loss``: three curves for each layer, from the files of ``ttt inspect``."""

import numpy as np
import pytest
from saved_runs import lines, save_inspection, words

from ttt_jax.config import ConfigError
from ttt_jax.figures.by_position import inner_loss

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


def test_texts_and_files(tmp_path, losses):
    save_inspection(tmp_path, losses)
    inner_loss(tmp_path, [tmp_path / "a.svg", tmp_path / "a.png"])
    said = words(tmp_path / "a.svg")
    assert {f"layer {i}" for i in range(4)} < set(said)
    assert "token index t" in said
    assert "inner loss" in said
    title = "Loss of the inner loop, TTT-Linear (Mamba backbone), books/validation, 6 windows of 40 tokens; "
    assert f"{title}mean over 10 positions" in " ".join(said)
    assert (tmp_path / "a.png").exists()


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
