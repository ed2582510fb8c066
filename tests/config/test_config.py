"""Configs: what is refused, in which words, and what the values mean."""

import importlib.util
import json
import math
import re
import sys
import unicodedata
from pathlib import Path

import hypothesis
import ml_collections
import pytest
from hypothesis import strategies as st

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.mixers import MIXERS
from ttt_jax.sweep import points as points_lib
from ttt_jax.ttt.inner_loop import READINGS
from ttt_jax.ttt.learners import LEARNERS
from ttt_jax.ttt.objective import OBJECTIVES
from ttt_jax.ttt.rate import POSITION_RATES, TOKEN_RATES
from ttt_jax.ttt.update import MEMBERS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.py"
SIZES = (  # whatever the recipe says: the messages below name them
    "model.width=128",
    "model.num_heads=4",
    "data.batch_size=4",
    "data.sequence_length=1024",
    "training.duration=200 steps",
    "optimizer.warmup=10%",
)
GET_CONFIG = "from ttt_jax import config\n\n\ndef get_config(arg=''):\n    c = config.default()\n"  # 5 lines
NAMES = list(config_lib.settings())


def parse(*overrides, file=QUICKSTART):
    return config_lib.from_arguments(["--config", str(file), *(f"--config.{text}" for text in (*SIZES, *overrides))])


def error_of(call, *args, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def get(config, key):
    for part in key.split("."):
        config = config[part]
    return config


# ---- The tree of defaults


def test_defaults_are_those_of_the_table_and_valid():
    config = config_lib.default()
    assert dict(flat(config.to_dict())) == {key: each.default for key, each in config_lib.settings().items()}
    assert len(set(NAMES)) == len(NAMES)
    config_lib.validate(config)


def test_defaults_cannot_be_misspelt_or_given_another_type():
    config = config_lib.default()
    with pytest.raises((KeyError, AttributeError), match="widht"):
        config.model.widht = 3
    with pytest.raises(TypeError):
        config.model.width = "wide"
    with pytest.raises(TypeError):
        config.model.ttt.base_lr = "fast"  # unset, but a number all the same
    config.model.ttt.base_lr = 0.5
    assert config.model.ttt.base_lr == 0.5


@pytest.mark.parametrize("key", NAMES)
def test_every_key_can_be_set_from_the_command_line(key):
    before = get(parse(), key)
    unset = {bool: True, float: 0.25, int: 7, str: "linear"}
    value = unset[config_lib.settings()[key].kind] if before is None else before
    config = parse(f"{key}={json.dumps(value) if isinstance(value, bool) else value}")
    assert get(config, key) == value
    assert type(get(config, key)) is type(value)
    assert config_lib.differing_keys(config.to_dict(), parse().to_dict()).keys() <= {key}


@pytest.mark.parametrize("name", ["quickstart", "benchmark", "books"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_configs_of_the_repository_are_valid_with_every_mixer(name, mixer):
    assert parse(file=f"{CONFIGS / name}.py:{mixer}").model.mixer == mixer


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.py")), ids=lambda path: path.stem)
def test_configs_of_the_repository_say_what_to_type(path):
    assert "ttt " in importlib.util.spec_from_file_location("c", path).loader.get_source("c")


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
def test_forms_of_arguments(arguments, key, value):
    found = get(config_lib.from_arguments(["--config", str(QUICKSTART), *arguments]), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.seed"], "seed: expected a value, as in --config.seed=VALUE"),
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
def test_arguments_that_are_refused(arguments, message):
    assert error_of(config_lib.from_arguments, ["--config", str(QUICKSTART), *arguments]).startswith(message)


# ---- What may change


def test_a_run_may_go_on_with_other_values_of_what_changes_no_results_and_of_a_few_more_keys():
    may_change = {key for key in NAMES if config_lib.may_change(key)}
    no_results = {key for key in NAMES if not config_lib.changes_results(key)}
    assert no_results < may_change
    assert may_change - no_results == {
        *("data.source", "data.tokenizer", "model.ttt.learner_source"),  # each is checked apart
        *("training.duration", "optimizer.spike_factor"),
    }
    assert no_results > {
        "model.remat",
        "model.ttt.kernel",
        "mesh.fsdp",
        "checkpoint.every",
        "log.every",
        "profile.steps",
    }
    for key in ("seed", "model.width", "model.mixer", "data.batch_size", "optimizer.peak_lr", "training.start_from"):
        assert key not in may_change


def test_a_key_of_another_version_may_not_change():
    assert not config_lib.may_change("model.gone")
    assert config_lib.changes_results("model.gone")


# ---- One line, which names the key and what would be accepted

REFUSED = [
    # (override, beginning of the message, what it must say of the values accepted)
    ("model.widht=3", "model.widht: unknown key", "model.width?"),
    ("optimiser.peak_lr=3", "optimiser.peak_lr: unknown key", "optimizer.peak_lr?"),
    ("model.width.x=3", "model.width.x: unknown key", "model.width?"),
    ("model=3", "model=3: is a section", "model.mixer"),
    ("model.ttt=None", "model.ttt=None: is a section", "model.ttt.backbone"),
    ("model.width=wide", "model.width=wide", "an integer"),
    ("model.width=1.5", "model.width=1.5", "an integer"),
    ("model.width=", "model.width=", "an integer"),
    ("model.width=None", "model.width=None", "an integer"),
    ("data.sequence_length=1e3", "data.sequence_length=1e3", "an integer"),
    ("optimizer.peak_lr=fast", "optimizer.peak_lr=fast", "a number"),
    ("model.ttt.base_lr=fast", "model.ttt.base_lr=fast", "a number"),
    ("model.tie_embeddings=maybe", "model.tie_embeddings=maybe", "true or false"),
    ("model.pre_conv=maybe", "model.pre_conv=maybe", "true or false"),
    ("model.mixer=lstm", "model.mixer='lstm'", "ttt_linear, ttt_mlp, ttt, attention"),
    ("model.ttt.backbone=rwkv", "model.ttt.backbone='rwkv'", "mamba, transformer"),
    ("model.ttt.learner=mlp", "model.ttt.learner='mlp'", "expected linear, or model.mixer=ttt, which leaves it open"),
    ("model.ttt.update=decay", "model.ttt.update='decay'", "expected sgd, or model.mixer=ttt"),
    ("model.ttt.rate_per_matrix=true", "model.ttt.rate_per_matrix=True", "expected False, or model.mixer=ttt"),
    ("model.ttt.reading=previous", "model.ttt.reading='previous'", "expected causal, or model.mixer=ttt"),
    ("model.ttt.learner_source=abc", "model.ttt.learner_source='abc'", "a SHA-256 in 64"),
    (f"model.ttt.learner_source={'a' * 64}", "model.ttt.learner_source=aaaaaaaaaaaa...: is of a learner", "none"),
    ("model.dtype=float16", "model.dtype='float16'", "float32, bfloat16"),
    ("model.remat=full", "model.remat='full'", "none, block"),
    ("model.num_heads=3", "model.num_heads=3: does not divide model.width=128", "a divisor, such as 2"),
    ("model.num_heads=50", "model.num_heads=50: does not divide model.width=128", "a divisor, such as"),
    ("model.num_heads=128", "model.num_heads=128: gives an odd head width, 1", "to be even"),
    ("model.num_heads=0", "model.num_heads=0", "1 or more"),
    ("model.width=0", "model.width=0", "1 or more"),
    ("model.num_layers=0", "model.num_layers=0", "1 or more"),
    ("model.conv_width=0", "model.conv_width=0", "1 or more"),
    ("model.ttt.mini_batch=0", "model.ttt.mini_batch=0", "1 or more"),
    ("model.ttt.unroll=0", "model.ttt.unroll=0", "1 or more"),
    ("model.ttt.remat_group=-1", "model.ttt.remat_group=-1", "0 or more"),
    ("data.sequence_length=0", "data.sequence_length=0", "1 or more"),
    ("data.sequence_length=-5", "data.sequence_length=-5", "1 or more"),
    ("data.batch_size=0", "data.batch_size=0", "1 or more"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0", "1 or more"),
    ("training.accumulation=0", "training.accumulation=0", "1 or more"),
    ("training.accumulation=3", "training.accumulation=3: does not divide data.batch_size=4", "a divisor"),
    ("optimizer.peak_lr=-1e-3", "optimizer.peak_lr=-0.001", "a positive number"),
    ("optimizer.peak_lr=0", "optimizer.peak_lr=0.0", "a positive number"),
    ("optimizer.peak_lr=nan", "optimizer.peak_lr=nan", "a positive number"),
    ("optimizer.peak_lr=inf", "optimizer.peak_lr=inf", "a positive number"),
    ("optimizer.end_lr=-1e-3", "optimizer.end_lr=-0.001", "0 or more"),
    ("optimizer.end_lr=nan", "optimizer.end_lr=nan", "0 or more"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0", "0 or more"),
    ("optimizer.beta1=1", "optimizer.beta1=1.0", "from 0 to below 1"),
    ("optimizer.beta2=nan", "optimizer.beta2=nan", "from 0 to below 1"),
    ("optimizer.clip_norm=0", "optimizer.clip_norm=0.0", "a positive number"),
    ("model.ttt.base_lr=0", "model.ttt.base_lr=0.0", "a positive number"),
    ("model.ttt.base_lr_start=nan", "model.ttt.base_lr_start=nan", "0 or more"),
    ("seed=-1", "seed=-1", "0 to 2^32 - 1"),
    ("seed=4294967296", "seed=4294967296", "0 to 2^32 - 1"),
    ("optimizer.warmup=200", "optimizer.warmup='200'", "less than training.duration='200 steps'"),
    ("optimizer.warmup=100%", "optimizer.warmup='100%'", "less than training.duration='200 steps'"),
    ("optimizer.warmup=819201 tokens", "optimizer.warmup='819201 tokens'", "less than training.duration"),
    ("optimizer.warmup=soon", "optimizer.warmup='soon'", '"300 steps", "2.5e9 tokens", "10%" of the run'),
    ("training.duration=50%", "training.duration='50%'", '"300 steps", "2.5e9 tokens"'),
    ("checkpoint.every=101%", "checkpoint.every='101%'", '"10%" of the run'),
    ("checkpoint.milestone_every=x", "checkpoint.milestone_every='x'", '"10%" of the run'),
    ("log.every=0 steps", "log.every='0 steps'", '"300 steps"'),
]


@pytest.mark.parametrize(("override", "beginning", "accepted"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(override, beginning, accepted):
    message = error_of(parse, override)
    assert message.startswith(beginning)
    assert accepted in message[len(beginning) :]


CHOICES = [
    ("model.ttt.learner=conv", "model.ttt.learner='conv'", "linear, mlp, swiglu, or MODULE:NAME"),
    ("model.ttt.learner=my lab:gated", "model.ttt.learner='my lab:gated'", "linear, mlp, swiglu, or MODULE:NAME"),
    ("model.ttt.learner=mylab.learners:a.b", "model.ttt.learner='mylab.learners:a.b'", "MODULE:NAME, such as"),
    ("model.ttt.objective=huber", "model.ttt.objective='huber'", "squared_error, dot_product"),
    ("model.ttt.rate=tanh", "model.ttt.rate='tanh'", "sigmoid/d, sigmoid, softplus"),
    ("model.ttt.position_rate=2/t", "model.ttt.position_rate='2/t'", "1/t, 1"),
    ("model.ttt.update=sgd + adam", "model.ttt.update='sgd + adam'", "sgd, or some of decay, momentum"),
    ("model.ttt.update=muon", "model.ttt.update='muon'", "expected the reading 'previous'"),
    ("model.ttt.reading=next", "model.ttt.reading='next'", "causal, previous"),
]


@pytest.mark.parametrize(("override", "beginning", "accepted"), CHOICES, ids=[r[0] for r in CHOICES])
def test_refused_choices_of_an_inner_loop(override, beginning, accepted):
    message = error_of(parse, "model.mixer=ttt", override)
    assert message.startswith(beginning)
    assert accepted in message[len(beginning) :]


def test_a_key_that_a_method_hides_is_set_like_others():
    """ConfigDict has a method ``update``."""
    assert (
        parse("model.mixer=ttt", "model.ttt.update=momentum", "model.ttt.update=decay").model.ttt["update"] == "decay"
    )


EDGES = [
    ("optimizer.end_lr=inf", "optimizer.end_lr=inf"),
    ("optimizer.weight_decay=inf", "optimizer.weight_decay=inf"),
    ("model.width[0]=3", "model.width[0]: unknown key"),
    ("training.duration=1e308", "training.duration='1e308'"),
    ("training.duration=1e300 tokens", "training.duration='1e300 tokens'"),
    ("model.width=a\nb", "model.width=a"),
    ("model.ttt.mlp_width_factor=1e308", "model.ttt.mlp_width_factor=1e+308"),
]


@pytest.mark.parametrize(("override", "beginning"), EDGES, ids=[r[0].replace("\n", "-") for r in EDGES])
def test_refused_at_the_edges(override, beginning):
    assert error_of(parse, "model.mixer=ttt_mlp", override).startswith(beginning)


def test_a_divisor_is_suggested_without_trying_every_number():
    assert "a divisor, such as " in error_of(parse, "model.width=1000000000000001")


def test_learner_without_a_hidden_layer_is_refused():
    message = error_of(parse, "model.mixer=ttt_mlp", "model.ttt.mlp_width_factor=0.03")
    assert message == "model.ttt.mlp_width_factor=0.03: expected at least 1 / 32"
    assert parse("model.ttt.mlp_width_factor=0.03").model.mixer == "ttt_linear"  # which has no hidden layer


def test_an_mlp_cannot_start_at_zero():
    message = error_of(parse, "model.mixer=ttt_mlp", "model.ttt.learned_w0=false")
    assert message.startswith("model.ttt.learned_w0=False: with two or more layers of zeros all gradients are zero")
    assert not parse("model.ttt.learned_w0=false").model.ttt.learned_w0


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config.model.width=32"]], ids=str)
def test_missing_config_argument(arguments):
    message = error_of(config_lib.from_arguments, arguments)
    assert message.startswith("--config: missing")
    assert "--config configs/quickstart.py" in message


@pytest.mark.parametrize("arguments", [["--config=nowhere/x.py"], ["--config", "nowhere/x.py:ttt_mlp"]], ids=str)
def test_config_file_that_is_not_there(arguments):
    message = error_of(config_lib.from_arguments, arguments)
    assert message == "--config nowhere/x.py: no such file; expected a Python file with get_config()"


@pytest.mark.parametrize("argument", ["stray", "--foo=3", "--flagfile=/etc/passwd", "--undefok=x", "-foo"])
def test_unexpected_argument(argument):
    assert argument.lstrip("-").split("=")[0] in error_of(
        config_lib.from_arguments, ["--config", str(QUICKSTART), argument]
    )


# ---- Config files

BROKEN_FILES = {
    # name: (lines after `c = config.default()`, which is line 5; line of the error; what is said besides the place)
    "unknown_key": ("    c.seed = 1\n    c.model.widht = 3\n", 7, ["widht", "unknown key", "width"]),
    "wrong_type": ("    c.model.width = 'wide'\n", 6, ["width=wide", "an integer"]),
    "wrong_number": ("\n    c.model.width = 1.5\n", 7, ["width=1.5", "an integer"]),
    "section": ("    c.model = 3\n", 6, ["model=3", "a section"]),
    "unknown_section": ("    c.modle.width = 3\n", 6, ["modle", "model"]),
    "syntax": ("    c.model.width = = 3\n", 6, ["syntax"]),
    "name": ("    c.model.width = wdith\n", 6, ["wdith"]),
    "module": ("    import no_such_module_at_all\n", 6, ["no_such_module_at_all"]),
    "arithmetic": ("    c.model.width = 1 // 0\n", 6, ["division"]),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_error_in_a_config_file_names_file_and_line(tmp_path, name):
    body, line, essentials = BROKEN_FILES[name]
    path = tmp_path / f"{name}.py"
    path.write_text(GET_CONFIG + body + "    return c\n")
    message = error_of(parse, file=path)
    assert f"{path}, line {line}" in message
    assert all(text in message for text in essentials)


@pytest.mark.parametrize("text", ["x = 3\n", "def get_config(arg=''):\n    return 3\n", "def get_config(): pass\n"])
def test_config_file_without_a_config(tmp_path, text):
    path = tmp_path / "empty.py"
    path.write_text(text)
    message = error_of(parse, file=path)
    assert str(path) in message
    assert "get_config" in message


def test_config_files_import_their_neighbours(tmp_path, monkeypatch):
    """Also those of a folder beside them, from any working directory, under names that other modules have."""
    for folder, seed in (("a", 5), ("b", 6)):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "json.py").write_text(GET_CONFIG + f"    c.seed = {seed}\n    return c\n")
        (tmp_path / folder / "inner" / "wide.py").write_text("from .. import json\nWIDTH = 64\n")
        mine = "from . import json\nfrom .inner.wide import WIDTH\n\ndef get_config(arg=''):\n"
        mine += "    from .json import get_config as again\n    c = again()\n    c.model.width = WIDTH\n    return c\n"
        (tmp_path / folder / "my.own.py").write_text(mine)
    modules, path = set(sys.modules), list(sys.path)
    for where, file in (("/", tmp_path / "a" / "my.own.py"), (tmp_path / "b", "my.own.py")):
        monkeypatch.chdir(where)
        config = config_lib.from_arguments(["--config", str(file), "--config.model.num_heads=4"])
        assert (config.seed, config.model.width) == (5 if where == "/" else 6, 64)
    assert (set(sys.modules), sys.path) == (modules, path)


def test_a_file_of_ones_own_starts_from_a_recipe_as_the_docs_say(tmp_path, monkeypatch):
    (code,) = re.findall(
        r"```python\n(from .configs import .*?)```", (CONFIGS.parent / "docs/recipes.md").read_text(), re.S
    )
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path / "configs")
    recipe = config_lib.from_arguments(["--config", "paper.py:ttt_mlp-125m-books-8k"])
    points = points_lib.make([str(tmp_path / "mine.py")], {}, [{"seed": "1"}])
    found = config_lib.differing_keys(recipe.to_dict(), points.configs[0].to_dict())
    assert found == {"model.ttt.mlp_depth": (2, 3), "seed": (0, 1)}


@pytest.mark.parametrize(
    ("text", "place", "essential"),
    [
        ("x = 1\ny = 1 // 0\n", "base.py, line 2", "division"),
        ("x = = 1\n", "base.py, line 1", "syntax"),
        ("x = 1\n", "mine.py, line 1", "cannot import name 'get_config'"),
        (GET_CONFIG + "    c.model.widht = 3\n", "base.py, line 6", "did you mean model.width?"),
    ],
)
def test_error_in_a_neighbour_of_a_config_file_names_file_and_line(tmp_path, text, place, essential):
    (tmp_path / "base.py").write_text(text)
    (tmp_path / "mine.py").write_text("from .base import get_config\n")
    message = error_of(parse, file=tmp_path / "mine.py")
    assert message.startswith(f"{tmp_path}/{place}: ")
    assert essential in message


def test_a_neighbour_that_is_missing_is_named_with_the_folder(tmp_path):
    (tmp_path / "mine.py").write_text("from . import papr\n")
    message = error_of(parse, file=tmp_path / "mine.py")
    assert message.startswith(f"{tmp_path}/mine.py, line 1: ImportError: cannot import name 'papr' from ")
    assert f"({tmp_path})" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.model.extra = 3", "{file}: model.extra: unknown key; did you mean model."),
        ("del c.optimizer.end_lr", "{file}: optimizer.end_lr: missing; expected a config that starts from "),
        ("del c.model", "{file}: model.mixer: missing; expected a config that starts from "),
        ("c.model.width = True", "model.width=True: expected an integer"),
        ("c.model.width = None", "model.width=None: expected an integer"),
    ],
)
def test_a_tree_that_a_config_file_bends(tmp_path, line, message):
    file = tmp_path / "mine.py"
    file.write_text(GET_CONFIG + f"    with c.unlocked():\n        {line}\n    return c\n")
    assert error_of(config_lib.from_arguments, ["--config", str(file)]).startswith(message.format(file=file))


def test_a_config_file_is_read_anew_each_time(tmp_path):
    other = tmp_path / "other.py"
    other.write_text(GET_CONFIG + "    c.seed = 5\n    return c\n")
    assert [parse(file=path).seed for path in (other, QUICKSTART, other)] == [5, 0, 5]
    other.write_text(GET_CONFIG + "    c.seed = 66\n    return c\n")
    assert parse(file=other).seed == 66


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


# ---- Durations


@pytest.fixture
def config():
    """2000 steps of 10 x 100 tokens."""
    config = config_lib.default()
    config.data.update(batch_size=10, sequence_length=100)
    config.training.duration = "2000 steps"
    return config


DURATIONS = {
    "300": 300,
    "300 steps": 300,
    "1 step": 1,
    "  7  ": 7,
    "2.5e3": 2500,
    "1e+2 steps": 100,
    "1.5k": 1500,
    "2k steps": 2000,
    "3M": 3_000_000,
    "1B": 1_000_000_000,
    "1000 tokens": 1,
    "5000 tokens": 5,
    "2.5e6 tokens": 2500,
    "2.5M tokens": 2500,
    "1 B tokens": 1_000_000,
    "1499 tokens": 1,
    "1501 tokens": 2,
    "1 token": 1,  # never less than one step
    "0.2": 1,
    "10%": 200,
    "10 %": 200,
    "0.5%": 10,
    "0.001%": 1,
    "100%": 2000,
}


@pytest.mark.parametrize("text", DURATIONS)
def test_durations(config, text):
    config.checkpoint.every = text
    assert config_lib.steps(config, "checkpoint.every") == DURATIONS[text]
    if "%" not in text:
        config.training.duration = text
        assert config_lib.steps(config, "training.duration") == DURATIONS[text]


def test_percent_is_of_the_run_however_its_length_is_given(config):
    config.training.duration, config.checkpoint.every = "500k tokens", "10%"
    assert config_lib.steps(config, "training.duration") == 500
    assert config_lib.steps(config, "checkpoint.every") == 50


def test_only_milestones_may_be_empty(config):
    assert config_lib.steps(config, "checkpoint.milestone_every") == 0
    config.checkpoint.every = ""
    assert "checkpoint.every=''" in error_of(config_lib.steps, config, "checkpoint.every")


@pytest.mark.parametrize(
    "text", ["0", "-5", "5 epochs", "ten", "10%%", "100.1%", "1e400", "nan", "inf", "1.2.3", "1,000", "1K", "0 tokens"]
)
def test_bad_durations(config, text):
    for key in ("checkpoint.every", "training.duration"):
        with config.unlocked():
            section, name = key.split(".")
            config[section][name] = text
        assert error_of(config_lib.steps, config, key).startswith(f"{key}={text!r}: expected a duration")


# ---- Meshes


def mesh_shape(devices, batch_size=8, accumulation=1, **sizes):
    config = config_lib.default()
    config.mesh.update(sizes)
    config.data.batch_size, config.training.accumulation = batch_size, accumulation
    return config_lib.mesh_shape(config, devices)


def test_mesh_shapes():
    assert mesh_shape(1) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert mesh_shape(8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh_shape(8, fsdp=2, tensor=2) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh_shape(8, data=1, fsdp=-1, tensor=2) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert mesh_shape(6, data=3, fsdp=2, tensor=1, batch_size=12) == {"data": 3, "fsdp": 2, "tensor": 1}
    assert mesh_shape(8, batch_size=16, accumulation=2)["data"] == 8
    assert mesh_shape(6, batch_size=1, data=1, tensor=6)["tensor"] == 6  # which does not split the batch


@pytest.mark.parametrize(
    ("devices", "sizes", "essentials"),
    [
        (8, {"data": 3}, ["mesh.data=3", "8 devices"]),
        (8, {"data": 2}, ["mesh.data=2", "mesh.fsdp=1", "mesh.tensor=1", "8 devices", "product is 8"]),
        (1, {"tensor": 2}, ["mesh.tensor=2", "1 devices"]),
        (4, {"data": 8}, ["mesh.data=8", "4 devices"]),
        (8, {"fsdp": -1}, ["mesh.fsdp=-1", "mesh.data is -1 too", "one -1 at most"]),
        (8, {"data": 1, "fsdp": -1, "tensor": -1}, ["mesh.tensor=-1", "mesh.fsdp is -1 too"]),
        (8, {"data": 0}, ["mesh.data=0", "a positive number of devices, or -1"]),
        (8, {"tensor": -2}, ["mesh.tensor=-2", "a positive number of devices, or -1"]),
        (8, {"data": 1, "tensor": 8}, ["mesh.tensor=8", "model.num_heads=12", "a divisor"]),
        (8, {"batch_size": 12}, ["data.batch_size=12", "8 devices", "a multiple of 8"]),
        (8, {"batch_size": 4, "data": 2, "fsdp": 4}, ["data.batch_size=4", "8 devices", "mesh.data x mesh.fsdp"]),
        (
            8,
            {"batch_size": 8, "accumulation": 2},
            ["data.batch_size=8", "training.accumulation=2", "a multiple of 16"],
        ),
    ],
    ids=str,
)
def test_meshes_that_do_not_fit(devices, sizes, essentials):
    message = error_of(mesh_shape, devices, **sizes)
    assert all(text in message for text in essentials), message


# ---- config.json


def test_json_holds_a_config_completely(tmp_path):
    config = parse("model.mixer=ttt_mlp", "model.ttt.base_lr=0.3", "model.tie_embeddings=false", "seed=7")
    assert config.model.pre_conv is None  # some keys are set, some are not
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    again = config_lib.from_json(path)
    assert again.to_dict() == config.to_dict()
    assert again.is_locked
    with pytest.raises(TypeError):
        again.model.pre_conv = "no"  # unset, and still a bool


def test_json_of_an_older_version_has_defaults_for_newer_keys(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model": {"width": 64, "num_heads": 2}}')
    changed = config_lib.differing_keys(config_lib.from_json(path).to_dict(), config_lib.default().to_dict())
    assert changed == {"model.width": (64, 768), "model.num_heads": (2, 12)}


def test_json_that_is_not_there(tmp_path):
    message = error_of(config_lib.from_json, tmp_path / "config.json")
    assert message == f"{tmp_path / 'config.json'}: not found; expected the workdir of a run, with its config.json"


@pytest.mark.parametrize(
    ("text", "essential"),
    [
        ("", "config.json"),
        ('{"seed": ', "config.json"),
        ("[1]", "config.json"),
        ("null", "config.json"),
        ('{"model": 3}', "config.json"),
        ('{"model": {"widht": 3}}', "widht"),
        ('{"model": {"width": "3"}}', "width"),
        ('{"model": {"width": 1.5}}', "width"),
        ('{"model": {"width": null}}', "width"),
        ('{"model": {"width": -1}}', "model.width=-1"),
        ('{"optimizer": {"peak_lr": NaN}}', "optimizer.peak_lr=nan"),
    ],
)
def test_json_that_is_no_config(tmp_path, text, essential):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert essential in error_of(config_lib.from_json, path)


def test_differing_keys():
    a = {"x": 1, "s": {"y": 2, "only_a": 3}, "t": {"z": math.inf}}
    b = {"x": 1, "s": {"y": 4}, "t": 5}
    assert config_lib.differing_keys(a, b) == {"s.only_a": (3, None), "s.y": (2, 4), "t": ({"z": math.inf}, 5)}
    assert config_lib.differing_keys(a, a) == {}


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("model.mixer", MIXERS),
        ("model.ttt.learner", LEARNERS),
        ("model.ttt.objective", OBJECTIVES),
        ("model.ttt.rate", TOKEN_RATES),
        ("model.ttt.position_rate", POSITION_RATES),
        ("model.ttt.update", MEMBERS),
        ("model.ttt.reading", READINGS),
    ],
)
def test_the_help_of_a_choice_names_all_that_is_registered(key, names):
    said = re.split(r"[\s,:;()]+", config_lib.settings()[key].meaning)
    assert [name for name in names if name not in said] == []
