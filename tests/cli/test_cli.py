"""The command, as a person types it: help, refusals, and one tiny model from training to a picture."""

import contextlib
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import image

from ttt_jax import __version__, cli
from ttt_jax import config as config_lib
from ttt_jax.training import metrics

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")
TINY = [
    *("--config", f"{QUICKSTART}:attention"),
    *"--config.model.width=8 --config.model.num_heads=2 --config.model.num_layers=1 --config.model.mlp_width=8".split(),
    *"--config.data.sequence_length=32 --config.data.batch_size=2 --config.training.duration=4".split(),
]


def ttt(*arguments) -> int:
    """The exit status of a command."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        return end.code


@pytest.fixture
def refused(capsys, monkeypatch):
    """``refused(*arguments)``: the one line that tells why, of a command that compiled nothing."""

    def must_not_compile(*args, **options):
        raise AssertionError("compiled before the config was refused")

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(jax.stages.Lowered, "compile", must_not_compile)
            assert ttt(*arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        usage, _, message = printed.err.rpartition(f"ttt {arguments[0]}: " if arguments else "ttt: ")
        assert message.count("\n") == 1
        assert message.endswith("\n")
        assert "Traceback" not in printed.err
        assert usage == "" or usage.startswith("usage: ttt ")
        return message.strip()

    return run


# ---- Without a model


def test_help_and_refusals_load_little(in_one_process):
    """Keys of configs are those of mixers too, which load JAX; all else is what a person would wait for in vain."""
    in_one_process(["--help", "eval --help", "plot --help", "--version", "trian", "train --workdir x --config"])
    printed = in_one_process(
        [
            *("--help", "train --help", "eval --help", "plot --help", "plot loss-by-position --help", "bench --help"),
            *("--version", "trian", "train --workdir x"),
            f"train --workdir x --config {QUICKSTART} --config.model.widht=3",
            f"bench step --config {QUICKSTART} --config.model.num_heads=3",
            *(SHOWN := [f"config --config {QUICKSTART}", f"train --help --config {QUICKSTART}"]),
        ],
        unwanted=("matplotlib", "orbax", "grain", "tensorstore"),
    )
    outputs = {command: out for command, (status, out, err) in printed.items() if (status, err) == (0, "")}
    assert outputs.keys() == {c for c in printed if "--help" in c or "--version" in c or c in SHOWN}
    assert outputs["--version"] == f"ttt_jax {__version__}\n"
    for text in ("train ", "eval ", "plot ", "bench ", "ttt train --help", "exit status:", "ttt eval --workdir runs/a"):
        assert text in outputs["--help"]
    for text in ("--workdir DIR", "--config FILE[:ARG]", "config.json", "metrics.jsonl", "checkpoints/"):
        assert text in outputs["train --help"]
    for verb in ("train", "bench"):
        for key, each in config_lib.settings().items():
            default = "unset" if each.default is None else json.dumps(each.default)
            lines = [x for x in outputs[f"{verb} --help"].splitlines() if x.startswith(f"  --config.{key}={default}")]
            assert len(lines) == 1
            assert lines[0].endswith(each.meaning)
    for option in ("--workdir", "--context", "--split", "--max-windows", "--step", "--batch-size", "SPLIT-T.npz"):
        assert option in outputs["eval --help"]
    for kind in ("loss-by-position", "flops", "context", "mini-batch", "inner-loss", "table", "ttt plot flops --help"):
        assert kind in outputs["plot --help"]
    for option in ("--output", "--split", "--context", "--by-document", "--against", ".svg", "ttt eval"):
        assert option in outputs["plot loss-by-position --help"]
    for option in ("bench step", "--repeats", "--warmup", "--json", "matrix products"):
        assert option in outputs["bench --help"]

    errors = {command: err for command, (status, out, err) in printed.items() if (status, out) == (2, "")}
    assert errors.keys() == printed.keys() - outputs.keys()
    assert "'trian'" in errors["trian"].splitlines()[-1]
    assert all(f"'{verb}'" in errors["trian"] for verb in ("train", "eval", "plot", "bench"))
    assert errors["train --workdir x"].startswith("ttt train: --config: missing;")
    one_line = [err for command, err in errors.items() if command != "trian"]
    assert all(err.count("\n") == 1 for err in one_line)


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "ttt_jax", "train", "--workdir", "x", "--config", "nowhere.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    message = "ttt train: --config nowhere.py: no such file; expected a Python file with get_config()\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert not list(tmp_path.iterdir())


def test_a_verb_is_needed(refused):
    assert "required: VERB" in refused()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "error: the following arguments are required: --config, --workdir"),
        ("train --config.seed=1", "error: the following arguments are required: --config, --workdir"),
        ("train --config x", "error: the following arguments are required: --workdir"),
        ("plan", "error: the following arguments are required: --config, --topology"),
        ("config", "--config: missing; expected a config file, such as --config configs/quickstart.py"),
        ("config --config nowhere.py", "--config nowhere.py: no such file; expected a Python file with get_config()"),
        (f"config --config {QUICKSTART} --config.seed=x", "seed=x: expected an integer"),
        ("train --workdir x", "--config: missing; expected a config file, such as --config configs/quickstart.py"),
        ("eval --workdir x --bogus", "error: unexpected argument: --bogus"),
        ("eval --workdir x --split test stray", "error: unexpected argument: stray"),
        ("eval --work x", "error: the following arguments are required: --workdir"),  # no abbreviations
        ("eval --workdir x", "x/config.json: not found; expected the workdir of a run, with its config.json"),
        ("plot", "error: the following arguments are required: KIND"),
        (
            "plot loss-by-position x --output x.txt",
            "--output x.txt: expected a name that ends in .png, .pdf or .svg",
        ),
        (
            "plot loss-by-position x --context 64",
            "x: no such folder; expected the workdir of a run",
        ),
        ("bench step", "--config: missing; expected a config file, such as --config configs/quickstart.py"),
        (f"bench step --config {QUICKSTART} stray", "'stray': unexpected argument; expected --config.KEY=VALUE"),
    ],
)
def test_refused(refused, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert refused(*arguments.split()) == message
    assert not list(tmp_path.iterdir())


def test_a_kind_of_plot_or_benchmark_that_does_not_exist(refused):
    assert "'histogram'" in refused("plot", "histogram", "x")
    assert "'inference'" in refused("bench", "inference")


@pytest.mark.parametrize(
    "arguments",
    [
        "eval --workdir x --context 0",
        "eval --workdir x --max-windows -1",
        "eval --workdir x --batch-size 0",
        "bench step --repeats 0",
    ],
)
def test_numbers_below_one(refused, arguments):
    message = refused(*arguments.split())
    assert message.startswith(f"error: argument {arguments.split()[-2]}: ")
    assert message.endswith(("expected 1 or more", "expected integers from 1, such as 2048 or 2k,8k"))


def test_a_number_that_is_none(refused):
    message = refused("eval", "--workdir", "x", "--context", "long")
    assert "--context" in message
    assert "'long'" in message
    assert "_" not in message


def test_refused_before_anything_is_compiled(refused, tmp_path):
    """Refuse what only devices, data or the model can tell."""
    workdir = tmp_path / "run"
    train = ["train", "--workdir", workdir, *TINY]
    assert refused(*train, "--config.mesh.tensor=2").startswith(
        "mesh.data=-1, mesh.fsdp=1, mesh.tensor=2: does not fit 1"
    )
    assert refused(*train, "--config.model.vocab_size=256").startswith("model.vocab_size=256: embedded/train has 257")
    assert refused(*train, "--config.data.sequence_length=100000000").startswith("data.sequence_length=100000000: ")
    assert refused(*train, "--config.data.source=wikipedia") == (
        "data.source='wikipedia': no such folder; expected embedded, synthetic, associative_recall, "
        "selective_copying, or the path or URL of a folder made by ttt tokenize, of one with train.npy, or of a zarr "
        "group with train"
    )
    assert refused("bench", "step", *TINY, "--config.mesh.data=3").startswith("mesh.data=3, ")
    assert not workdir.exists()


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_workdir_that_is_a_file(refused, tmp_path, verb):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert "notes.txt" in refused(verb, "--workdir", path, *(TINY if verb == "train" else ()))
    assert path.read_text() == "mine"


def test_bench_with_a_negative_warmup(refused):
    assert "--warmup" in refused("bench", "step", *TINY, "--warmup", "-1")


# ---- From training to a picture


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run of four steps; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert ttt("train", "--workdir", workdir, *TINY) == 0
    return workdir


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A copy of that run and what ``ttt eval`` printed of it."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained, workdir)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert ttt("eval", "--workdir", workdir, "--context", 48, "--max-windows", 5) == 0
    return workdir, out.getvalue()


def test_train_leaves_a_run(trained, capsys):
    assert json.loads((trained / "config.json").read_text())["model"]["width"] == 8
    records = metrics.read(trained)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["tokens"] for record in records] == [64, 128, 192, 256]
    assert records[0]["loss"] == pytest.approx(math.log(258), abs=0.05)


def test_train_says_what_it_did_and_then_that_all_is_done(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert ttt("train", "--workdir", workdir, *TINY) == 0
    loss = metrics.read(workdir)[-1]["loss"]
    printed = capsys.readouterr()
    assert printed.out == f"{workdir}: 4 steps done, loss {loss:.4f}\n"
    lines = printed.err.splitlines()
    compiling = lines.index("compiling the training step ...")
    assert re.fullmatch(r"compiled in \d+\.\d s", lines[compiling + 1])
    assert lines[-1].startswith(f"step 4/4  loss {loss:.4f}")

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


def test_eval_of_several_at_once_and_how_they_differ(trained, tmp_path, capsys, refused):
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


def test_eval_of_what_is_not_there(trained, refused, tmp_path):
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


def test_eval_of_an_earlier_step_is_another_model(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    losses = {}
    for step in (2, 4):
        assert ttt("eval", "--workdir", tmp_path / "run", "--context", 48, "--max-windows", 5, "--step", step) == 0
        about = json.loads((tmp_path / f"run/eval/validation-48-at-{step}.json").read_text())
        assert about["step"] == step
        losses[step] = about["loss"]
    assert losses[2] != losses[4]


def test_plot(evaluated, tmp_path, capsys):
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


def test_bench_prints_json(capsys):
    assert ttt("bench", "step", *TINY, "--json", "--repeats", 2, "--warmup", 1) == 0
    out = json.loads(capsys.readouterr().out)
    numbers = {key: value for key, value in out.items() if isinstance(value, int | float)}
    assert {"step_seconds", "tokens_per_second", "model_flops_per_second", "matmul_ratio"} < numbers.keys()
    assert all(value > 0 and math.isfinite(value) for value in numbers.values())
    assert len(out["step_seconds_all"]) == 2
    assert (out["model"], out["jax"]) == ("Transformer", jax.__version__)
