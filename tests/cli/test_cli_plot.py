"""Run ``ttt plot``: a file of each kind."""

import numpy as np
import pytest
from matplotlib import image
from saved_runs import run, save_inspection
from tiny_run import ttt


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder of evaluated runs: two sizes of the inner mini-batch, at two contexts; one is inspected, too."""
    folder = tmp_path_factory.mktemp("runs")
    for b in (1, 16):
        for context in (32, 64):
            place = folder / f"b{b}" / f"{context}"
            run(place, context=context, model__ttt__mini_batch=b, perplexity=10 - context / 50)
    save_inspection(folder / "b1" / "32", {f"loss_{x}": np.ones((2, 32)) for x in ("at_w0", "before", "after")})
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "flops b1",
        *(
            pytest.param(command, marks=pytest.mark.slow)
            for command in (
                "loss-by-position b1/32 b16/32",
                "context b16",
                "mini-batch b1/32 b16/32",
                "inner-loss b1/32 --layers 0-1",
            )
        ),
    ],
)
def test_a_picture_is_named_after_its_kind(runs, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    kind, *options = command.split()
    assert ttt("plot", kind, *(runs / each if each.startswith("b") else each for each in options)) == 0
    assert capsys.readouterr().out == f"{kind}.png\n"
    pixels = image.imread(tmp_path / f"{kind}.png")[..., :3]
    assert 0.01 < (pixels < 0.9).any(-1).mean() < 0.5  # ink on paper


def test_a_table_is_printed_and_written(runs, tmp_path, capsys):
    tables = [tmp_path / "t" / name for name in ("a.tex", "a.csv")]
    outputs = [each for table in tables for each in ("--output", table)]
    assert ttt("plot", "table", runs / "b1/32", runs / "b16/32", *outputs) == 0
    out = capsys.readouterr().out
    assert "+ mini_batch=16" in out
    assert out.endswith("{}\n{}\n".format(*tables))
    assert "tabular" in tables[0].read_text()
