"""``ttt plot context``: a line for each size, or for each model."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from saved_runs import lines, run, words

from ttt_jax.config import ConfigError
from ttt_jax.figures import style
from ttt_jax.figures.perplexity import perplexity_by_context

LINEAR, FINETUNED = "TTT-Linear (Mamba backbone)", "Transformer, fine-tuned"
CONTEXTS = (64, 128, 256)


def perplexity(kind, size, context):
    return 12 - 3 * size + kind - context / 100


@pytest.fixture
def runs(tmp_path):
    for kind in range(2):
        for size in range(2):
            for context in CONTEXTS:
                settings = {"model__mixer": "attention", "training__start_from": "x"} if kind else {}
                run(
                    tmp_path / "runs" / f"{kind}{size}{context}",
                    perplexity=perplexity(kind, size, context),
                    context=context,
                    parameters=[2_000_000, 30_000_000][size] + kind * 100_000,
                    model__width=96 * (1 + size),
                    **settings,
                )
    return tmp_path / "runs"


def drawing(monkeypatch, *arguments, **options):
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(style, "save", lambda figure, *outputs: figures.append(figure))
        perplexity_by_context(*arguments, **options)
    plt.close(figures[0])
    return figures[0].axes


def test_a_line_for_each_size(runs, tmp_path, monkeypatch):
    panels = drawing(monkeypatch, [str(runs)], [tmp_path / "x.png"])
    assert [axes.get_title() for axes in panels] == [LINEAR, FINETUNED]
    for kind, axes in enumerate(panels):
        found = lines(axes)
        assert list(found) == ["2 M to 2.1 M parameters", "30 M parameters"]
        for size, pairs in enumerate(found.values()):
            np.testing.assert_allclose(pairs, [(c, perplexity(kind, size, c)) for c in CONTEXTS], rtol=1e-9)
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_a_panel_of_one_point_leaves_the_others_their_room(tmp_path, monkeypatch):
    for context, more in ((64, {}), (128, {}), (128, {"model__mixer": "attention"})):
        run(tmp_path / f"{context}{len(more)}", perplexity=10 + context / 100, context=context, **more)
    for axes in drawing(monkeypatch, [str(tmp_path)], [tmp_path / "x.png"]):
        low, high = axes.get_ylim()
        assert 10 < low < 10.64
        assert 11.28 < high < 12


def test_a_line_for_each_model(runs, tmp_path, monkeypatch):
    panels = drawing(monkeypatch, [str(runs)], [tmp_path / "x.png"], lines="model", contexts=[64, 256])
    assert [axes.get_title() for axes in panels] == ["2 M to 2.1 M parameters", "30 M parameters"]
    for size, axes in enumerate(panels):
        found = lines(axes)
        assert list(found) == [LINEAR, FINETUNED]
        for kind, pairs in enumerate(found.values()):
            np.testing.assert_allclose(pairs, [(c, perplexity(kind, size, c)) for c in (64, 256)], rtol=1e-9)
        assert {line.get_color() for line in axes.get_lines()} == {style.of(name).color for name in found}


def test_what_is_written(runs, tmp_path):
    perplexity_by_context([str(runs)], [tmp_path / "a.svg"])
    said = words(tmp_path / "a.svg")
    for text, times in {
        "Perplexity by context, books/validation": 1,
        "context, tokens (log scale)": 2,
        "perplexity (log scale)": 2,
        "30 M parameters": 1,
        "64": 2,
        "256": 2,
    }.items():
        assert said.count(text) == times


def test_one_context_is_no_line(runs, tmp_path):
    with pytest.raises(ConfigError, match="all runs were trained at 64 tokens; expected runs of several contexts"):
        perplexity_by_context([str(runs)], [tmp_path / "x.png"], contexts=[64])
