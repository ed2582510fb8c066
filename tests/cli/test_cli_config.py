"""Check ``ttt config``, and the keys of the config in the help of verbs."""

import os
import re
import sys
import tomllib

import pytest
from tiny_run import QUICKSTART, ttt

from ttt_jax import cli
from ttt_jax import config as config_lib
from ttt_jax.cli import config as config_command

MINE = ["--config", f"{QUICKSTART}:ttt_mlp", "--config.training.duration=4096000 tokens", "--config.seed=7"]


def test_the_lines_are_toml_of_the_whole_config(capsys):
    assert ttt("config", *MINE) == 0
    out = capsys.readouterr().out
    found, expected = tomllib.loads(out), config_lib.from_arguments(MINE)
    for key in config_lib.settings():
        value, there = config_lib.value_of(expected, key), found
        for part in key.split("."):
            there = there.get(part) if isinstance(there, dict) else None
        assert there == value
        if value is None:
            assert f"# {key} is unset  " in out
    comments = _comments(out)
    assert list(comments) == list(config_lib.settings())
    assert comments["model.mixer"].startswith('* default: "ttt_linear"; sequence mixer: ttt_linear, ')
    assert comments["training.duration"].startswith('* 4,000 steps; default: "1000 steps"; a duration: ')
    assert (
        comments["optimizer.warmup"]
        == "  400 steps; a duration: warm-up of the learning rate, and of the inner learning rate"
    )
    assert comments["log.every"] == "  a duration: time between records of metrics.jsonl"
    marked = [key for key, comment in comments.items() if comment.startswith("*")]
    assert out.startswith(f"# {len(marked)} of {len(comments)} keys are not the defaults, marked #*; ")


def test_changed_keys_are_marked_and_printed_alone(capsys):
    changed = ["model.ttt.base_lr=0.3", "seed=0", "model.pre_conv=false", "log.every=2 steps"]
    assert ttt("config", "--config", QUICKSTART, *(f"--config.{each}" for each in changed), "--changed") == 0
    out = capsys.readouterr().out
    comments = _comments(out)
    assert len(comments) == len(out.splitlines())
    assert all(comment.startswith("*") and "default: " in comment for comment in comments.values())
    config, default = config_lib.from_arguments(["--config", QUICKSTART]), config_lib.default()
    of_file = config_lib.differing_keys(config.to_dict(), default.to_dict()).keys()
    assert comments.keys() == of_file | {"model.ttt.base_lr", "model.pre_conv", "log.every"}
    assert comments["model.pre_conv"].startswith("* default: unset; ")
    assert "model.pre_conv = false " in out


def test_comments_are_as_wide_as_the_terminal():
    config = config_lib.from_arguments(MINE)
    lines = list(config_command.as_toml(config, width=100))
    assert max(len(line) for line in lines) <= 100
    assert tomllib.loads("\n".join(lines)) == tomllib.loads("\n".join(config_command.as_toml(config)))
    words = re.sub(r"\s*\n\s+#  ", " ", "\n".join(lines))
    assert words.split() == "\n".join(config_command.as_toml(config)).split()


def _comments(out):
    """Return the comment of each key, with its mark."""
    found = re.findall(r"^(?:# )?([\w.]+) (?:= .*?|is unset) *  #([* ] .*)$", out, re.MULTILINE)
    return dict(found)


def test_json_is_the_config_file_of_a_run(capsys, tmp_path):
    assert ttt("config", "--json", *MINE) == 0
    (tmp_path / "config.json").write_text(capsys.readouterr().out)
    assert config_lib.from_json(tmp_path / "config.json").to_dict() == config_lib.from_arguments(MINE).to_dict()


@pytest.mark.parametrize("verb", [["train"], ["plan"], ["bench"], ["bench", "tpu-schedule"], ["sweep"], ["config"]])
def test_help_shows_the_values_of_the_command(capsys, verb):
    assert ttt(*verb, "--help", *MINE) == 0
    out = capsys.readouterr().out
    assert '\n* --config.model.mixer="ttt_mlp"' in out
    assert ' (default: "ttt_linear")\n' in out
    assert "\n* --config.seed=7 " in out
    assert "\n  --config.mesh.fsdp=1 " in out
    assert out.index("\n  -h, --help") < out.index("\nconfig:\n") < out.index("--config.seed")
    assert ttt(*verb, "--help") == 0
    out = capsys.readouterr().out
    assert '\n  --config.model.mixer="ttt_linear"' in out
    assert "\n*" not in out


def test_help_with_a_wrong_config_is_refused(capsys):
    assert ttt("train", "--help", "--config", QUICKSTART, "--config.model.widht=3") == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "ttt train: model.widht: unknown key; did you mean model.width?\n")


def test_usage_names_the_verb(capsys):
    assert ttt() == 2
    assert capsys.readouterr().err.startswith("usage: ttt [-h] [--version] VERB ...\n")
    assert ttt("launch") == 2
    assert capsys.readouterr().err.startswith(
        "usage: ttt launch [-h] TARGET [options] -- VERB ...\nttt launch: error: "
    )


def test_every_verb_is_in_the_help(capsys):
    assert ttt("--help") == 0
    out = capsys.readouterr().out
    _, verbs = cli.parsers()
    for verb in {name.split()[0] for name in verbs}:
        assert f"\n  {verb} " in out


def test_a_closed_pipe_ends_a_command_silently(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert ttt("config", *MINE) == 1
        # Python writes the rest when it ends, and would complain about the pipe.
        assert os.path.samestat(os.fstat(pipe.fileno()), os.stat(os.devnull))
    assert capsys.readouterr().err == ""
