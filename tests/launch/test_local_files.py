"""Check that local files in commands for other machines are refused, for every verb and option."""

import argparse
import re
from pathlib import Path

import pytest
from stand_ins import OPTIONS, ROOT

from ttt_jax import cli
from ttt_jax import config as config_lib
from ttt_jax.launch import local_files
from ttt_jax.launch.commands import Commands

TRAIN = "train --config configs/quickstart.py --config.data.batch_size=8 --workdir gs://b/r"
TOKENIZE = "tokenize --tokenizer byte --train gs://b/t.jsonl --output gs://b/x"
LISTS = ("t.jsonl", "gs://b/t.jsonl /data/t.jsonl", "~/t*.jsonl", "file:///data/t.jsonl")
SPLITS = " | ".join(f"--{split} {files}" for split in ("train", "validation", "test") for files in LISTS)
# A line is a command, and options with local files.
REFUSED = f"""
{TOKENIZE} | {SPLITS} | --train=t.jsonl | --tokenizer=m.model | --output=file:///x
{TOKENIZE} | --test simplecache::FILE:///d/t.jsonl | --test zip://t.jsonl::t.zip | --test http://localhost:8000/t.jsonl
{TRAIN} | --workdir=runs/a | --config.data.source=data/books | --config.data.source file:///data
{TRAIN} | --config.training.start_from=~/runs/a | --config.data.tokenizer=file:///t.json
eval --workdir gs://b/a | --workdir gs://b/a runs/b | --source data/books | --csv all.csv
inspect | --workdir /runs/a
probe needle --workdir gs://b/a | --haystack=h.txt | --tokenizer t.json | --plot a.png
probe task --workdir gs://b/a | --plot a.png
harness --workdir gs://b/a --tasks x | --include-path tasks | --output a.json
bench tpu-schedule | --function /home/me/f.py:build | --function a:b --keep files
"""
ACCEPTED = f"""
{TOKENIZE} |  | --test s3://b/t.jsonl hf://datasets/x/t simplecache::gs://b/*.txt | --test configs/quickstart.py
{TRAIN} | --config.data.source=gs://b/data --config.training.start_from=gs://b/a | --config.data.tokenizer=a.model
eval --workdir gs://b/a | --source embedded
probe needle --workdir gs://b/a | --tokenizer byte --haystack gs://b/h.txt
harness --workdir gs://b/a --tasks lambada_openai | --include-path launch
bench tpu-schedule | --function ttt_jax.benchmark.inner_loop:build
"""


def cases(table: str) -> list[tuple[str, str]]:
    lines = [line.split(" | ") for line in table.strip().splitlines()]
    return [(command, options) for command, *several in lines for options in several]


@pytest.fixture(autouse=True)
def launch(monkeypatch, capsys):
    """Return ``launch(target, command, *options)``: the exit status and standard error; nothing is started."""
    monkeypatch.setattr(Commands, "_start", None)
    monkeypatch.chdir(ROOT)

    def dry_run(target: str, command: str, *options: str) -> tuple[int, str]:
        status = cli.main(["launch", target, *OPTIONS[target], *options, "--dry-run", "--", *command.split()])
        printed = capsys.readouterr()
        assert status == 0 or (printed.out == "" and "expected" in printed.err and printed.err.count("\n") == 1)
        return status, printed.err.removeprefix("ttt launch: ")

    return dry_run


@pytest.mark.parametrize(("command", "options"), cases(REFUSED))
def test_local_files_are_refused(launch, command, options):
    *_, option, value = re.sub(r"gs://\S+ ", "", options).replace("=", " ").removesuffix(":build").split()
    key = option.removeprefix("--config.")
    for target in ("tpu", "gke", "sky"):
        status, message = launch(target, f"{command} {options}")
        assert status == 2
        assert message.startswith(f"{option} {value}: " if key == option else f"{key}={value!r}: ")


@pytest.mark.parametrize(("command", "options"), cases(ACCEPTED))
def test_files_of_other_machines_and_of_the_source_tree_are_accepted(launch, command, options):
    status, message = launch("sky", f"{command} {options}")
    assert status == 0, message


def test_positional_arguments_are_refused(launch):
    assert launch("sky", "eval compare gs://b/a runs/b")[1].startswith("DIR runs/b: ")
    assert launch("sky", "sweep status gs://b/s")[1].startswith("ttt sweep status: ")


def test_a_file_that_is_sent_is_named_by_its_path_in_the_source_tree(launch, monkeypatch):
    expected = "expected configs/quickstart.py, its path in the source tree"
    assert expected in launch("sky", f"{TOKENIZE} --test {ROOT}/configs/quickstart.py")[1]
    monkeypatch.chdir(ROOT / "configs")
    assert expected in launch("sky", f"{TOKENIZE} --test quickstart.py")[1]


def test_slurm_reads_local_files(launch, tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "configs/quickstart.py").read_text())
    command = f"{TRAIN} --config {tmp_path}/mine.py --workdir {tmp_path}/run --config.data.source=data/books"
    assert launch("slurm", command.replace("--config configs/quickstart.py ", ""))[0] == 0


def test_machines_that_are_kept_may_be_written_to_but_not_read_from(launch):
    assert launch("tpu", f"{TRAIN} --workdir runs/a", "--keep")[0] == 0
    _, message = launch("tpu", "eval --workdir runs/a", "--keep")
    assert message.startswith("--workdir runs/a: a folder that other machines do not have; expected gs://")


def test_variables_that_name_local_files_are_refused(launch, monkeypatch, tmp_path):
    key = tmp_path / "key.json"
    key.write_text("{}")
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    for given in (f"GOOGLE_APPLICATION_CREDENTIALS={key}", f"MINE={key}", f"MINE=file://{key}", "KUBECONFIG"):
        status, message = launch("sky", TRAIN, "--env", given)
        assert status == 2
        assert message.startswith(f"--env {given.partition('=')[0]}: names a file of this machine")
        assert str(key) not in message
    for given in ("XLA_FLAGS=--xla_dump_to=/tmp/x", f"TMPDIR={tmp_path}", "GOOGLE_APPLICATION_CREDENTIALS=/secrets/k"):
        assert launch("sky", TRAIN, "--env", given)[0] == 0


def test_a_learner_has_to_be_in_the_source_tree(launch, tmp_path, monkeypatch):
    (tmp_path / "lab_elsewhere.py").write_text("raise AssertionError('this has been run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused = {
        "lab_elsewhere:gated": f"{tmp_path}/lab_elsewhere.py would be missing on other machines; expected the module at "
        f"{ROOT}/lab_elsewhere.py, which they get",
        "tests.saved_runs:run": f"{ROOT}/tests/saved_runs.py would be missing on other machines; expected ",
        "json:dumps": "",  # a module of Python, which may have another version there
        "lab_nowhere:gated": "no module lab_nowhere here; expected one",
    }
    learner = f"{TRAIN} --config.model.mixer=ttt --config.model.ttt.learner="
    for target in OPTIONS:
        assert launch(target, f"{learner}ttt_jax.import_path:load")[0] == 0
        for name, problem in refused.items():
            status, message = launch(target, f"{learner}{name}")
            assert status == (0 if target == "slurm" and "nowhere" not in name else 2)  # Slurm shares the file system
            assert status == 0 or message.startswith(f"model.ttt.learner='{name}': {problem}")


def test_points_of_a_sweep_are_refused_before_any_is_launched(capsys, tmp_path):
    sweep = (
        f"sweep --config configs/quickstart.py --grid seed=0,1 --workdir {tmp_path}/s --dry-run -- launch sky --cpus 2+"
    )
    assert cli.main(sweep.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"ttt sweep: --workdir {tmp_path}/s/seed=0: the machines are deleted in the end")
    assert printed.out == ""
    assert not (tmp_path / "s").exists()


TEXTS = {  # metavars of arguments that take text and name no files
    *("HOST:PORT", "KEY", "TOKEN", "ADDRESS", "STEP", "A,B", "NAME", "NAME,...", "TOPOLOGY", "KEY=VALUE"),
    *("KEY=VALUE[,...]", "MODULE:NAME", "KEY=VALUES", "NAME=N", "METRIC", "TARGET", "KIND", "needle|task", "step"),
}


def test_every_argument_of_every_verb_names_files_or_is_known_not_to():
    options = {(verb, action) for verb, parser in cli.parsers()[1].items() for action in parser._actions}
    for verb, action in options:
        takes_text = action.nargs != 0 and action.choices is None and action.type in (None, Path)
        if takes_text and not isinstance(action, argparse._SubParsersAction):
            known = local_files.METAVARS if action.type is Path else {*TEXTS, *local_files.METAVARS}
            assert str(action.metavar) in known, (verb, action.dest)
    assert {action.dest for _, action in options if action.type is Path} == {*local_files.WRITTEN, "include_path"}


def test_every_text_of_the_config_names_files_or_is_known_not_to():
    """Leave out sections of mixers, which name no files but learners."""
    settings = config_lib.settings().items()
    texts = {key for key, each in settings if issubclass(each.kind, str) and key.count(".") < 2}
    others = """model.mixer model.channel model.norms model.dtype model.remat optimizer.warmup training.duration
        checkpoint.every checkpoint.milestone_every evaluation.every evaluation.split profile.steps log.every
        log.wandb_project""".split()
    assert texts == {*local_files.CONFIG_KEYS, *others}


def test_is_local():
    local = "a /a ~/a file:/a file:///a LOCAL://a zip://a::b.zip sftp://me@127.0.0.1/a http://[::1]:80/a".split()
    remote = "gs://b/a http://host/a simplecache::gs://b/a https://localhost.example.com/a".split()
    assert [each for each in (*local, *remote) if local_files.is_local(each)] == local
