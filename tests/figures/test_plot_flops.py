"""``ttt plot flops``: what stands where, and what the paper says."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from saved_runs import lines, run, words

from ttt_jax.config import ConfigError
from ttt_jax.figures import published, style
from ttt_jax.figures.perplexity import perplexity_by_flops

LINEAR, MLP_T, TRANSFORMER = "TTT-Linear (Mamba backbone)", "TTT-MLP (Transformer backbone)", "Transformer"


@pytest.fixture
def runs(tmp_path):
    """Three kinds of models of three sizes, at two contexts; names that mislead."""
    kinds = (
        {"model__mixer": "ttt_linear"},
        {"model__mixer": "ttt_mlp", "model__ttt__backbone": "transformer"},
        {"model__mixer": "attention"},
    )
    place = 0
    for context in (128, 64):
        for i, kind in enumerate(kinds):
            for size in (2, 0, 1):
                known = {"perplexity": 12 - 2 * size + i, "flops": (1 + i) * 10.0 ** (12 + size), "context": context}
                run(tmp_path / "runs" / f"{place}", **known, model__num_layers=2 + size, **kind)
                place += 1
    return tmp_path / "runs"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, instead of files."""
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, *outputs: figures.append(figure))
    yield figures
    for figure in figures:
        plt.close(figure)


def test_points_of_each_panel_and_line(runs, drawn, tmp_path):
    perplexity_by_flops([str(runs)], [tmp_path / "x.png"])
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["books/validation, 64 tokens", "books/validation, 128 tokens"]
    for axes in figure.axes:
        found = lines(axes)
        assert list(found) == [LINEAR, MLP_T, TRANSFORMER]
        for i, name in enumerate(found):
            expected = [((1 + i) * 10.0 ** (12 + size), 12 - 2 * size + i) for size in range(3)]
            np.testing.assert_allclose(found[name], expected, rtol=1e-12)
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        for line in axes.get_lines():
            look = style.of(line.get_label())
            assert (line.get_color(), line.get_marker()) == (look.color, look.marker)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [LINEAR, MLP_T, TRANSFORMER]


def test_inner_loops_of_any_kind_are_told_apart(tmp_path, drawn):
    for i, update in enumerate(("decay", "momentum")):
        run(tmp_path / str(i), model__mixer="ttt", model__ttt__update=update)
    perplexity_by_flops([str(tmp_path)], [tmp_path / "x.png"])
    first, second = drawn[0].axes[0].get_lines()
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()


def test_one_context_and_what_is_written(runs, tmp_path):
    outputs = [tmp_path / "a.svg", tmp_path / "b.png"]
    perplexity_by_flops([str(runs)], outputs, contexts=[128])
    said = words(outputs[0])
    for text in ("training FLOPs (log scale)", "perplexity (log scale)", "books/validation, 128 tokens", LINEAR, MLP_T):
        assert said.count(text) == 1
    assert "books/validation, 64 tokens" not in said
    assert outputs[1].read_bytes().startswith(b"\x89PNG")


def test_fine_tuning_counts_what_it_started_from(tmp_path, drawn):
    small = {"context": 64, "model__mixer": "attention", "model__num_layers": 1, "model__vocab_size": 1000}
    small |= {"model__width": 24, "model__mlp_width": 48, "data__batch_size": 2}
    run(tmp_path / "base", training__duration="50 steps", flops=1.0, **small)
    first = run(tmp_path / "tuned", training__start_from=str(tmp_path / "base"), flops=1e9, **small)
    second = run(tmp_path / "again", training__start_from=f"{first}/checkpoints/7", flops=1e10, perplexity=9, **small)
    perplexity_by_flops([str(first), str(second)], [])
    ((name, pairs),) = lines(drawn[0].axes[0]).items()
    assert name == "Transformer, fine-tuned"
    per_token = 2 * (4 * 24**2 + 3 * 24 * 48 + 24 * 1000) + 4 * 24 * 65 / 2
    step = 3 * per_token * 64 * 2
    np.testing.assert_allclose([x for x, _ in pairs], [1e9 + 50 * step, 1e10 + (50 + 7) * step], rtol=1e-12)

    run(first, training__start_from="nowhere", **small)
    with pytest.raises(
        ConfigError, match=r"tuned: started from nowhere, whose training counts too, and cannot be read"
    ):
        perplexity_by_flops([str(first)], [])


def test_published_points(tmp_path, drawn):
    """11.09 and 11.99 are in the paper's Table 1, at the FLOPs of 2.5 B tokens: 6 N D and what the inner loop adds."""
    run(tmp_path / "a", context=2048, flops=1e18, perplexity=11.5)
    run(tmp_path / "b", context=2048, flops=1e18, perplexity=12.5, model__ttt__backbone="transformer")
    run(tmp_path / "c", context=2048, flops=1e18, perplexity=11.4, model__mixer="attention")
    perplexity_by_flops([str(tmp_path)], [tmp_path / "x.png"], published=True)
    found = {name: pairs for name, pairs in lines(drawn[0].axes[0]).items() if name.startswith("paper")}
    assert list(found) == [
        f"paper: {LINEAR}, 125M, Pile",
        "paper: TTT-Linear (Transformer backbone), 125M, Pile",
    ]
    ((flops, perplexity),) = found[f"paper: {LINEAR}, 125M, Pile"]
    assert perplexity == 11.09
    dense = 12 * (4 * 768**2 + 3 * 768 * 2048 + 768 * 12) + 32_000 * 768  # weights of matrix products
    inner = 12 * 12 * (4 * 2 * 64 * 64 + 4 * 16 * 64)  # per token, head and layer: k W, K^T G, q W and the dual form
    inner -= 12 * 12 * 2 * 64 * 64  # Linear needs no gradient with respect to its input
    assert flops == pytest.approx(3 * (2 * dense + inner) * 4800 * 2**19, rel=1e-12)
    assert found["paper: TTT-Linear (Transformer backbone), 125M, Pile"][0][1] == 11.99


@pytest.mark.parametrize("settings", [{"context": 1024}, {"context": 2048, "model__mixer": "ttt_mlp"}])
def test_where_the_paper_states_nothing(tmp_path, settings):
    run(tmp_path / "a", **settings)
    with pytest.raises(
        ConfigError, match=r"--published: the paper states perplexities of the models of its Table 1 at"
    ):
        perplexity_by_flops([str(tmp_path)], [tmp_path / "x.png"], published=True)
    assert not (tmp_path / "x.png").exists()


def test_panels_are_of_one_text(runs, tmp_path):
    run(runs / "other", context=64, about={"fingerprint": "f2"})
    with pytest.raises(ConfigError, match="expected the same text"):
        perplexity_by_flops([str(runs)], [tmp_path / "x.png"])


def test_table_1_is_told_apart_by_the_config():
    """The rungs of configs/ablation.py are those of the table, in its order."""
    from pathlib import Path

    from ttt_jax.config.files import names_of
    from ttt_jax.settings import flat

    ablation = names_of(Path(__file__).parents[2] / "configs" / "ablation.py")
    found = [published.of(flat(ablation["get_config"](rung).to_dict())) for rung in ablation["RUNGS"]]
    assert found == list(published.TABLE_1)
    assert [stated.perplexity for stated in found] == [15.23, 15.23, 15.27, 14.05, 12.35, 11.99, 11.09]
    assert found[-1] is published.TTT_LINEAR
    other = flat(ablation["get_config"]("mamba_backbone").to_dict())
    assert published.of({**other, "model.mixer": "ttt_mlp"}) is None
    assert published.of({**other, "model.ttt.mini_batch": 32}) is None
    assert math.isclose(published.training_flops(found[0]), 2.1e18, rel_tol=0.2)
