"""Check that tables and figures show names and values unchanged, with any characters."""

import argparse
import html
import io
import json
import math
import shlex
import sys

import matplotlib.pyplot as plt
import pytest
from saved_runs import run, words

from ttt_jax.cli import eval, harness
from ttt_jax.config import ConfigError
from ttt_jax.evaluation import evaluations
from ttt_jax.evaluation.probes import cells as cells_lib
from ttt_jax.figures import ablation, heat_map, points, style, sweep_metric
from ttt_jax.figures.by_position import loss_by_position
from ttt_jax.figures.perplexity import perplexity_by_flops
from ttt_jax.sweep import files, results, status
from ttt_jax.sweep.files import Record, Sweep
from ttt_jax.sweep.points import Point
from ttt_jax.terminal import console
from ttt_jax.terminal.console import StatusLine

NAMES = [
    *("trial[a]", "[bold]x", "[", "a]b[0]", ":warning:", "$x$", "a$", "$5 and $6", r"back\slash", r"a\$b", "~me"),
    *("it's", 'say "x"', "_hidden", "__x", "two words", "naïve µ", "100%", "{x}", "a&b", "x^2", "#1"),
]
VALUES = [*NAMES, "[/v1]", "/d[/v1]/e", "[/]", "<b>"]


def rendered(table) -> str:
    output = console.literal(file=io.StringIO(), width=1000)
    output.print(table)
    return output.file.getvalue()


def drawn(path) -> list[str]:
    """Return the texts of an SVG figure as they are displayed."""
    return [html.unescape(word).replace("\u200b", "") for word in words(path)]


def swept(folder):
    """Return a finished sweep over data.source with a point for each value."""
    found = []
    for i, value in enumerate(VALUES):
        (folder / f"p{i}").mkdir(parents=True)
        (folder / f"p{i}" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0 + i}) + "\n")
        (folder / f"p{i}" / "config.json").write_text(json.dumps({"seed": 0, "data": {"source": value}}))
        files.write_record(folder / f"p{i}", Record("done", 1))
        found.append(Point(f"p{i}", "x.py", {"data.source": value}, 1))
    files.write_sweep(folder, Sweep({}, found))
    return results.of_sweep(folder, "loss")


def test_tables_of_sweeps(tmp_path):
    found = swept(tmp_path)
    ranking = rendered(results.table(found, "loss"))
    dry_run = rendered(status.table_of_points([each.standing.point for each in found.results], found.keys))
    standings = [status.Standing(Point(name, "x.py", {}, 1), "failed", note=f"because of {name}") for name in VALUES]
    states = rendered(status.table(standings))
    for value in VALUES:
        assert any(f" {value} " in line for line in ranking.splitlines())
        assert any(f" {value} " in line for line in dry_run.splitlines())
        assert any(f" {value} " in line and f"because of {value}" in line for line in states.splitlines())


@pytest.mark.slow
def test_figures_of_sweeps(tmp_path):
    found = swept(tmp_path)
    sweep_metric.against(found, "the_pile[$a$]-loss", tmp_path / "ticks.svg", x="data.source")
    assert set(VALUES) < set(drawn(tmp_path / "ticks.svg"))
    assert "the_pile[$a$]-loss" in drawn(tmp_path / "ticks.svg")
    sweep_metric.against(found, "loss", tmp_path / "legend.svg", x="seed", lines="data.source")
    assert {f"source {value}" for value in VALUES} < set(drawn(tmp_path / "legend.svg"))
    recipes = found._replace(
        keys=["config"],
        results=[each._replace(config=each.config | {"config": each.config["data.source"]}) for each in found.results],
    )
    sweep_metric.against(recipes, "loss", tmp_path / "recipes.svg", x="seed", lines="config")
    assert set(VALUES) < set(drawn(tmp_path / "recipes.svg"))


@pytest.fixture
def named(tmp_path):
    """Return evaluated runs whose folders have these names."""
    return [run(tmp_path / "runs" / name, noise=i, perplexity=9.0 + i / 10) for i, name in enumerate(NAMES)]


@pytest.mark.slow
def test_comparisons(named, capsys):
    parser = argparse.ArgumentParser()
    eval.add_compare_arguments(parser)
    assert eval.compare(parser.parse_args([str(each) for each in named])) == 0
    [header] = [line for line in capsys.readouterr().out.splitlines() if "positions" in line]
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == ["positions", *NAMES]


@pytest.mark.slow
def test_figures_of_runs(named, tmp_path):
    loss_by_position(named, [tmp_path / "a.svg"], against=named[0])
    said = drawn(tmp_path / "a.svg")
    for name in NAMES:
        assert any(f"parameters, {name}: mean " in line for line in said), name


def test_sources_in_titles(tmp_path):
    source = r"_my $x$ [a] \$y"
    place = run(tmp_path / "a", about={"source": source})
    loss_by_position([place], [tmp_path / "a.svg"])
    assert f"Loss by token index, {source}, 6 windows of 64 tokens" in " ".join(drawn(tmp_path / "a.svg"))
    perplexity_by_flops([str(place)], [tmp_path / "b.svg"])
    assert f"{source}, 64 tokens" in drawn(tmp_path / "b.svg")


def test_runs_that_are_not_finite(tmp_path):
    places = [run(tmp_path / "$a$[b]", bad=[(1, 2)]), run(tmp_path / "b", flops=1e16)]
    perplexity_by_flops([str(place) for place in places], [tmp_path / "a.svg"])
    assert "not finite: $a$[b]" in drawn(tmp_path / "a.svg")


def test_ablation_tables(tmp_path):
    rows = [ablation.Row(f"source={value}", 2.0, None, None, None, None, None) for value in VALUES]
    text, latex = ablation.as_text(rows, ".txt"), ablation.as_latex(rows)
    for value in VALUES:
        assert f"source={value}" in text
    for name, escaped in {
        r"a\$b": r"a\textbackslash{}\$b",
        "~me": r"\textasciitilde{}me",
        "x^2": r"x\textasciicircum{}2",
        "{x}": r"\{x\}",
        "trial[a]": "trial{[}a{]}",
        "_hidden": r"\_hidden",
    }.items():
        assert f"source={name}" in text
        assert f"source={escaped} & 2.000" in latex


def test_tables_of_probes_and_of_the_harness(capsys):
    for name in VALUES:
        cells = [{"context": 8, "depth": name, "accuracy": 0.5}]
        cells_lib.show(cells, f"run {name}", "depth", str, ["accuracy"], f"of {name}")
        out = capsys.readouterr().out
        assert f"run {name}\n" in out
        assert f"of {name}\n" in out
        assert f" {name} " in out
        about = {"documents": None, "num_fewshot": 0, "metrics": {name: {"value": 1.0, "standard_error": None}}}
        assert rendered(harness._table({name: about})).count(name) >= 2


@pytest.mark.slow
def test_heat_maps(tmp_path):
    panels = [heat_map.Panel(f"{name}\nmore", [name], ["8"], [[0.5]], 0, name) for name in NAMES[:14]]
    heat_map.save([panels], tmp_path / "a.svg", "share")
    said = drawn(tmp_path / "a.svg")
    for name in NAMES[:14]:
        assert said.count(name) >= 3  # title, row, beside the rows


def test_the_live_line(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    line = StatusLine(9, text="starts")
    try:
        for name in VALUES:
            line.show(1, name)
            [task] = line._bar.tasks
            assert line._bar.columns[0].render(task).plain == name
    finally:
        line.close()


def test_commands_to_type_are_quoted(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError) as error:
            evaluations.read(tmp_path / name, "test", 64)
        typed = shlex.split(str(error.value).partition("run: ")[2])
        assert typed[:4] == ["ttt", "eval", "--workdir", str(tmp_path / name)]


@pytest.mark.slow
def test_evaluations_are_found(named):
    for place in named:
        assert evaluations.read(place, "validation").about["workdir"] == place.name
    found = points.of_places([str(named[0].parent)], "validation")
    assert sorted(point.about["workdir"] for point in found) == sorted(NAMES)
    assert math.isfinite(points.loss_of(found[0]))


def test_labels_are_in_legends():
    figure, axes = plt.subplots()
    for name in NAMES:
        axes.plot([1], [1], label=style.literal(name))
    style.legend_below(figure)
    assert len(figure.legends[0].get_texts()) == len(NAMES)
    plt.close(figure)
