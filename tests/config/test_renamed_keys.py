"""Check that configs of earlier versions are read by the keys of this one, wherever they are kept."""

import copy
import json
from pathlib import Path

import pytest
import saved_runs

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError, renamed
from ttt_jax.evaluation import catalogue, evaluations
from ttt_jax.figures import ablation
from ttt_jax.storage import json_files
from ttt_jax.sweep import files, results
from ttt_jax.sweep.points import Point
from ttt_jax.training import run_config

KEY = "model.ttt.norm_residual"
QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")
MEANING = {  # of values of the key that is gone
    True: {"model.ttt.output": "residual_norm", "model.ttt.bias": True},
    False: {"model.ttt.output": "none", "model.ttt.bias": False},
}
_SINCE = ("output", "bias", "learner", "learner_source")


def as_before(norm_residual, config=None):
    """Return a config as it was written when it had the key ``model.ttt.norm_residual``."""
    found = copy.deepcopy((config or config_lib.default()).to_dict())
    for name in _SINCE:
        del found["model"]["ttt"][name]
    found["model"]["ttt"]["norm_residual"] = norm_residual
    return found


def expected(norm_residual):
    config = config_lib.default()
    for key, value in MEANING[norm_residual].items():
        config.model.ttt[key.rpartition(".")[2]] = value
    return config


@pytest.mark.parametrize("value", [True, False])
def test_a_config_with_old_keys_keeps_its_meaning(value, tmp_path):
    before = as_before(value)
    unchanged = copy.deepcopy(before)
    assert renamed.current(before) == expected(value).to_dict()
    assert before == unchanged
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert config_lib.from_json(tmp_path / "config.json") == expected(value)
    assert renamed.current(expected(value).to_dict()) == expected(value).to_dict()


def test_a_section_whose_keys_have_all_moved_is_gone():
    before = config_lib.default().to_dict()
    del before["model"]["attention"]
    before["model"]["sliding"] = {"window": 77}
    expected = config_lib.default()
    expected.model.attention.window = 77
    assert renamed.current(before) == expected.to_dict()


def test_keys_that_did_not_exist_get_their_defaults(tmp_path):
    before = as_before(True)
    del before["model"]["ttt"]["norm_residual"], before["optimizer"]["spike_factor"], before["log"]
    assert renamed.current(before) == config_lib.default().to_dict()


@pytest.mark.parametrize("content", [{}, [], None, {"model": 3}, {"model": {"ttt": 3}}, {"model": {"ttt": {"a": 1}}}])
def test_json_that_is_no_config_is_returned_as_it_is(content):
    before = copy.deepcopy(content)
    found = renamed.current(content)
    assert content == before
    assert found == content if not content else found["model"] != config_lib.default().model.to_dict()


def test_old_keys_are_gone_and_new_ones_exist():
    known = config_lib.settings().keys()
    for key, meaning in renamed.RENAMED.items():
        assert key not in known
        for value in (True, False):
            assert meaning(value).keys() <= known


def test_config_json_and_its_copy_in_the_checkpoint_may_have_different_versions(tmp_path):
    meta = tmp_path / "checkpoints" / "3" / "meta" / "metadata"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"config": as_before(False)}))
    json_files.write_object(tmp_path / "config.json", expected(False).to_dict())
    assert run_config.load(tmp_path) == expected(False)
    (tmp_path / "config.json").unlink()
    assert run_config.load(tmp_path) == expected(False)
    json_files.write_object(tmp_path / "config.json", expected(True).to_dict())
    with pytest.raises(ConfigError, match=r"model\.ttt\.bias False 3, True config.json, model.ttt.output 'none' 3, "):
        run_config.load(tmp_path)


def test_old_evaluations_are_compared_with_new_ones(tmp_path):
    rows = []
    for name, perplexity, value in (("a", 15.27, False), ("b", 14.05, True)):
        keys = {key.replace(".", "__"): each for key, each in MEANING[value].items()}
        batch = {"model__ttt__backbone": "transformer", "model__ttt__learned_eta": False, "model__ttt__mini_batch": 64}
        rows.append(saved_runs.run(tmp_path / name, perplexity=perplexity, **batch, **keys))
    old = rows[0] / "eval" / "validation-64.json"
    about = json_files.read_object(old)
    config = config_lib.default()
    config.update(about["config"])
    json_files.write_object(old, {**about, "config": as_before(False, config)})
    assert evaluations.read(rows[0], "validation").about["config"]["model"]["ttt"]["output"] == "none"
    assert catalogue.entries(rows[0] / "eval", "validation")[0].about["config"]["model"]["ttt"]["bias"] is False
    table = ablation.rows([str(row) for row in rows], published=True)
    assert [row.name for row in table] == ["TTT-Linear (Transformer backbone)", "+ LN and residual in f"]
    assert [row.published for row in table] == [15.27, 14.05]


def test_biases_alone_are_not_a_step_of_the_paper(tmp_path):
    steps = [("residual_norm", True), ("residual_norm", False), ("none", False), ("residual_norm", False)]
    runs = [
        saved_runs.run(tmp_path / f"{i}", noise=i, model__ttt__output=output, model__ttt__bias=bias)
        for i, (output, bias) in enumerate(steps)
    ]
    names = [row.name for row in ablation.rows([str(run) for run in runs])]
    assert names[1:] == ["+ bias=false", "+ output=none", "+ LN and residual in f"]


def test_a_sweep_over_an_old_key_continues_with_the_new_keys(tmp_path):
    points = [{"name": f"norm_residual={v}", "recipe": "r.py", "values": {KEY: v}, "steps": 3} for v in (True, False)]
    content = {"version": 1, "base": {KEY: True, "seed": 1}, "axes": [], "points": points}
    json_files.write_object(tmp_path / "sweep.json", content)
    found = files.find_sweep(tmp_path)
    assert found.base == {**MEANING[True], "seed": 1}
    assert found.points == [Point(f"norm_residual={v}", "r.py", MEANING[v], 3) for v in (True, False)]
    assert found.keys == ["model.ttt.output", "model.ttt.bias"]
    for point in found.points:
        (tmp_path / point.name).mkdir()
        (tmp_path / point.name / "config.json").write_text(json.dumps(as_before(point.values["model.ttt.bias"])))
        (tmp_path / point.name / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    listed = results.of_sweep(tmp_path, "loss")
    assert listed.keys == found.keys
    assert [{key: each.config[key] for key in found.keys} for each in listed.results] == [MEANING[True], MEANING[False]]


@pytest.mark.parametrize("value", ["false", "true", "False"])
def test_an_old_key_on_the_command_line_is_refused_with_its_new_names(value):
    with pytest.raises(ConfigError) as caught:
        config_lib.from_arguments(["--config", QUICKSTART, f"--config.{KEY}={value}"])
    new = {"false": "none --config.model.ttt.bias=false", "true": "residual_norm --config.model.ttt.bias=true"}
    assert str(caught.value) == (
        f"{KEY}: is now model.ttt.output and model.ttt.bias; expected --config.model.ttt.output={new[value.lower()]}"
    )


def test_an_old_key_in_a_config_file_is_refused_with_its_new_names(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ttt_jax import config\n\n\ndef get_config(arg=''):\n    c = config.default()\n"
        "    c.model.ttt.norm_residual = False\n    return c\n"
    )
    with pytest.raises(ConfigError, match=rf"mine.py, line 6: {KEY}: is now model.ttt.output and model.ttt.bias; "):
        config_lib.from_arguments(["--config", str(file)])
