"""Run every script of scripts/reproduce/ at a tiny scale, and check the commands that it prints for the paper's."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest
from fake_gcs import FakeGCS
from saved_runs import words

from ttt_jax import cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts" / "reproduce").glob("*_*.sh"))
BUCKET = "gs://b/runs"
PAPER = "--scale paper --pile gs://b/pile --books gs://b/books --accelerator v5litepod-256 --zone z --spot"
LINEAR, TRANSFORMER = "TTT-Linear (Mamba backbone)", "Transformer"


@pytest.fixture
def reproduce(tmp_path):
    """Return ``reproduce(script, *options)``, which runs a script with ``ttt`` of this tree and returns its output."""
    (tmp_path / "bin").mkdir()

    def run(script, *options, status=0, ttt='exec python -m ttt_jax "$@"'):
        program = tmp_path / "bin" / "ttt"
        program.write_text(f"#!/bin/sh\n{ttt}\n")
        program.chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
        }
        command = ["bash", str(ROOT / "scripts" / "reproduce" / f"{script}.sh"), *map(str, options)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == status, f"{script}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout if status == 0 else done.stderr

    return run


@pytest.fixture
def reproduce_here(reproduce, tmp_path, monkeypatch):
    """Return a function like ``reproduce`` that runs the commands of ``ttt`` in this process, which saves imports.

    The ``ttt`` that the script finds sends its arguments here, and receives the output and the exit status.
    """
    monkeypatch.chdir(ROOT)  # where the scripts run their commands
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = str(tmp_path / "socket")

    def run(script, *options):
        out = []
        with Listener(place) as listener:

            def bash():
                try:
                    send = f'exec {sys.executable} -I -S {Path(__file__).with_name("ttt_elsewhere.py")} {place} "$@"'
                    out.append(reproduce(script, *options, ttt=send))
                except AssertionError as error:
                    out.append(error)
                with Client(place) as client:
                    client.send(None)

            thread = threading.Thread(target=bash)
            thread.start()
            while True:
                with listener.accept() as connection:
                    arguments = connection.recv()
                    if arguments is None:
                        break
                    text = io.StringIO()
                    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                        status = cli.main(arguments)
                    connection.send((text.getvalue(), status))
            thread.join()
        if isinstance(out[0], AssertionError):
            raise out[0]
        return out[0]

    return run


@pytest.fixture
def empty_bucket(monkeypatch):
    """Let this process use a stand-in for Google Cloud Storage, in which gs://b is empty."""
    import gcsfs

    with FakeGCS() as gcs:
        for name, value in gcs.environment().items():
            monkeypatch.setenv(name, value)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield
        gcsfs.GCSFileSystem.clear_instance_cache()
        assert not gcs.objects


def test_every_figure_and_table_has_a_script():
    figures = [f"figure_{number}" for number in (2, 4, 7, 10, 11, 14, 15, 16)]
    assert sorted(SCRIPTS) == sorted([*figures, "table_1"])
    listed = (ROOT / "docs" / "reproduce.md").read_text()
    assert all(f"{script}.sh" in listed for script in SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_at_the_scale_of_the_paper(reproduce, empty_bucket, capsys, script):
    """Check that commands are printed and not run, that each can be parsed, and that each sweep can be planned."""
    out = reproduce(script, *PAPER.split(), "--bucket", BUCKET)
    commands = [shlex.split(line) for line in out.splitlines()]
    assert all(command[0] == "ttt" for command in commands)
    assert commands[-1][:2] == ["ttt", "plot"]
    points, evaluated = [], []
    for _, *command in commands:
        options, _ = cli.parse(command)
        if options.verb == "sweep":
            assert options.command[:2] == ["launch", "tpu"]
            end = command.index("--")
            assert cli.main([*command[:end], "--dry-run", *command[end:]]) == 0
            trains = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ttt launch")]
            points += [line.rpartition("--workdir ")[2].strip("'") for line in trains]
        elif options.verb == "launch":
            inner, _ = cli.parse(options.command)
            assert inner.verb in ("eval", "inspect")
            assert "v5litepod-8" in command
            evaluated += inner.workdir
    assert points
    # Every run that is evaluated or drawn has been trained.
    drawn = [word for word in commands[-1] if word.startswith(BUCKET)]
    assert drawn
    assert {*evaluated, *drawn} <= set(points)
    assert set(drawn) <= set(evaluated)


def test_rows_of_a_batch_can_be_split_over_the_chips(reproduce):
    out = reproduce("figure_11", *PAPER.split(), "--bucket", BUCKET, "--mixers", "ttt_linear")
    sweeps = [line for line in out.splitlines() if line.startswith("ttt sweep")]
    recipes = {re.search(r"v5litepod-\d+", line)[0]: re.findall(r"paper\.py:(\S+)", line) for line in sweeps}
    assert recipes == {
        "v5litepod-256": [
            *(f"ttt_linear-{size}-books-2k" for size in ("125m", "350m", "760m", "1.3b")),
            *(f"ttt_linear-{size}-books-32k" for size in ("350m", "760m", "1.3b")),
        ],
        "v5litepod-64": ["ttt_linear-125m-books-32k"],
    }


def test_fine_tuned_transformers_are_left_out_with_the_others(reproduce):
    chosen = (*PAPER.split(), "--bucket", BUCKET, "--sizes", "125m", "--mixers")
    assert "paper.py:transformer" not in reproduce("figure_15", *chosen, "ttt_linear")
    assert "paper.py:transformer_finetune-125m-books-8k" in reproduce("figure_15", *chosen, "ttt_linear,transformer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scale large", "--scale large: expected tiny or paper"),
        ("--scale paper", "--bucket: missing; expected where runs live, such as gs://BUCKET/reproduce"),
        ("--scale paper --bucket gs://b", "--accelerator: missing; expected a TPU slice, such as v5litepod-256"),
        ("--scale paper --bucket gs://b --accelerator a", "--zone: missing; expected a zone of Google Cloud"),
        (
            "--scale paper --bucket gs://b --accelerator a --zone z",
            "--pile: missing; expected a dataset of ttt tokenize",
        ),
        ("--scale paper --bucket gs://b --accelerator a --zone z --steps 2", "--steps, --data: expected --scale tiny"),
        ("--scale", "--scale: expected an option and its value; --help lists them"),
        ("--sizes 2m --colour blue", "--colour: no such option; --help lists them"),
    ],
)
def test_wrong_options_are_refused(reproduce, options, message):
    printed = reproduce("figure_10", *options.split(), status=2)
    assert printed.startswith(f"figure_10.sh: {message}")
    assert printed.count("\n") == 1


def test_help_lists_the_options(reproduce):
    out = reproduce("table_1", "--help")
    for text in ("--scale tiny", "--bucket gs://BUCKET", "--run", "--steps N", "--mixers A,B"):
        assert text in out
    assert "shellcheck" not in out


@pytest.mark.slow
def test_every_script_tiny(reproduce, reproduce_here, tmp_path):
    """Run all scripts from training to pictures, with shared runs of two steps of the smallest models."""
    common = ("--out", tmp_path / "out", "--steps", 2)
    two = ("--mixers", "ttt_linear,transformer", "--sizes", "125m", "--contexts", "2k,8k")
    folder = tmp_path / "out" / "tiny-2-steps"

    def said(name):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        return words(folder / f"{name}.svg")

    out = reproduce_here("figure_10", *common, *two)
    assert "4 points: 4 done" in out
    text = said("figure_10")
    for expected in (LINEAR, TRANSFORMER, "training FLOPs (log scale)", "perplexity (log scale)"):
        assert expected in text
    assert {"embedded/validation, 128 tokens", "embedded/validation, 512 tokens"} < set(text)

    trained = sorted(path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl"))
    reproduce_here("figure_11", *common, *two)
    assert said("figure_11") == text  # the same runs: one text stands for both datasets
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")) == trained

    reproduce_here("figure_15", *common, *two)
    assert {LINEAR, TRANSFORMER, "Transformer, fine-tuned"} < set(said("figure_15"))
    started = json.loads((folder / "finetune-125m/tiny.transformer_finetune-125m-books-8k/config.json").read_text())
    assert started["training"]["start_from"] == str(folder / "books/tiny.transformer-125m-books-2k")

    reproduce_here("figure_16", *common, "--mixers", "ttt_linear", "--sizes", "125m", "--contexts", "2k,8k")
    for name in ("figure_16", "figure_16_by_model"):
        text = said(name)
        assert {"Perplexity by context, embedded/validation", "context, tokens (log scale)", LINEAR, "512"} < set(text)

    reproduce_here("figure_2", *common, "--mixers", "ttt_linear,transformer", "--sizes", "125m")
    assert {"token index in the sequence (log scale)", "perplexity (log scale)"} < set(said("figure_2_right"))
    labels = [label for label in said("figure_2_right") if "parameters: perplexity" in label]
    assert [label.partition(" parameters")[0].rpartition(", ")[0] for label in labels] == [
        LINEAR,
        "Transformer, fine-tuned",
    ]
    assert "embedded/validation, 512 tokens" in said("figure_2_left")

    reproduce_here("figure_7", *common, "--mini-batches", "1,16")
    text = said("figure_7")
    assert {"mini-batch size b of the inner loop, tokens (log scale)", "seconds per training step (median)"} < set(text)
    reproduce("figure_4", *common)  # with ttt in processes of its own
    reproduce_here("figure_14", *common)
    for name in ("figure_4", "figure_14"):
        assert {"layer 0", "layer 1", "inner loss", "token index t"} < set(said(name))

    out = reproduce_here("table_1", *common, "--mixers", "linear_attention,equivalence")
    assert "TTT equivalence" in out
    assert {path.suffix for path in folder.glob("table_1.*")} == {".txt", ".tex", ".csv"}
