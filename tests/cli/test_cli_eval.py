"""Check the output of ``ttt eval compare`` on made-up evaluations."""

import argparse
import io
import sys

import matplotlib.pyplot as plt
import pytest
from saved_runs import run

from ttt_jax import cli
from ttt_jax.cli import eval
from ttt_jax.evaluation import evaluations
from ttt_jax.figures import style


@pytest.fixture
def compared(capsys):
    """Return ``compared(*runs)``: the lines that ``ttt eval compare`` prints."""

    def compare(*runs):
        parser = argparse.ArgumentParser()
        eval.add_compare_arguments(parser)
        assert eval.compare(parser.parse_args([str(each) for each in runs])) == 0
        return capsys.readouterr().out.splitlines()

    return compare


def cells(lines, first):
    """Return the cells of the row that begins with a text."""
    [row] = [line for line in lines if line.split("│")[1:2] and line.split("│")[1].strip() == first]
    return [cell.strip() for cell in row.split("│")[1:-1]]


def test_losses_that_are_not_finite(tmp_path, compared):
    good, bad, base = (
        run(tmp_path / name, noise=i, bad=at)
        for i, (name, at) in enumerate([("good", ()), ("bad", [(2, 5), (3, 60)]), ("base", ())])
    )
    lines = compared(base, bad, good)
    assert cells(lines, "all")[2] == "not finite"
    assert cells(lines, "5 - 8")[2] == cells(lines, "33 - 64")[2] == "not finite"
    assert " +- " in cells(lines, "9 - 16")[2]
    assert all(" +- " in cells(lines, name)[3] for name in ("all", "5 - 8", "33 - 64"))
    assert lines[-1] == "bad: 2 of 378 tokens have a loss that is NaN or infinite"
    lines = compared(bad, good)
    assert cells(lines, "all") == ["all", "not finite", "not finite"]
    assert cells(lines, "9 - 16")[1] != "not finite"


def test_runs_of_one_name_in_different_folders_are_told_apart(tmp_path, compared):
    runs = [run(tmp_path / folder / "run", noise=i, perplexity=10.0 + i) for i, folder in enumerate("ab")]
    lines = compared(*runs)
    assert lines[0].startswith("Loss minus that of a/run (")
    [header] = [line for line in lines if "positions" in line]
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == ["positions", "a/run", "b/run"]
    assert cells(lines, "all")[1:] == ["2.3026", cells(lines, "all")[2]]
    assert cells(lines, "all")[2].startswith("+0.0953 +- ")


def test_errors_of_a_full_disk_name_the_file(tmp_path):
    tables = [tmp_path / name for name in ("a.csv", "a.svg", "run.csv")]
    for path in (*tables[:2], tmp_path / "run.csv.tmp"):  # a result is written beside its name first
        path.symlink_to("/dev/full")
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    made = evaluations.read_all([run(tmp_path / "run")], "validation")
    writes = (
        lambda: eval._write_table(tables[0], made),
        lambda: style.save(figure, tables[1]),
        lambda: evaluations.save(made[0], tmp_path, "run"),
    )
    for write, path in zip(writes, tables, strict=True):
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write()


def test_names_that_a_terminal_cannot_show_are_spelled_out(tmp_path, monkeypatch):
    runs = [str(run(tmp_path / name)) for name in ("\u00fcn\u2603", "b")]
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert cli.main(["eval", "compare", *runs]) == 0
        assert terminal.buffer.getvalue().startswith(rb"Loss minus that of \xfcn\u2603 (")
    assert style.literal("a\udcff") == r"a\udcff"
