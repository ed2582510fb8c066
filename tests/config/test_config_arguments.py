"""Check the arguments that make a config: their forms, their errors, and that no value is run as code."""

import json
import unicodedata

import hypothesis
import ml_collections
import pytest
from hypothesis import strategies as st
from parsing import CONFIGS, QUICKSTART, error_of, parse

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError, arguments

NAMES = list(config_lib.settings())


@pytest.mark.parametrize("key", NAMES)
def test_every_key_can_be_set_from_the_command_line(key):
    before = config_lib.value_of(parse(), key)
    unset = {bool: True, float: 0.25, int: 7, str: "linear"}
    value = unset[config_lib.settings()[key].kind] if before is None else before
    config = parse(f"{key}={json.dumps(value) if isinstance(value, bool) else value}")
    assert config_lib.value_of(config, key) == value
    assert type(config_lib.value_of(config, key)) is type(value)
    assert config_lib.differing_keys(config.to_dict(), parse().to_dict()).keys() <= {key}


def test_the_last_value_of_a_key_counts():
    assert parse("model.width=64", "model.width=256").model.width == 256


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--config.seed", "3"], "seed", 3),
        (["-config.seed=0x10"], "seed", 16),
        (["--config.optimizer.peak_lr=1"], "optimizer.peak_lr", 1.0),
        (["--config.data.source=a=b c"], "data.source", "a=b c"),
        (["--config.data.source", "--config.seed=1"], "data.source", "--config.seed=1"),
        (["--config.log.wandb_project="], "log.wandb_project", ""),
        (["--config.log.wandb_project=None"], "log.wandb_project", "None"),
        (["--config.model.pre_conv"], "model.pre_conv", True),
        (["--noconfig.model.pre_conv"], "model.pre_conv", False),
        (["--config.model.pre_conv=T"], "model.pre_conv", True),
        (["--config.model.tie_embeddings=0"], "model.tie_embeddings", False),
        (["--config", str(CONFIGS / "books.py")], "model.width", 128),  # the last file counts, too
    ],
    ids=str,
)
def test_all_forms_of_arguments_are_read(arguments, key, value):
    found = config_lib.value_of(config_lib.from_arguments(["--config", str(QUICKSTART), *arguments]), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.seed"], "seed: missing value; expected --config.seed=VALUE"),
        (["--noconfig.seed"], "'--noconfig.seed': unexpected argument; expected --config.seed=VALUE"),
        (["--noconfig.model.remat=none"], "'--noconfig.model.remat=none': unexpected argument; expected "),
        (["--noconfig.model"], "model=: is a section; expected one of its keys, such as model.mixer"),
        (["--noconfig"], "'--noconfig': unexpected argument; expected --config.KEY=VALUE"),
        (["--config.model.tie_embeddings", "false"], "'false': unexpected argument; expected --config.KEY=VALUE"),
        (["--config."], ": unknown key; did you mean "),
        (["--config.model.wi\ndth=3"], "model.wi dth: unknown key; did you mean model.width?"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    assert error_of(config_lib.from_arguments, ["--config", str(QUICKSTART), *arguments]).startswith(message)


def test_a_key_that_a_method_hides_is_set_like_others():
    """Check ``update``, which is also a method of ConfigDict."""
    assert (
        parse("model.mixer=ttt", "model.ttt.update=momentum", "model.ttt.update=decay").model.ttt["update"] == "decay"
    )


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config.model.width=32"]], ids=str)
def test_a_missing_config_file_argument_is_named(arguments):
    message = error_of(config_lib.from_arguments, arguments)
    assert message.startswith("--config: missing")
    assert "--config configs/quickstart.py" in message


@pytest.mark.parametrize("arguments", [["--config=nowhere/x.py"], ["--config", "nowhere/x.py:ttt_mlp"]], ids=str)
def test_a_config_file_that_does_not_exist_is_named(arguments):
    message = error_of(config_lib.from_arguments, arguments)
    assert message == "--config nowhere/x.py: no such file; expected a Python file with get_config()"


def test_a_misspelt_config_file_is_named_with_the_nearest():
    message = error_of(config_lib.from_arguments, ["--config", str(CONFIGS / "quikstart.py:ttt_mlp")])
    assert message == f"--config {CONFIGS}/quikstart.py: no such file; did you mean {QUICKSTART}?"


@pytest.mark.parametrize("argument", ["stray", "--foo=3", "--flagfile=/etc/passwd", "--undefok=x", "-foo"])
def test_other_arguments_are_unexpected(argument):
    assert argument.lstrip("-").split("=")[0] in error_of(
        config_lib.from_arguments, ["--config", str(QUICKSTART), argument]
    )


@pytest.mark.parametrize(
    "key", ["model.width", "optimizer.peak_lr", "model.pre_conv", "optimizer.warmup", "model.mixer"]
)
def test_python_in_a_value_is_refused_and_never_run(tmp_path, key):
    trace = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    message = error_of(parse, f"{key}={code}")
    assert message.startswith(key)
    assert "expected" in message
    assert parse(f"log.wandb_project={code}").log.wandb_project == code  # any text is a name
    assert not trace.exists()


# The keys of the table with texts and numbers of all sorts; durations up to 1e300, for 1e308 has its own test above.
PRINTABLE = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=12)
NUMBERS = st.one_of(
    st.integers(-3, 5000).map(str), st.floats(-1e300, 1e300).map(repr), st.sampled_from(["nan", "-inf", "None", "true"])
)
VALUES = st.one_of(
    PRINTABLE, NUMBERS, st.tuples(NUMBERS, st.sampled_from(["%", " steps", "k tokens", "]"])).map("".join)
)


@pytest.mark.slow
@hypothesis.given(key=st.sampled_from(NAMES), value=VALUES)
@hypothesis.settings(max_examples=400)
def test_any_text_gives_a_config_or_one_line(key, value):
    try:
        config = parse(f"{key}={value}")
    except ConfigError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        assert not any(unicodedata.category(c) == "Cc" for c in message)
        # Widths and batches are refused by way of what has to divide them.
        partners = {"model.width": "model.num_heads", "data.batch_size": "training.accumulation"}
        partners["training.duration"] = "optimizer.warmup"
        assert message.startswith((key, partners.get(key, key)))
    else:
        assert isinstance(config, ml_collections.ConfigDict)
        assert config.is_locked
        config_lib.validate(config)
        json.dumps(config.to_dict(), allow_nan=False)


# ---- Arguments of a whole command


COMMAND = ["--jobs", "2", "--config", "a.py:x", "--noconfig.log.tensorboard", "--config=b.py", "--config.seed", "3"]


def test_arguments_about_the_config_are_found_among_others():
    assert arguments.about_config(COMMAND) == COMMAND[2:]
    assert arguments.count_files(COMMAND) == 2
    assert arguments.split_arguments(COMMAND[2:]) == (
        ("a.py:x", "b.py"),
        (("log.tensorboard", "false"), ("seed", "3")),
    )


def test_config_files_are_replaced_in_a_command():
    changed = arguments.replace_files(COMMAND, lambda file: f"there/{file}")
    assert changed == [*COMMAND[:3], "there/a.py:x", COMMAND[4], "--config=there/b.py", *COMMAND[6:]]
    assert arguments.replace_files(["--config"], str.upper) == ["--config"]
