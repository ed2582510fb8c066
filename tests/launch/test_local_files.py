"""Test that local files in commands for other machines are refused for every verb, option and target."""

import argparse
from pathlib import Path

import pytest
from stand_ins import ROOT

from ttt_jax import cli
from ttt_jax import config as config_lib
from ttt_jax.launch import local_files
from ttt_jax.launch.commands import Commands

TARGETS = {
    "tpu": ["tpu", "--accelerator", "v5litepod-4", "--zone", "z"],
    "gke": ["gke", "--cluster", "c", "--tpu-type", "v5litepod-4", "--image", "gcr.io/p/i:t"],
    "sky": ["sky", "--cpus", "2+"],
}
TRAIN = ["train", "--config", "configs/quickstart.py", "--workdir", "gs://b/r"]
TOKENIZE = ["tokenize", "--tokenizer", "byte", "--train", "gs://b/t.jsonl", "--output", "gs://b/x"]
HARNESS = ["harness", "--workdir", "gs://b/a", "--tasks", "x"]
NEEDLE = ["probe", "needle", "--workdir", "gs://b/a"]
REFUSED = [  # a command, and the last of its words that its message begins with
    *(
        (["tokenize", "--tokenizer", "byte", "--output", "gs://b/x", f"--{split}", *values], f"--{split} {values[-1]}")
        for split in ("train", "validation", "test")
        for values in (["t.jsonl"], ["gs://b/t.jsonl", "/data/t.jsonl"], ["~/t*.jsonl"], ["file:///data/t.jsonl"])
    ),
    *(
        ([*TOKENIZE, "--test", url], f"--test {url}")
        for url in ("simplecache::FILE:///d/t.jsonl", "zip://t.jsonl::t.zip", "http://localhost:8000/t.jsonl")
    ),
    (["tokenize", "--train=t.jsonl", "--tokenizer", "byte", "--output", "gs://b/x"], "--train t.jsonl"),
    (["tokenize", "--tokenizer=m.model", "--train", "gs://b/t", "--output", "gs://b/x"], "--tokenizer m.model"),
    (["tokenize", "--tokenizer", "byte", "--train", "gs://b/t", "--output=file:///x"], "--output file:///x"),
    ([*TRAIN, "--config.data.source=data/books"], "data.source='data/books'"),
    ([*TRAIN, "--config.data.source", "file:///data"], "data.source='file:///data'"),
    ([*TRAIN, "--config.training.start_from=~/runs/a"], "training.start_from='~/runs/a'"),
    ([*TRAIN, "--config.data.tokenizer=file:///t.json"], "data.tokenizer='file:///t.json'"),
    ([*TRAIN[:3], "--workdir=runs/a"], "--workdir runs/a"),
    (["eval", "--workdir", "gs://b/a", "runs/b"], "--workdir runs/b"),
    (["eval", "--workdir", "gs://b/a", "--source", "data/books"], "--source data/books"),
    (["eval", "--workdir", "gs://b/a", "--csv", "all.csv"], "--csv all.csv"),
    (["eval", "compare", "gs://b/a", "runs/b"], "DIR runs/b"),
    (["inspect", "--workdir", "/runs/a"], "--workdir /runs/a"),
    ([*NEEDLE, "--haystack=h.txt"], "--haystack h.txt"),
    ([*NEEDLE, "--tokenizer", "t.json"], "--tokenizer t.json"),
    (["probe", "task", "--workdir", "gs://b/a", "--plot", "a.png"], "--plot a.png"),
    ([*HARNESS, "--include-path", "tasks"], "--include-path tasks"),
    ([*HARNESS, "--output", "a.json"], "--output a.json"),
    (["bench", "tpu-schedule", "--function", "/home/me/f.py:build"], "--function /home/me/f.py"),
    (["bench", "tpu-schedule", "--function", "a:b", "--keep", "files"], "--keep files"),
    (["sweep", "status", "gs://b/s"], "ttt sweep status"),
]


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch):
    def start(*arguments, **options):
        raise AssertionError("a command was started")

    monkeypatch.setattr(Commands, "_start", start)
    monkeypatch.chdir(ROOT)


def launch(target, *command, env=()):
    return cli.main(["launch", *target, *env, "--dry-run", "--", *command])


def test_a_learner_has_to_be_in_the_tree_that_is_sent(capsys, tmp_path, monkeypatch):
    (tmp_path / "lab_elsewhere.py").write_text("raise AssertionError('this has been run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = "--config.data.batch_size=4", "--config.model.mixer=ttt"
    refused = {
        "lab_elsewhere:gated": f"{tmp_path}/lab_elsewhere.py would be missing on other machines; expected the module "
        f"at {ROOT}/lab_elsewhere.py, which they get",
        "tests.saved_runs:run": f"{ROOT}/tests/saved_runs.py would be missing on other machines; expected ",
        "json:dumps": "",  # of Python itself, which may be another one there
        "lab_nowhere:gated": "no module lab_nowhere here; expected one",
    }
    for name, target in {**TARGETS, "slurm": ["slurm", "--gpus-per-node", "1"]}.items():
        for learner, message in refused.items():
            is_refused = name != "slurm" or "nowhere" in learner  # nodes of Slurm see the files of this machine
            assert launch(target, *TRAIN, *options, f"--config.model.ttt.learner={learner}") == 2 * is_refused
            if is_refused:
                said = capsys.readouterr().err
                assert said.startswith(f"ttt launch: model.ttt.learner='{learner}': {message}")
                assert said.count("\n") == 1
        assert launch(target, *TRAIN, *options, "--config.model.ttt.learner=ttt_jax.import_path:load") == 0
        capsys.readouterr()


@pytest.mark.parametrize(("command", "message"), REFUSED, ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else "")
def test_local_files_are_refused(capsys, command, message):
    for target in TARGETS.values():
        assert launch(target, *command) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"ttt launch: {message}: ")
        assert "expected" in printed.err
        assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        TOKENIZE,
        [*TOKENIZE, "--test", "s3://b/t.jsonl", "hf://datasets/x/t.parquet", "simplecache::gs://b/*.txt"],
        [*TOKENIZE, "--test", "configs/quickstart.py"],  # is sent
        [*TRAIN, "--config.data.source=gs://b/data", "--config.training.start_from=gs://b/a"],
        [*TRAIN, "--config.data.tokenizer=tokenizer.model"],  # a name
        ["eval", "--workdir", "gs://b/a", "--source", "embedded"],
        ["probe", "needle", "--workdir", "gs://b/a", "--tokenizer", "byte", "--haystack", "gs://b/h.txt"],
        ["harness", "--workdir", "gs://b/a", "--tasks", "lambada_openai", "--include-path", "launch"],
        ["bench", "tpu-schedule", "--function", "ttt_jax.benchmark.inner_loop:build"],
    ],
    ids=lambda command: " ".join(command)[:60],
)
def test_urls_and_files_of_the_source_tree_are_accepted(capsys, command):
    assert launch(TARGETS["sky"], *command) == 0
    assert f"ttt {command[0]}" not in capsys.readouterr().err


def test_files_have_to_be_named_by_their_path_in_the_source_tree(capsys, monkeypatch):
    assert launch(TARGETS["sky"], *TOKENIZE, "--test", f"{ROOT}/configs/quickstart.py") == 2
    assert "expected configs/quickstart.py, which it is called in the source tree" in capsys.readouterr().err
    monkeypatch.chdir(ROOT / "configs")
    assert launch(TARGETS["sky"], *TOKENIZE, "--test", "quickstart.py") == 2
    assert "expected configs/quickstart.py, which" in capsys.readouterr().err


def test_slurm_accepts_local_files(capsys, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text((ROOT / "configs/quickstart.py").read_text())
    slurm = ["slurm", "--gpus-per-node", "1"]
    command = ["train", "--config", str(config), "--workdir", str(tmp_path / "run"), "--config.data.source=data/books"]
    assert launch(slurm, *command) == 0


def test_a_local_workdir_on_kept_machines_is_written_but_not_read(capsys):
    target = [*TARGETS["tpu"], "--keep"]
    config = ["--config", "configs/quickstart.py", "--config.data.batch_size=4"]
    assert launch(target, "train", *config, "--workdir", "runs/a") == 0
    capsys.readouterr()
    assert launch(target, "eval", "--workdir", "runs/a") == 2
    assert "--workdir runs/a: a folder of this machine, not there; expected gs://" in capsys.readouterr().err


def test_variables_that_name_local_files_are_refused(capsys, monkeypatch, tmp_path):
    key = tmp_path / "key.json"
    key.write_text("{}")
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    for given in (f"GOOGLE_APPLICATION_CREDENTIALS={key}", f"MINE={key}", f"MINE=file://{key}", "KUBECONFIG"):
        assert launch(TARGETS["sky"], *TRAIN, env=["--env", given]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"ttt launch: --env {given.partition('=')[0]}: names a file of this machine")
        assert str(key) not in err
    for given in ("XLA_FLAGS=--xla_dump_to=/tmp/x", f"TMPDIR={tmp_path}", "GOOGLE_APPLICATION_CREDENTIALS=/secrets/k"):
        assert launch(TARGETS["sky"], *TRAIN, env=["--env", given]) == 0


# ---- What the parsers declare

TEXTS = {  # metavars of arguments that take text and name no files
    *("HOST:PORT", "KEY", "TOKEN", "ADDRESS", "STEP", "A,B", "NAME", "NAME,...", "TOPOLOGY", "KEY=VALUE"),
    *("KEY=VALUE[,...]", "MODULE:NAME", "KEY=VALUES", "NAME=N", "METRIC", "TARGET", "KIND", "needle|task", "step"),
}


def test_every_argument_of_every_verb_is_a_place_or_known_not_to_be():
    _, verbs = cli.parsers()
    for name, parser in verbs.items():
        for action in parser._actions:
            takes_text = action.nargs != 0 and action.choices is None and action.type in (None, Path)
            if takes_text and not isinstance(action, argparse._SubParsersAction):
                kind = str(action.metavar)
                assert kind in local_files._KINDS or kind in TEXTS, (name, action.dest, kind)
                assert action.type is not Path or kind in local_files._KINDS, (name, action.dest)


def test_options_that_are_written_exist():
    _, verbs = cli.parsers()
    for verb, option in local_files._WRITTEN | local_files._WRITTEN_HERE:
        assert option in {action.dest for action in verbs[verb]._actions}


def test_every_text_of_the_config_is_a_place_or_known_not_to_be():
    """Check all texts but those of mixers, which name no files; the user's own functions are checked apart."""
    settings = config_lib.settings().items()
    texts = {key for key, each in settings if issubclass(each.kind, str) and key.count(".") < 2}
    others = """model.mixer model.channel model.norms model.dtype model.remat optimizer.warmup training.duration
        checkpoint.every checkpoint.milestone_every evaluation.every evaluation.split profile.steps log.every
        log.wandb_project""".split()
    assert texts == {*local_files._CONFIG_KINDS, *others}


@pytest.mark.parametrize(
    ("location", "local"),
    [
        ("a", True), ("/a", True), ("~/a", True), ("file:/a", True), ("file:///a", True), ("LOCAL://a", True),
        ("gs://b/a", False), ("http://host/a", False), ("simplecache::gs://b/a", False), ("zip://a::b.zip", True),
        ("sftp://me@127.0.0.1/a", True), ("https://localhost.example.com/a", False), ("http://[::1]:80/a", True),
    ],
)  # fmt: skip
def test_is_local(location, local):
    assert local_files.is_local(location) == local


def test_points_of_a_sweep_are_refused_before_any_is_launched(capsys, tmp_path):
    sweep = ["sweep", "--config", "configs/quickstart.py", "--grid", "seed=0,1", "--workdir"]
    launcher = ["--", "launch", *TARGETS["sky"]]
    assert cli.main([*sweep, str(tmp_path / "s"), "--dry-run", *launcher]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"ttt sweep: --workdir {tmp_path}/s/seed=0: the machines are deleted in the end")
    assert printed.out == ""
    assert not (tmp_path / "s").exists()
