"""Check config files, which are Python and may import each other, and ``config.json``."""

import json
import re
import sys

import pytest
from parsing import CONFIGS, GET_CONFIG, QUICKSTART, error_of, parse

from ttt_jax import config as config_lib
from ttt_jax.sweep import points as points_lib

BROKEN_FILES = {
    # name: (lines after `c = config.default()`, which is line 5; line of the error; what is said besides the place)
    "unknown_key": ("    c.seed = 1\n    c.model.widht = 3\n", 7, ["widht", "unknown key", "width"]),
    "wrong_type": ("    c.model.width = 'wide'\n", 6, ["model.width=wide: expected an integer"]),
    "wrong_duration": (
        "    c.training.duration = 100\n",
        6,
        ['training.duration=100: expected a text such as "300 steps"'],
    ),
    "wrong_type_of_a_name_in_two_sections": ("    c.log.every = 100\n", 6, ["every=100: expected a text"]),
    "wrong_number": ("\n    c.model.width = 1.5\n", 7, ["width=1.5", "an integer"]),
    "section": ("    c.model = 3\n", 6, ["model=3", "a section"]),
    "unknown_section": ("    c.modle.width = 3\n", 6, ["modle", "model"]),
    "syntax": ("    c.model.width = = 3\n", 6, ["syntax"]),
    "name": ("    c.model.width = wdith\n", 6, ["wdith"]),
    "module": ("    import no_such_module_at_all\n", 6, ["no_such_module_at_all"]),
    "arithmetic": ("    c.model.width = 1 // 0\n", 6, ["division"]),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_an_error_in_a_config_file_names_file_and_line(tmp_path, name):
    body, line, essentials = BROKEN_FILES[name]
    path = tmp_path / f"{name}.py"
    path.write_text(GET_CONFIG + body + "    return c\n")
    message = error_of(parse, file=path)
    assert f"{path}, line {line}" in message
    assert all(text in message for text in essentials)


@pytest.mark.parametrize("text", ["x = 3\n", "def get_config(arg=''):\n    return 3\n", "def get_config(): pass\n"])
def test_a_file_without_a_config_is_refused(tmp_path, text):
    path = tmp_path / "empty.py"
    path.write_text(text)
    message = error_of(parse, file=path)
    assert str(path) in message
    assert "get_config" in message


def test_config_files_import_others_of_their_folder(tmp_path, monkeypatch):
    """Check also files in a subfolder, from any working directory, with names that other modules have."""
    for folder, seed in (("a", 5), ("b", 6)):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "json.py").write_text(GET_CONFIG + f"    c.seed = {seed}\n    return c\n")
        (tmp_path / folder / "inner" / "wide.py").write_text("from .. import json\nWIDTH = 64\n")
        mine = "from . import json\nfrom .inner.wide import WIDTH\n\ndef get_config(arg=''):\n"
        mine += "    from .json import get_config as again\n    c = again()\n    c.model.width = WIDTH\n    return c\n"
        (tmp_path / folder / "my.own.py").write_text(mine)
    path = list(sys.path)
    for where, file in (("/", tmp_path / "a" / "my.own.py"), (tmp_path / "b", "my.own.py")):
        monkeypatch.chdir(where)
        config = config_lib.from_arguments(["--config", str(file), "--config.model.num_heads=4"])
        assert (config.seed, config.model.width) == (5 if where == "/" else 6, 64)
    assert (sys.modules["json"], sys.path) == (json, path)
    assert not [name for name in sys.modules if name.startswith("config_files")]


def test_the_config_file_of_the_docs_starts_from_a_recipe(tmp_path, monkeypatch):
    (code,) = re.findall(
        r"```python\n(from .configs import .*?)```", (CONFIGS.parent / "docs/recipes.md").read_text(), re.S
    )
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path / "configs")
    recipe = config_lib.from_arguments(["--config", "paper.py:ttt_mlp-125m-books-8k"])
    ((_, config),) = points_lib.make([str(tmp_path / "mine.py")], {}, [{"seed": "1"}])
    found = config_lib.differing_keys(recipe.to_dict(), config.to_dict())
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
def test_an_error_in_an_imported_config_file_names_file_and_line(tmp_path, text, place, essential):
    for folder, name in ((tmp_path, "base"), (tmp_path / "inner", "inner.base")):
        folder.mkdir(exist_ok=True)
        (folder / "base.py").write_text(text)
        (tmp_path / "mine.py").write_text(f"from .{name} import get_config\n")
        message = error_of(parse, file=tmp_path / "mine.py")
        assert message.startswith(f"{folder if place.startswith('base') else tmp_path}/{place}: ")
        assert essential in message


def test_an_imported_file_that_is_missing_is_named_with_the_folder(tmp_path):
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
def test_a_config_with_other_keys_or_types_is_refused(tmp_path, line, message):
    file = tmp_path / "mine.py"
    file.write_text(GET_CONFIG + f"    with c.unlocked():\n        {line}\n    return c\n")
    assert error_of(config_lib.from_arguments, ["--config", str(file)]).startswith(message.format(file=file))


def test_a_config_file_is_read_anew_each_time(tmp_path):
    other = tmp_path / "other.py"
    other.write_text(GET_CONFIG + "    c.seed = 5\n    return c\n")
    assert [parse(file=path).seed for path in (other, QUICKSTART, other)] == [5, 0, 5]
    other.write_text(GET_CONFIG + "    c.seed = 66\n    return c\n")
    assert parse(file=other).seed == 66


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


def test_a_missing_config_json_is_named(tmp_path):
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
def test_json_that_holds_no_config_is_refused(tmp_path, text, essential):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert essential in error_of(config_lib.from_json, path)
