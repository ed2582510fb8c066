"""Check what other machines get, and that commands which name files that they do not get are refused."""

import argparse
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from stand_ins import OPTIONS, ROOT

from ttt_jax import cli
from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.launch import sources
from ttt_jax.launch.commands import Commands

TRAIN = "train --config configs/quickstart.py --config.data.batch_size=8 --workdir gs://b/r"
TOKENIZE = "tokenize --tokenizer byte --train gs://b/t.jsonl --output gs://b/x"
LISTS = ("t.jsonl", "gs://b/t.jsonl /data/t.jsonl", "~/t*.jsonl", "file:///data/t.jsonl", "LOCAL://t.jsonl")
SPLITS = " | ".join(f"--{split} {files}" for split in ("train", "validation", "test") for files in LISTS)
# Commands, and options that name files of this machine alone.
REFUSED = f"""
{TOKENIZE} | {SPLITS} | --train=t.jsonl | --tokenizer=m.model | --output=file:///x | --test zip://t.jsonl::t.zip
{TOKENIZE} | --test simplecache::FILE:///d/t.jsonl | --test sftp://me@127.0.0.1/t | --test http://[::1]:80/t.jsonl
{TOKENIZE} | --test http://localhost:8000/t.jsonl | --test file:/t.jsonl
{TRAIN} | --workdir=runs/a | --config.data.source=data/books | --config.data.source file:///data
{TRAIN} | --config.training.start_from=~/runs/a | --config.data.tokenizer=file:///t.json
{TRAIN} --config.model.mixer=ttt | --config.model.ttt.learner=json:dumps
{TRAIN} --config.model.mixer=ttt | --config.model.ttt.learner=tests.saved_runs:run
eval --workdir gs://b/a | --workdir gs://b/a runs/b | --source data/books | --csv all.csv
eval compare gs://b/a | runs/b
inspect | --workdir /runs/a
probe needle --workdir gs://b/a | --haystack=h.txt | --tokenizer t.json | --plot a.png
probe task --workdir gs://b/a | --plot a.png
harness --workdir gs://b/a --tasks x | --include-path tasks | --output a.json
bench tpu-schedule | --function /home/me/f.py:build | --function a:b --keep files
"""
# Commands, and options that name files of other machines, of the source tree, or none.
ACCEPTED = f"""
{TOKENIZE} |  | --test s3://b/t hf://datasets/x/t simplecache::gs://b/*.txt http://host/t https://localhost.example.com/t
{TOKENIZE} | --test configs/quickstart.py
{TRAIN} | --config.data.source=gs://b/data --config.training.start_from=gs://b/a | --config.data.tokenizer=a.model
{TRAIN} --config.model.mixer=ttt | --config.model.ttt.learner=ttt_jax.import_path:load
eval --workdir gs://b/a | --source embedded
probe needle --workdir gs://b/a | --tokenizer byte --haystack gs://b/h.txt
harness --workdir gs://b/a --tasks lambada_openai | --include-path launch
bench tpu-schedule | --function ttt_jax.benchmark.inner_loop:build
"""


def cases(table: str) -> list[tuple[str, str]]:
    lines = [line.split(" | ") for line in table.strip().splitlines()]
    return [(command, options) for command, *several in lines for options in several]


@pytest.fixture
def launch(monkeypatch, capsys):
    """Return ``launch(target, command, *options)``: the exit status and standard error; nothing is started."""
    monkeypatch.setattr(Commands, "follow", None)
    monkeypatch.chdir(ROOT)

    def dry_run(target: str, command: str, *options: str) -> tuple[int, str]:
        status = cli.main(["launch", target, *OPTIONS[target], *options, "--dry-run", "--", *command.split()])
        printed = capsys.readouterr()
        assert status == 0 or (printed.out == "" and "expected" in printed.err and printed.err.count("\n") == 1)
        return status, printed.err.removeprefix("ttt launch: ")

    return dry_run


@pytest.mark.parametrize(("command", "options"), cases(REFUSED))
def test_local_files_are_refused_unless_machines_share_them(launch, command, options):
    words = re.sub(r"gs://\S+ ", "", options).replace("=", " ").removesuffix(":build").split()
    *_, option, value = ["DIR", *words]
    key = option.removeprefix("--config.")
    for target in ("tpu", "gke", "sky"):
        status, message = launch(target, f"{command} {options}")
        assert status == 2
        assert message.startswith(f"{option} {value}: " if key == option else f"{key}={value!r}: ")
    assert launch("slurm", f"{command} {options}")[0] == 0


@pytest.mark.parametrize(("command", "options"), cases(ACCEPTED))
def test_files_of_other_machines_and_of_the_source_tree_are_accepted(launch, command, options):
    assert launch("sky", f"{command} {options}")[0] == 0


def test_a_file_that_is_sent_is_named_by_its_path_in_the_source_tree(launch, monkeypatch):
    expected = "expected configs/quickstart.py, as in the source tree"
    assert expected in launch("sky", f"{TOKENIZE} --test {ROOT}/configs/quickstart.py")[1]
    monkeypatch.chdir(ROOT / "configs")
    assert expected in launch("sky", f"{TOKENIZE} --test quickstart.py")[1]


def test_slurm_reads_a_local_config_and_finds_local_learners(launch, tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "configs/quickstart.py").read_text())
    command = TRAIN.replace("configs/quickstart.py", f"{tmp_path}/mine.py")
    assert launch("slurm", f"{command} --workdir {tmp_path}/run")[0] == 0
    _, message = launch("slurm", f"{TRAIN} --config.model.mixer=ttt --config.model.ttt.learner=lab_nowhere:gated")
    assert message.startswith("model.ttt.learner='lab_nowhere:gated': no module lab_nowhere here; expected one")


def test_machines_that_are_kept_may_be_written_to_but_not_read_from(launch):
    assert launch("tpu", f"{TRAIN} --workdir runs/a", "--keep")[0] == 0
    _, message = launch("tpu", "eval --workdir runs/a", "--keep")
    assert message.startswith("--workdir runs/a: a folder that other machines do not have; expected gs://")


def test_variables_that_name_local_files_are_refused(launch, monkeypatch, tmp_path):
    key = tmp_path / "key.json"
    key.touch()
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/etc")
    for given in (f"GOOGLE_APPLICATION_CREDENTIALS={key}", f"MINE={key}", f"MINE=file://{key}", "CLOUDSDK_CONFIG"):
        _, message = launch("sky", TRAIN, "--env", given)
        assert message.startswith(f"--env {given.partition('=')[0]}: names a file of this machine")
        assert str(key) not in message
    for given in ("XLA_FLAGS=--xla_dump_to=/tmp/x", f"TMPDIR={tmp_path}", "GOOGLE_APPLICATION_CREDENTIALS=/secrets/k"):
        assert launch("sky", TRAIN, "--env", given)[0] == 0


def test_points_of_a_sweep_are_refused_before_any_is_launched(capsys, tmp_path):
    sweep = f"sweep --config configs/quickstart.py --grid seed=0,1 --workdir {tmp_path}/s --dry-run"
    assert cli.main(f"{sweep} -- launch sky --cpus 2+".split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"ttt sweep: --workdir {tmp_path}/s/seed=0: the machines are deleted in the end")
    assert (printed.out, (tmp_path / "s").exists()) == ("", False)


TEXTS = """HOST:PORT KEY TOKEN ADDRESS STEP A,B NAME NAME,... TOPOLOGY KEY=VALUE KEY=VALUE[,...] MODULE:NAME KEY=VALUES
    NAME=N METRIC TARGET KIND needle|task step""".split()  # metavars of arguments that take text and name no files


def test_every_argument_of_every_verb_names_files_or_is_known_not_to():
    options = [(verb, action) for verb, parser in cli.parsers()[1].items() for action in parser._actions]
    for verb, action in options:
        takes_text = action.nargs != 0 and action.choices is None and action.type in (None, Path)
        if takes_text and not isinstance(action, argparse._SubParsersAction):
            known = [*sources.METAVARS, *(TEXTS if action.type is None else ())]
            assert str(action.metavar) in known, (verb, action.dest)
    assert {action.dest for _, action in options if action.type is Path} == {*sources.WRITTEN, "include_path"}


def test_every_text_of_the_config_names_files_or_is_known_not_to():
    """Leave out sections of mixers, which name no files but learners."""
    settings = config_lib.settings().items()
    others = """model.mixer model.channel model.norms model.dtype model.remat optimizer.warmup training.duration
        checkpoint.every checkpoint.milestone_every evaluation.every evaluation.split profile.steps log.every
        log.wandb_project""".split()
    texts = {key for key, each in settings if issubclass(each.kind, str) and key.count(".") < 2}
    assert texts == {*sources.CONFIG_KEYS, *others}


# ---- The source tree, and versions


@pytest.fixture
def tree(tmp_path):
    for name in ("setup.py", "ttt_jax/a.py", "launch/run.sh", "tests/test_a.py", "runs/checkpoint", "'quoted' ü.txt"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    (tmp_path / "tree/launch/run.sh").chmod(0o755)
    return tmp_path / "tree"


def packed(tree, **extra) -> tuple[str, bytes, dict]:
    """Return the hash of an archive of a tree, its bytes, and its files by name."""
    sources.files.cache_clear()
    path, unpacked = tree.parent / "packed/a.tar.gz", tree.parent / "unpacked"
    contents = sources.archive(tree, extra, path)
    sources.unpack(path, unpacked)
    files = {str(file.relative_to(unpacked)): file for file in unpacked.rglob("*") if file.is_file()}
    return contents, path.read_bytes(), files


def test_versions_are_those_installed_here(monkeypatch):
    found = dict(line.split("==") for line in sources.constraints(("gcs",)).splitlines())
    assert all(importlib.metadata.version(name).partition("+")[0] == version for name, version in found.items())
    direct = [Requirement(line) for line in importlib.metadata.requires("ttt_jax")]
    needed = [each for each in direct if each.marker is None or 'extra == "gcs"' in str(each.marker)]
    assert found.keys() >= {canonicalize_name(each.name) for each in needed}
    assert {"jaxlib", "orbax-checkpoint", "aiohttp"} <= found.keys()  # requirements of requirements, too
    assert not {"ttt-jax", "pytest", "ruff", "ray", "wandb"} & found.keys()
    assert "wandb==" in sources.constraints(("wandb",))
    # pip could not install a version that others do not allow.
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "optax" else real(name))
    assert "optax==" not in sources.constraints()


def test_the_working_tree_is_sent_with_its_changes(tree):
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tree / ".gitignore").write_text("runs/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    for name in ("ttt_jax/new.py", "ttt_jax/a.py"):
        (tree / name).write_text("changed")
    (tree / "setup.py").unlink()
    files = packed(tree)[2]
    assert files.keys() == {"ttt_jax/a.py", "ttt_jax/new.py", "launch/run.sh", "'quoted' ü.txt", ".gitignore"}
    assert files["ttt_jax/a.py"].read_text() == "changed"
    assert files["launch/run.sh"].stat().st_mode & 0o111


def test_trees_without_git_make_equal_archives_where_they_are_equal(tree):
    *first, files = packed(tree, text="x")
    assert files.keys() == {"setup.py", "ttt_jax/a.py", "launch/run.sh", "text"}
    (tree / "ttt_jax/a.py").touch()
    assert [*packed(tree, text="x")[:2]] == first
    assert packed(tree, text="y")[0] != first[0]
    (tree / "ttt_jax/a.py").write_text("other")
    assert packed(tree, text="x")[0] != first[0]


def test_a_large_tree_is_refused(tree, monkeypatch):
    monkeypatch.setattr(sources, "_MOST_BYTES", 10)
    with pytest.raises(ConfigError, match=r"launch/run\.sh \(0 MB\)"):
        packed(tree)
