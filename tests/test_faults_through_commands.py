"""Damage files of every kind, and check that commands give the right result or name the file in one line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import files_of_all_kinds
import pytest
from faults import damaged

from ttt_jax import cli
from ttt_jax.data.prepare import tokenize_units
from ttt_jax.data.prepare.tokenize import tokenize
from ttt_jax.storage import json_files
from ttt_jax.storage.store import Store
from ttt_jax.terminal.stopping import DONE, FAILED, REFUSED
from ttt_jax.training import metrics

RUN, EVAL = "sweep/a", "sweep/a/eval/validation-32"
TOKENIZE = ["tokenize", "--train", "train.jsonl", "--validation", "validation.jsonl", "--tokenizer", "bpe.json"]
COMMANDS = {
    "train": ["train", "--config", "config.py", "--workdir", RUN],
    "tokenize": [*TOKENIZE, "--output", "tokenized"],
    "tokenize the rest": [*TOKENIZE, "--output", "half"],
    "curves": ["plot", "loss-by-position", RUN, RUN, "--output", "curves.svg"],
    "table": ["plot", "table", RUN],
    "compare": ["eval", "compare", RUN, RUN],
    "inner loss": ["plot", "inner-loss", RUN, "--output", "inner.svg"],
    "status": ["sweep", "status", "sweep"],
    "results": ["sweep", "results", "sweep", "--json"],
}
FAULTS = [
    *((f"{RUN}/config.json", kind, "train") for kind in ("flip", "cut", "empty", "delete", "foreign", "duplicate")),
    *((f"{RUN}/metrics.jsonl", kind, "train") for kind in ("flip", "cut", "empty", "delete", "foreign", "duplicate")),
    *((f"{RUN}/metrics.jsonl", kind, "results") for kind in ("flip", "empty", "delete", "foreign", "duplicate")),
    *((f"{RUN}/started.json", kind, "train") for kind in ("cut", "empty", "foreign")),
    *((f"{RUN}/checkpoints/4/meta/metadata", kind, "train") for kind in ("flip", "empty", "foreign")),
    *((f"{RUN}/config.json", kind, "table") for kind in ("flip", "empty", "delete")),
    *((f"{EVAL}.json", kind, "curves") for kind in ("flip", "cut", "delete", "foreign")),
    *((f"{EVAL}.npz", kind, "curves") for kind in ("flip", "empty", "delete", "duplicate")),
    *((f"{EVAL}.npz", kind, "compare") for kind in ("flip", "cut", "foreign")),
    *((f"{EVAL}.json", kind, "table") for kind in ("flip", "empty", "foreign", "duplicate")),
    *((f"{RUN}/inspect/validation-64.npz", kind, "inner loss") for kind in ("flip", "delete")),
    *((f"{RUN}/inspect/validation-64.json", kind, "inner loss") for kind in ("cut", "foreign")),
    *((f"{RUN}/point.json", kind, "status") for kind in ("flip", "empty", "delete", "foreign")),
    *(("sweep/sweep.json", kind, "status") for kind in ("flip", "empty", "delete", "foreign")),
    *(("sweep/sweep.json", kind, "results") for kind in ("cut", "duplicate")),
    *(("tokenized/dataset.json", kind, "tokenize") for kind in ("flip", "empty", "foreign")),
    *(("dataset/dataset.json", kind, "train") for kind in ("flip", "delete", "foreign")),
    *(("dataset/train/zarr.json", kind, "train") for kind in ("flip", "empty", "delete")),
    *(("dataset/validation/c/0", kind, "train") for kind in ("cut", "empty", "foreign")),
    *(("half/_unfinished/state.json", kind, "tokenize the rest") for kind in ("flip", "cut", "foreign")),
]
pytestmark = pytest.mark.slow
SILENT = ("cut", "empty", "delete")  # a file that is missing, or ends early, may be one that was being written


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "made"
    root.mkdir()
    files_of_all_kinds.make(root)
    values = {**files_of_all_kinds.SETTINGS, "data.source": "dataset"}
    lines = [f"    config.{key} = {value!r}\n" for key, value in values.items()]
    program = "from ttt_jax import config as lib\n\n\ndef get_config(_=None):\n    config = lib.default()\n"
    (root / "config.py").write_text(program + "".join(lines) + "    return config\n")
    inputs, job = files_of_all_kinds.inputs(root), files_of_all_kinds.tokenize_job(root)
    tokenize(inputs, job, Store(root / "tokenized"), tokenize_units.processes(1))
    files_of_all_kinds.stopped(root, "half", unit_bytes=1500, save_seconds=-1)
    shutil.copytree(root, root.with_name("kept"))
    return root


@pytest.fixture
def run(whole, monkeypatch, capfd) -> Callable[[str], tuple[int, str, str]]:
    """Return ``run(name, damage)``: it runs a command after damage to files, and returns status, stdout and stderr."""

    def run(name: str, damage: Callable[[], None] = lambda: None) -> tuple[int, str, str]:
        shutil.rmtree(whole)
        shutil.copytree(whole.with_name("kept"), whole)
        monkeypatch.chdir(whole)
        damage()
        json_files._warned.clear()
        capfd.readouterr()
        status = cli.main(COMMANDS[name])
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Return a dict for the outcomes of commands whose files are whole, by the names of the commands."""
    return {}


def test_forty_faults_reach_all_commands():
    assert len(FAULTS) >= 40
    assert {command for _, _, command in FAULTS} == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_report_nothing_about_whole_files(run, name):
    status, _, err = run(name)
    assert status == DONE, err
    assert "damaged" not in err
    assert ".json" not in err


@pytest.mark.parametrize(("name", "kind", "command"), FAULTS)
def test_a_command_gives_the_right_result_or_names_the_file(run, whole, expected, name, kind, command):
    def damage() -> None:
        path = whole / name
        left = damaged(path.read_bytes(), kind, 0, path.suffix)
        path.unlink() if left is None else path.write_bytes(left)

    if command not in expected:
        status, _, expected[command] = _outcome(whole, run, command)
        assert status == DONE
    status, lines, found = _outcome(whole, run, command, damage)
    places = [name, *(f"{folder}" for folder in list(Path(name).parents)[:-1])]
    named = [line for line in lines if any(place in line for place in places)]
    if status == DONE:
        assert found == expected[command] or named or kind in SILENT
    else:
        assert status in (FAILED, REFUSED)
        assert lines == named[-1:]


def _outcome(root: Path, run: Callable, command: str, *damage: Callable[[], None]) -> tuple[int, list[str], Any]:
    """Run a command; return its status, the lines of its stderr, and its result."""
    status, out, err = run(command, *damage)
    if status == DONE and command == "train":
        out = [(record["step"], record["loss"]) for record in metrics.read(root / RUN)]
    elif status == DONE and command.startswith("tokenize"):
        out = json_files.read_object(Path(COMMANDS[command][-1]) / "dataset.json")["splits"]
    return status, err.splitlines(), out
