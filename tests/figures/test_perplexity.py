"""Check ``ttt plot flops``, ``context`` and ``mini-batch``: points, lines, texts, and the numbers of the paper."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from saved_runs import lines, run, words

from ttt_jax.config import ConfigError
from ttt_jax.config.files import executed
from ttt_jax.figures import published, style
from ttt_jax.figures.perplexity import by_mini_batch, perplexity_by_context, perplexity_by_flops
from ttt_jax.settings import flat

LINEAR, MLP_T, TRANSFORMER = "TTT-Linear (Mamba backbone)", "TTT-MLP (Transformer backbone)", "Transformer"
FINETUNED = "Transformer, fine-tuned"
CONTEXTS = (64, 128, 256)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Return a folder of runs of three kinds of models of three sizes, at two contexts, with names in another order."""
    settings = (
        {"model__mixer": "ttt_linear"},
        {"model__mixer": "ttt_mlp", "model__ttt__backbone": "transformer"},
        {"model__mixer": "attention"},
    )
    folder, place = tmp_path_factory.mktemp("kinds"), 0
    for context in (128, 64):
        for i, kind in enumerate(settings):
            for size in (2, 0, 1):
                known = {"perplexity": 12 - 2 * size + i, "flops": (1 + i) * 10.0 ** (12 + size), "context": context}
                run(folder / f"{place}", **known, model__num_layers=2 + size, **kind)
                place += 1
    return folder


def test_flops_points_of_each_panel_and_line(kinds, drawn, tmp_path):
    perplexity_by_flops([str(kinds)], [])
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
            look = style.of_model(line.get_label())
            assert (line.get_color(), line.get_marker()) == (look.color, look.marker)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [LINEAR, MLP_T, TRANSFORMER]


def test_flops_inner_loops_of_any_kind_are_told_apart(tmp_path, drawn):
    for i, update in enumerate(("decay", "momentum")):
        run(tmp_path / str(i), model__mixer="ttt", model__ttt__update=update)
    perplexity_by_flops([str(tmp_path)], [])
    first, second = drawn[0].axes[0].get_lines()
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()


def test_flops_texts_and_files_of_one_context(kinds, tmp_path):
    outputs = [tmp_path / "a.svg", tmp_path / "b.png"]
    perplexity_by_flops([str(kinds)], outputs, contexts=[128])
    said = words(outputs[0])
    for text in ("training FLOPs (log scale)", "perplexity (log scale)", "books/validation, 128 tokens", LINEAR, MLP_T):
        assert said.count(text) == 1
    assert "books/validation, 64 tokens" not in said
    assert outputs[1].read_bytes().startswith(b"\x89PNG")


def test_flops_of_fine_tuning_include_the_run_it_started_from(tmp_path, drawn):
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


def test_flops_published_points(tmp_path, drawn):
    """Expect 11.09 and 11.99 of Table 1, at the FLOPs of 2.5 B tokens: 6 N D and the FLOPs of the inner loop."""
    run(tmp_path / "a", context=2048, flops=1e18, perplexity=11.5)
    run(tmp_path / "b", context=2048, flops=1e18, perplexity=12.5, model__ttt__backbone="transformer")
    run(tmp_path / "c", context=2048, flops=1e18, perplexity=11.4, model__mixer="attention")
    perplexity_by_flops([str(tmp_path)], [], published=True)
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
def test_flops_where_the_paper_states_nothing(tmp_path, settings):
    run(tmp_path / "a", **settings)
    with pytest.raises(
        ConfigError, match=r"--published: the paper states perplexities of the models of its Table 1 at"
    ):
        perplexity_by_flops([str(tmp_path)], [tmp_path / "x.png"], published=True)
    assert not (tmp_path / "x.png").exists()


def test_flops_panels_are_of_one_text(kinds, tmp_path):
    other = run(tmp_path / "other", context=64, about={"fingerprint": "f2"})
    with pytest.raises(ConfigError, match="expected the same text"):
        perplexity_by_flops([str(kinds), str(other)], [tmp_path / "x.png"])


def test_table_1_is_recognised_by_the_config():
    """Expect the rungs of configs/ablation.py in the order of the table."""
    with executed(Path(__file__).parents[2] / "configs" / "ablation.py") as ablation:
        found = [published.of(flat(ablation["get_config"](rung).to_dict())) for rung in ablation["RUNGS"]]
    assert found == list(published.TABLE_1)
    assert [stated.perplexity for stated in found] == [15.23, 15.23, 15.27, 14.05, 12.35, 11.99, 11.09]
    assert found[-1] is published.TTT_LINEAR
    other = flat(ablation["get_config"]("mamba_backbone").to_dict())
    assert published.of({**other, "model.mixer": "ttt_mlp"}) is None
    assert published.of({**other, "model.ttt.mini_batch": 32}) is None
    assert math.isclose(published.training_flops(found[0]), 2.1e18, rel_tol=0.2)


def check_texts(figure, times):
    """Check how often texts are in a figure."""
    figure.draw_without_rendering()  # makes the labels of ticks
    said = [text.get_text() for text in figure.findobj(Text) if text.get_visible()]
    assert {text: said.count(text) for text in times} == times


def perplexity(kind, size, context):
    return 12 - 3 * size + kind - context / 100


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Return a folder of runs of two kinds of models of two sizes, at three contexts."""
    folder = tmp_path_factory.mktemp("grid")
    for kind in range(2):
        for size in range(2):
            for context in CONTEXTS:
                settings = {"model__mixer": "attention", "training__start_from": "x"} if kind else {}
                run(
                    folder / f"{kind}{size}{context}",
                    perplexity=perplexity(kind, size, context),
                    context=context,
                    parameters=[2_000_000, 30_000_000][size] + kind * 100_000,
                    model__width=96 * (1 + size),
                    **settings,
                )
    return folder


def draw(drawn, *arguments, **options):
    perplexity_by_context(*arguments, [], **options)
    return drawn[-1].axes


def test_context_a_line_for_each_size(grid, drawn):
    panels = draw(drawn, [str(grid)])
    assert [axes.get_title() for axes in panels] == [LINEAR, FINETUNED]
    for kind, axes in enumerate(panels):
        found = lines(axes)
        assert list(found) == ["2 M to 2.1 M parameters", "30 M parameters"]
        for size, pairs in enumerate(found.values()):
            np.testing.assert_allclose(pairs, [(c, perplexity(kind, size, c)) for c in CONTEXTS], rtol=1e-9)
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_context_a_panel_of_one_point_keeps_the_limits_of_the_others(tmp_path, drawn):
    for context, more in ((64, {}), (128, {}), (128, {"model__mixer": "attention"})):
        run(tmp_path / f"{context}{len(more)}", perplexity=10 + context / 100, context=context, **more)
    for axes in draw(drawn, [str(tmp_path)]):
        low, high = axes.get_ylim()
        assert 10 < low < 10.64
        assert 11.28 < high < 12


def test_context_a_line_for_each_model(grid, drawn):
    panels = draw(drawn, [str(grid)], lines="model", contexts=[64, 256])
    assert [axes.get_title() for axes in panels] == ["2 M to 2.1 M parameters", "30 M parameters"]
    for size, axes in enumerate(panels):
        found = lines(axes)
        assert list(found) == [LINEAR, FINETUNED]
        for kind, pairs in enumerate(found.values()):
            np.testing.assert_allclose(pairs, [(c, perplexity(kind, size, c)) for c in (64, 256)], rtol=1e-9)
        assert {line.get_color() for line in axes.get_lines()} == {style.of_model(name).color for name in found}


def test_context_texts(grid, drawn):
    perplexity_by_context([str(grid)], [])
    check_texts(
        drawn[0],
        {
            "Perplexity by context, books/validation": 1,
            "context, tokens (log scale)": 2,
            "perplexity (log scale)": 2,
            "30 M parameters": 1,
            "64": 2,
            "256": 2,
        },
    )


def test_context_needs_several(grid, tmp_path):
    with pytest.raises(ConfigError, match="all runs were trained at 64 tokens; expected runs of several contexts"):
        perplexity_by_context([str(grid)], [tmp_path / "x.png"], contexts=[64])


def test_mini_batch_perplexity_and_median_time(tmp_path, drawn):
    for b in (1, 16, 64):
        seconds = None if b == 16 else [9.0, 0.5 / b, 0.7 / b]  # the first step compiles
        run(tmp_path / f"run{b}", perplexity=10 + b / 10, seconds=seconds, model__ttt__mini_batch=b)
    run(tmp_path / "whole", perplexity=11, model__ttt__mini_batch=2048, model__mixer="ttt_mlp")  # of 64 tokens
    by_mini_batch([str(tmp_path)], [])
    left, right = drawn[0].axes
    found = lines(left)
    np.testing.assert_allclose(found[LINEAR], [(b, 10 + b / 10) for b in (1, 16, 64)], rtol=1e-9)
    np.testing.assert_allclose(found["TTT-MLP (Mamba backbone)"], [(64, 11)], rtol=1e-9)
    assert lines(right) == {LINEAR: [(1, 0.7), (64, 0.7 / 64)]}


def test_mini_batch_inner_loops_of_any_kind_are_told_apart(tmp_path, drawn):
    run(tmp_path / "a", model__mixer="ttt", model__ttt__update="decay")
    run(tmp_path / "b", perplexity=11, model__mixer="ttt", model__ttt__learner="mylab.learners:gated")
    by_mini_batch([str(tmp_path)], [])
    found = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    assert found.keys() == {"TTT (linear, decay, Mamba backbone)", "TTT (mylab.learners:gated, Mamba backbone)"}
    for look in ("color", "marker"):
        assert len({getattr(line, f"get_{look}")() for line in found.values()}) == 2


def test_mini_batch_texts(tmp_path, drawn):
    for b in (8, 16):
        run(tmp_path / f"run{b}", context=2048, model__ttt__mini_batch=b, seconds=[0.1])
    by_mini_batch([str(tmp_path)], [], published=True)
    check_texts(
        drawn[0],
        {
            "Mini-batch size, books/validation, 2k tokens": 1,
            "mini-batch size b of the inner loop, tokens (log scale)": 2,
            "perplexity (log scale)": 1,
            "seconds per training step (median)": 1,
            f"paper: {LINEAR}, 125M, Pile": 1,
            "8": 2,
            "16": 2,
        },
    )


def test_mini_batch_published_point(tmp_path, drawn):
    run(tmp_path / "a", context=2048, model__ttt__mini_batch=1)
    by_mini_batch([str(tmp_path)], [], published=True)
    assert lines(drawn[0].axes[0])[f"paper: {LINEAR}, 125M, Pile"] == [(16, 11.09)]


@pytest.mark.parametrize("settings", [{"model__mixer": "ttt_mlp", "context": 2048}, {"context": 1024}])
def test_mini_batch_where_the_paper_states_nothing(tmp_path, settings):
    run(tmp_path / "a", **settings)
    with pytest.raises(ConfigError, match="--published: the paper states the perplexity of TTT-Linear"):
        by_mini_batch([str(tmp_path)], [tmp_path / "x.png"], published=True)


def test_mini_batch_refuses_attention(tmp_path):
    run(tmp_path / "a", model__mixer="attention")
    with pytest.raises(ConfigError, match="a: Transformer has no mini-batches; expected a TTT layer"):
        by_mini_batch([str(tmp_path)], [tmp_path / "x.png"])
