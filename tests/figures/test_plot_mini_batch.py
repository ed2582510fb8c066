"""``ttt plot mini-batch``: perplexity and time by b."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from saved_runs import lines, run, words

from ttt_jax.config import ConfigError
from ttt_jax.figures import style
from ttt_jax.figures.perplexity import by_mini_batch

LINEAR = "TTT-Linear (Mamba backbone)"


def test_perplexity_and_median_time(tmp_path, monkeypatch):
    for b in (1, 16, 64):
        seconds = None if b == 16 else [9.0, 0.5 / b, 0.7 / b]  # the first step compiles
        run(tmp_path / f"run{b}", perplexity=10 + b / 10, seconds=seconds, model__ttt__mini_batch=b)
    run(tmp_path / "whole", perplexity=11, model__ttt__mini_batch=2048, model__mixer="ttt_mlp")  # of 64 tokens
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, *outputs: figures.append(figure))
    by_mini_batch([str(tmp_path)], [tmp_path / "x.png"])
    plt.close(figures[0])
    left, right = figures[0].axes
    found = lines(left)
    np.testing.assert_allclose(found[LINEAR], [(b, 10 + b / 10) for b in (1, 16, 64)], rtol=1e-9)
    np.testing.assert_allclose(found["TTT-MLP (Mamba backbone)"], [(64, 11)], rtol=1e-9)
    assert lines(right) == {LINEAR: [(1, 0.7), (64, 0.7 / 64)]}


def test_inner_loops_of_any_kind_have_mini_batches_and_are_told_apart(tmp_path, monkeypatch):
    run(tmp_path / "a", model__mixer="ttt", model__ttt__update="decay")
    run(tmp_path / "b", perplexity=11, model__mixer="ttt", model__ttt__learner="mylab.learners:gated")
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, *outputs: figures.append(figure))
    by_mini_batch([str(tmp_path)], [tmp_path / "x.png"])
    plt.close(figures[0])
    found = {line.get_label(): line for line in figures[0].axes[0].get_lines()}
    assert found.keys() == {"TTT (linear, decay, Mamba backbone)", "TTT (mylab.learners:gated, Mamba backbone)"}
    for look in ("color", "marker"):
        assert len({getattr(line, f"get_{look}")() for line in found.values()}) == 2


def test_what_is_written(tmp_path):
    for b in (8, 16):
        run(tmp_path / f"run{b}", context=2048, model__ttt__mini_batch=b, seconds=[0.1])
    by_mini_batch([str(tmp_path)], [tmp_path / "a.svg"], published=True)
    said = words(tmp_path / "a.svg")
    for text, times in {
        "Mini-batch size, books/validation, 2k tokens": 1,
        "mini-batch size b of the inner loop, tokens (log scale)": 2,
        "perplexity (log scale)": 1,
        "seconds per training step (median)": 1,
        f"paper: {LINEAR}, 125M, Pile": 1,
        "8": 2,
        "16": 2,
    }.items():
        assert said.count(text) == times, text


def test_the_paper_states_one_point(tmp_path, monkeypatch):
    run(tmp_path / "a", context=2048, model__ttt__mini_batch=1)
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, *outputs: figures.append(figure))
    by_mini_batch([str(tmp_path)], [tmp_path / "x.png"], published=True)
    plt.close(figures[0])
    assert lines(figures[0].axes[0])[f"paper: {LINEAR}, 125M, Pile"] == [(16, 11.09)]


@pytest.mark.parametrize("settings", [{"model__mixer": "ttt_mlp", "context": 2048}, {"context": 1024}])
def test_where_the_paper_states_nothing(tmp_path, settings):
    run(tmp_path / "a", **settings)
    with pytest.raises(ConfigError, match="--published: the paper states the perplexity of TTT-Linear"):
        by_mini_batch([str(tmp_path)], [tmp_path / "x.png"], published=True)


def test_attention_has_no_mini_batches(tmp_path):
    run(tmp_path / "a", model__mixer="attention")
    with pytest.raises(ConfigError, match="a: Transformer has no mini-batches; expected a TTT layer"):
        by_mini_batch([str(tmp_path)], [tmp_path / "x.png"])
