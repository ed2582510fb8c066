"""Train a tiny model by commands, evaluate it, compare it, draw it, and time its training step."""

import contextlib
import csv
import io
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from matplotlib import image
from tiny_run import TINY, ttt

from ttt_jax.training import metrics


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Return the workdir of a run of four steps, which tests must not change, and what ``ttt train`` printed."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert ttt("train", "--workdir", workdir, *TINY) == 0
    return workdir, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def trained(training):
    return training[0]


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """Return a copy of the run, evaluated, and what ``ttt eval`` printed."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained, workdir)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert ttt("eval", "--workdir", workdir, "--context", 48, "--max-windows", 5) == 0
    return workdir, out.getvalue()


def test_train_leaves_a_run(trained):
    assert json.loads((trained / "config.json").read_text())["model"]["width"] == 8
    records = metrics.read(trained)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["tokens"] for record in records] == [64, 128, 192, 256]
    assert records[0]["loss"] == pytest.approx(math.log(258), abs=0.05)


def test_train_reports_its_steps(training):
    workdir, out, err = training
    loss = metrics.read(workdir)[-1]["loss"]
    assert out == f"{workdir}: 4 steps done, loss {loss:.4f}\n"
    lines = err.splitlines()
    compiling = lines.index("compiling the training step ...")
    assert re.fullmatch(r"compiled in \d+\.\d s", lines[compiling + 1])
    assert lines[-1].startswith(f"step 4/4  loss {loss:.4f}")


def test_train_says_that_all_steps_are_done(trained, capsys):
    before = (trained / "metrics.jsonl").read_bytes()
    assert ttt("train", "--workdir", trained, *TINY) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{trained}: all 4 steps are done already;")
    assert "--config.training.duration" in out
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_train_in_the_workdir_of_another_config_is_refused(trained, refused):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    message = refused("train", "--workdir", trained, *TINY, "--config.model.width=16", "--config.log.every=2")
    assert "model.width 8 there, 16 here" in message
    assert "log.every" not in message  # which may change
    assert "expected a new workdir" in message
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_eval_writes_three_files_that_agree(evaluated):
    evaluated, printed = evaluated
    files = {path.suffix: path for path in (evaluated / "eval").iterdir()}
    assert {path.stem for path in files.values()} == {"validation-48"}
    assert files.keys() == {".npz", ".csv", ".json"}

    with np.load(files[".npz"], allow_pickle=False) as arrays:
        table = dict(arrays)
    with files[".csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48
    for column in ("position", "loss", "standard_error", "count"):
        assert table[column].shape == (48,)
        np.testing.assert_array_equal([float(row[column]) for row in rows], table[column])
    np.testing.assert_array_equal(table["position"], np.arange(1, 49))
    assert (table["count"] <= 5).all()

    about = json.loads(files[".json"].read_text())
    assert about["perplexity"] == pytest.approx(math.exp(about["loss"]), rel=1e-12)
    assert about["tokens"] == table["count"].sum()
    assert about["loss"] == pytest.approx((table["loss"] * table["count"]).sum() / table["count"].sum(), rel=1e-12)
    assert about["loss"] == pytest.approx(math.log(258), abs=0.2)  # four steps are no training
    assert 0 < about["loss_standard_error"] < 0.1
    expected = {"model": "Transformer", "step": 4, "split": "validation", "context": 48, "windows": 5}
    assert about.items() >= expected.items()
    assert (about["source"], about["workdir"]) == ("embedded/validation", "run")

    assert f"loss {about['loss']:.4f} +- {about['loss_standard_error']:.4f}" in printed
    assert f"perplexity {about['perplexity']:.4f}" in printed
    assert str(files[".npz"]) in printed


@pytest.mark.slow
def test_eval_of_several_runs_and_their_comparison(trained, tmp_path, capsys, refused):
    runs = [tmp_path / name for name in ("first", "second")]
    for workdir in runs:
        shutil.copytree(trained, workdir)
    shutil.rmtree(runs[1] / "checkpoints" / "4")  # leaves that of step 2
    table = tmp_path / "all.csv"
    few = ["--by-document", "--max-windows", 3, "--split", "test"]
    assert ttt("eval", "--workdir", *runs, "--context", "20,40", *few, "--csv", table) == 0
    printed = capsys.readouterr().out
    assert printed.count("3 documents of up to") == 4
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for run in runs:
        for context in (20, 40):
            about = json.loads((run / f"eval/test-documents-{context}.json").read_text())
            found[run.name, context] = about["loss"]
            of_it = [row for row in rows if (row["workdir"], row["context"]) == (run.name, str(context))]
            assert sum(int(row["bin_count"]) for row in of_it) == about["tokens"]
            total = sum(float(row["bin_loss"]) * int(row["bin_count"]) for row in of_it if int(row["bin_count"]))
            assert total / about["tokens"] == pytest.approx(about["loss"], rel=1e-9)
    assert len({*found.values()}) == 4

    compare = ["eval", "compare", *runs, "--split", "test", "--by-document"]
    assert ttt(*compare) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "Loss minus that of first (Transformer), nats per token, +- standard error",
        "embedded/test, 3 documents of up to 40 tokens; errors over 3 documents",
    ]
    [overall] = [line for line in lines if re.search(r"\ball\b", line)]
    first, difference = found["first", 40], found["second", 40] - found["first", 40]
    assert re.search(rf"{first:.4f}.*{re.escape(f'{difference:+.4f}')} \+- 0\.\d{{4}}", overall)
    positions = [match[1] for line in lines if (match := re.search(r"([\d]+ - \d+)", line))]
    assert positions == ["1 - 1", "2 - 2", "3 - 4", "5 - 8", "9 - 16", "17 - 32", "33 - 40"]
    assert refused(*compare[:3], *compare[4:]).endswith(f"{runs[0]}: alone; expected two workdirs or more")


def test_eval_of_missing_things_is_refused(trained, refused, tmp_path):
    evaluate = ["eval", "--workdir", trained, "--context", 48]
    assert refused(*evaluate, "--step", 3) == (
        f"--step 3: no such checkpoint in {trained}; expected newest, best, all or some of 2, 4"
    )
    assert refused(*evaluate, "--step", "best") == (
        f"--step best: {trained} was trained without evaluation.every; expected newest, all or steps"
    )
    message = refused(*evaluate, "--split", "dev")
    assert all(word in message for word in ("--split", "dev", "train", "validation", "test"))
    assert refused(*evaluate, "--context", 10**8).startswith("--context 100000000: embedded/validation has ")
    assert refused(*evaluate, "--source", "wikipedia").startswith("--source 'wikipedia': no such folder; expected ")
    assert refused(*evaluate, "--csv", tmp_path) == f"--csv {tmp_path}: is a folder; expected a file"
    assert refused(*evaluate, "--chains", 3) == "--chains 3: expected --carry-state with it"
    message = refused("eval", "--workdir", trained, tmp_path)
    assert message == f"{tmp_path}/config.json: not found; expected the workdir of a run, with its config.json"

    without_checkpoint = tmp_path / "run"
    without_checkpoint.mkdir()
    shutil.copy(trained / "config.json", without_checkpoint)
    message = refused("eval", "--workdir", without_checkpoint)
    assert message == f"--workdir {without_checkpoint}: holds no checkpoint yet"
    assert refused("eval", "--workdir", trained, without_checkpoint) == message
    assert [path.name for path in without_checkpoint.iterdir()] == ["config.json"]
    assert not (trained / "eval").exists()


@pytest.mark.slow
def test_eval_of_an_earlier_step_is_another_model(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert ttt("eval", "--workdir", tmp_path / "run", "--context", 48, "--max-windows", 5, "--step", "2,4") == 0
    losses = {}
    for step in (2, 4):
        about = json.loads((tmp_path / f"run/eval/validation-48-at-{step}.json").read_text())
        assert about["step"] == step
        losses[step] = about["loss"]
    assert losses[2] != losses[4]


def test_plot_draws_a_picture(evaluated, tmp_path, capsys):
    evaluated, _ = evaluated
    picture, drawing = tmp_path / "pictures" / "a.png", tmp_path / "pictures" / "a.svg"
    for output in (picture, drawing):
        assert ttt("plot", "loss-by-position", evaluated, "--output", output) == 0
        assert capsys.readouterr().out == f"{output}\n"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(picture)
    assert pixels.shape[:2] == (736, 1152)
    assert 0.01 < (pixels[..., :3] < 0.6).any(-1).mean() < 0.5  # lines and words, without the light bands of errors

    loss = json.loads((evaluated / "eval/validation-48.json").read_text())["loss"]
    words = drawing.read_text()
    for text in (
        "token index in the sequence (log scale)",
        "loss (nats per token)",
        "embedded/validation, 5 windows of 48 tokens",
    ):
        assert f"<!-- {text}" in words or f", {text} -->" in words
    parameters = 258 * 8 + 4 * 8 * 8 + 3 * 8 * 8 + 3 * 8  # embedding, attention, feed-forward, norms
    assert f"<!-- Transformer, {parameters / 1e3:.2g} k parameters: mean {loss:.3f} -->" in words


@pytest.mark.slow
def test_bench_prints_json(capsys):
    assert ttt("bench", "step", *TINY, "--json", "--repeats", 2, "--warmup", 1) == 0
    out = json.loads(capsys.readouterr().out)
    numbers = {key: value for key, value in out.items() if isinstance(value, int | float)}
    assert {"step_seconds", "tokens_per_second", "model_flops_per_second", "matmul_ratio"} < numbers.keys()
    assert all(value > 0 and math.isfinite(value) for value in numbers.values())
    assert len(out["step_seconds_all"]) == 2
    assert (out["model"], out["jax"]) == ("Transformer", jax.__version__)
