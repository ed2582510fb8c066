"""Run ``ttt plot``: help, wrong options, and a file of each kind."""

import numpy as np
import pytest
from matplotlib import image
from saved_runs import run, save_inspection

from ttt_jax import cli

REFUSED = {
    "plot": "error: the following arguments are required: KIND",
    "plot flops": "error: the following arguments are required: DIR",
    "plot flops a --bogus": "error: unexpected argument: --bogus",
    "plot flops a --context 2k,x": "error: argument --context: 'x': expected integers from 1, such as 2048 or 2k,8k",
    "plot flops a --output x.tex": "--output x.tex: expected a name that ends in .png, .pdf or .svg",
    "plot flops a --output x.svg --output y": "--output y: expected a name that ends in .png, .pdf or .svg",
    "plot flops a": "a: holds no run; expected a workdir of ttt train, or of ttt sweep",
    "plot context s3://b/x": "--workdir s3://b/x: expected a folder, or gs://bucket/name",
    "plot context a --lines colour": "error: argument --lines: invalid choice: 'colour'",
    "plot mini-batch a": "a: holds no run; expected a workdir of ttt train, or of ttt sweep",
    "plot inner-loss a b": "error: unexpected argument: b",
    "plot inner-loss a --layers 1-x": "error: argument --layers: 'x': expected 0 or more",
    "plot inner-loss a --layers 0,3-1": "error: argument --layers: '3-1': expected the lower number first",
    "plot loss-by-position a --context 1k,2k": "error: argument --context: '1k,2k': expected one integer from 1",
    "plot inner-loss a --window 0": "error: argument --window: '0': expected 1 or more",
    "plot table a --output x.png": "--output x.png: expected a name that ends in .tex, .csv or .txt",
    "plot table a": "a: holds no run; expected a workdir of ttt train, or of ttt sweep",
    "plot loss-by-position a --published": "error: unexpected argument: --published",  # the paper states none
    "plot context a --published": "error: unexpected argument: --published",
    "plot inner-loss a --published": "error: unexpected argument: --published",
}
KINDS = ("loss-by-position", "flops", "context", "mini-batch", "inner-loss", "table")


@pytest.fixture(scope="module")
def answers(in_one_process):
    return in_one_process(
        ["plot --help", *(f"plot {kind} --help" for kind in KINDS), *REFUSED],
        unwanted=("orbax", "grain"),
    )


def test_help(answers):
    assert all(f"  {kind} " in answers["plot --help"][1] for kind in KINDS)
    for kind in KINDS:
        status, out, _ = answers[f"plot {kind} --help"]
        assert status == 0
        for text in ("--output FILE", "--split", ".tex" if kind == "table" else f"(default: {kind}.png)"):
            assert text in out
        assert ("--published" in out) == (kind in ("flops", "mini-batch", "table"))


@pytest.mark.parametrize("command", list(REFUSED))
def test_refused(answers, command):
    status, out, err = answers[command]
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("ttt plot")
    assert last.partition(": ")[2].startswith(REFUSED[command])
    if "error:" not in err:
        assert err.count("\n") == 1


def test_a_file_of_each_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for b in (1, 16):
        for context in (32, 64):
            run(
                tmp_path / f"b{b}" / f"{context}",
                context=context,
                model__ttt__mini_batch=b,
                perplexity=10 - context / 50,
            )
    save_inspection(tmp_path / "b1" / "32", {f"loss_{x}": np.ones((2, 32)) for x in ("at_w0", "before", "after")})
    commands = {
        "loss-by-position b1/32 b16/32": "loss-by-position.png",
        "flops b1": "flops.png",
        "context b16": "context.png",
        "mini-batch b1/32 b16/32": "mini-batch.png",
        "inner-loss b1/32 --layers 0-1": "inner-loss.png",
    }
    for command, file in commands.items():
        assert cli.main(["plot", *command.split()]) == 0
        assert capsys.readouterr().out == f"{file}\n"
        pixels = image.imread(tmp_path / file)[..., :3]
        assert 0.01 < (pixels < 0.9).any(-1).mean() < 0.5, command  # ink on paper
    assert cli.main("plot table b1/32 b16/32 --output t/a.tex --output t/a.csv".split()) == 0
    out = capsys.readouterr().out
    assert "+ mini_batch=16" in out
    assert out.endswith("t/a.tex\nt/a.csv\n")
    assert "tabular" in (tmp_path / "t/a.tex").read_text()
