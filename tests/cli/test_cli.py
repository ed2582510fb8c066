"""Check the help of ``ttt``, and that wrong commands are refused in one line before anything is compiled."""

import subprocess
import sys

import pytest
from tiny_run import QUICKSTART, TINY


def test_python_m_ttt_jax_runs_commands(tmp_path):
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
def test_wrong_arguments_are_refused_in_one_line(refused, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert refused(*arguments.split()) == message
    assert not list(tmp_path.iterdir())


def test_unknown_kinds_of_plots_and_benchmarks_are_refused(refused):
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
def test_numbers_below_one_are_refused(refused, arguments):
    message = refused(*arguments.split())
    assert message.startswith(f"error: argument {arguments.split()[-2]}: ")
    assert message.endswith(("expected 1 or more", "expected integers from 1, such as 2048 or 2k,8k"))


def test_text_in_place_of_a_number_is_refused(refused):
    message = refused("eval", "--workdir", "x", "--context", "long")
    assert "--context" in message
    assert "'long'" in message
    assert "_" not in message


def test_wrong_configs_are_refused_before_anything_is_compiled(refused, tmp_path):
    """Check errors that show only with the devices, the data or the model at hand."""
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
    assert refused("plan", *TINY, "--config.mesh.fsdp=5", "--topology", "cpu:1") == (
        "mesh.data=-1, mesh.fsdp=5, mesh.tensor=1: does not fit 1 devices; expected sizes whose product is 1"
    )
    assert refused(
        "plan", "--config", f"{QUICKSTART.replace('quickstart', 'paper')}:ttt", "--topology", "v5e:4x4"
    ).endswith("; 125m, 350m, 760m, 1.3b; pile, books; 1k, 2k, 4k, 8k, 16k, 32k")
    assert not workdir.exists()


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_workdir_that_is_a_file_is_refused(refused, tmp_path, verb):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert "notes.txt" in refused(verb, "--workdir", path, *(TINY if verb == "train" else ()))
    assert path.read_text() == "mine"


def test_a_negative_warmup_is_refused(refused):
    assert "--warmup" in refused("bench", "step", *TINY, "--warmup", "-1")
