"""Check figures and tables of runs whose losses are NaN, infinite, or too large for their exponential."""

import json

import numpy as np
import pytest
from rich.console import Console
from saved_runs import run

from ttt_jax.evaluation import result_files
from ttt_jax.figures import ablation
from ttt_jax.figures.by_position import loss_by_position
from ttt_jax.figures.perplexity import by_mini_batch, perplexity_by_context, perplexity_by_flops

NAN = [(2, 5)]  # the loss of window 2 at position 5
KINDS = {
    "flops": (perplexity_by_flops, "flops", [1e15, 4e15, 9e15]),
    "context": (perplexity_by_context, "context", [64, 128, 256]),
    "mini-batch": (by_mini_batch, "model__ttt__mini_batch", [4, 8, 16]),
}


@pytest.fixture
def figure(drawn):
    """Return ``figure(draw, places, ...)``: the figure, laid out as for a file."""

    def draw(function, places, **options):
        function([str(place) for place in places], [], **options)
        drawn[-1].draw_without_rendering()
        return drawn[-1]

    return draw


def texts(axes):
    return [text.get_text() for text in axes.texts]


def overflowing(workdir):
    """Set the loss of an evaluation to 800 and its perplexity to null, without the hash of its arrays."""
    [path] = (workdir / "eval").glob("*.json")
    path.write_text(json.dumps({**result_files.about(path), "loss": 800.0, "perplexity": None}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_and_a_note(tmp_path, figure, kind):
    draw, key, values = KINDS[kind]
    for i, value in enumerate(values):
        run(tmp_path / "runs" / f"r{i}", perplexity=10.0 + i, **{key: value}, noise=i, bad=NAN if i == 1 else ())
    axes = figure(draw, [tmp_path / "runs"]).axes[0]
    assert texts(axes) == ["not finite: r1"]
    ys = axes.lines[0].get_ydata()
    np.testing.assert_allclose(ys, [10.0, np.nan, 12.0])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_finite(tmp_path, figure, kind):
    draw, key, values = KINDS[kind]
    places = [run(tmp_path / f"r{i}", **{key: value}, bad=NAN) for i, value in enumerate(values)]
    overflowing(places[0])
    assert texts(figure(draw, places).axes[0]) == ["not finite: r0, r1, r2"]


@pytest.mark.parametrize("perplexity", [False, True])
def test_loss_by_position(tmp_path, figure, perplexity):
    good, bad = run(tmp_path / "good"), run(tmp_path / "bad", noise=1, bad=NAN)
    drawn = figure(loss_by_position, [good, bad], against=good, perplexity=perplexity)
    labels = drawn.axes[0].get_legend_handles_labels()[1]
    assert labels[1].endswith("bad: not finite, 1 of 378 tokens have a loss that is NaN or infinite")
    curves = [line.get_ydata() for line in drawn.axes[0].lines if line.get_linestyle() != "None"]
    assert np.isfinite(curves[0]).all()
    assert np.flatnonzero(np.isnan(curves[1])).tolist() == [4]  # a gap at position 5
    difference = drawn.axes[1].lines[1].get_ydata()
    assert np.isnan(difference).sum() == 1
    figure(loss_by_position, [bad], perplexity=perplexity)


def test_losses_too_large_for_their_exponential(tmp_path, figure):
    large = run(tmp_path / "large")
    path = large / "eval" / "validation-64.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, **{key: arrays[key] + 800 for key in ("loss", "bin_loss", "bin_low", "bin_high")}})
    overflowing(large)
    drawn = figure(loss_by_position, [run(tmp_path / "good"), large], perplexity=True)
    assert drawn.axes[0].get_legend_handles_labels()[1][1].endswith("large: perplexity not finite")


def test_a_table(tmp_path):
    places = [str(run(tmp_path / f"r{i}", noise=i, seed=i, bad=NAN if i == 1 else ())) for i in range(4)]
    rows = ablation.rows(places)
    console = Console(width=100, record=True)
    console.print(ablation.as_table(rows))
    table = [" ".join(line.split()) for line in console.export_text().splitlines()]
    start = next(i for i, line in enumerate(table) if line.startswith("seed=1"))
    assert table[start : start + 2] == ["seed=1 not finite not finite", "seed=2 10.000 not finite"]
    assert table[start + 2].startswith("seed=3 10.000 ")
    assert "±" in table[start + 2]
    assert "seed=1 & not finite & not finite" in ablation.as_latex(rows)
    assert ablation.as_csv(rows).splitlines()[2].startswith("seed=1,nan,nan,,nan,")
    overflowing(tmp_path / "r3")
    rows = ablation.rows(places)
    assert (rows[3].perplexity, rows[3].difference, rows[3].standard_error) == (np.inf, np.inf, None)


def test_a_table_of_one_document_has_no_error(tmp_path):
    places = [run(tmp_path / f"r{i}", noise=i, seed=i) for i in range(2)]
    for place in places:
        path = place / "eval" / "validation-64.json"
        path.write_text(json.dumps({**result_files.about(path), "loss_standard_error": None}))
    assert ablation.rows([str(place) for place in places])[1].standard_error is None
