"""The source of a learner of the user's own is kept with the run, and a changed one is refused before it runs."""

import importlib
import re
import shutil
import sys

import pytest

from ttt_jax import cli, import_path
from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.evaluation import trained
from ttt_jax.models import language_model
from ttt_jax.storage import json_files
from ttt_jax.training import loop, resume, run_config
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.resume import LEARNER

NAME = "ttt_learner_of_a_test:gated"
SOURCE = "def gated(dense, x):\n    return dense(x, x.shape[-1])\n"
CHANGES = {
    "model.mixer": "ttt",
    "model.ttt.learner": NAME,
    "training.duration": "2 steps",
    "checkpoint.every": "1 step",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The source file of the learner, in a folder that Python looks for modules in."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        file = folder / "ttt_learner_of_a_test.py"
        file.write_text(SOURCE)
        yield file


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return dens(x, 2)", "fails: {file}, line 3: NameError: name 'dens' is not defined"),
        ("return dense(x, 2)[0] @ x.reshape(3, -1)", "fails: {file}, line 3: TypeError: "),
        ("dense(x, 2)", "broken returns None; expected an array [..., tokens, features], one row per token"),
        ("return x", "broken does not call dense; expected a call for each of its weight matrices"),
    ],
)
def test_a_learner_that_does_not_work_is_refused_in_a_line(lab, body, message, tiny_config):
    file = lab.with_name("ttt_broken_learner.py")
    file.write_text(f"def broken(dense, x):\n    # comment\n    {body}\n")
    importlib.invalidate_caches()
    sys.modules.pop("ttt_broken_learner", None)
    sys.path_importer_cache.clear()
    name = "ttt_broken_learner:broken"
    config = tiny_config({"model.mixer": "ttt", "model.ttt.learner": name})
    with pytest.raises(ConfigError) as caught:
        language_model.build_model(config.model)
    assert str(caught.value).startswith(f"model.ttt.learner={name!r}: {message.format(file=file)}")


@pytest.fixture
def changed(lab):
    """The source file, which has been changed: importing it fails."""
    lab.write_text(SOURCE + "raise AssertionError('this has been run')\n")
    sys.modules.pop("ttt_learner_of_a_test", None)
    yield lab
    lab.write_text(SOURCE)


@pytest.fixture(scope="module")
def finished(lab, tmp_path_factory, tiny_config):
    """The workdir of a run of two steps, which tests leave as it is."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert loop.train(tiny_config(CHANGES), workdir).step == 2
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def _source_of(workdir):
    return json_files.read_object(workdir / "config.json")["model"]["ttt"]["learner_source"]


def test_the_hash_of_the_source_is_in_the_run_and_in_its_checkpoints(finished):
    expected = import_path.source_hash(NAME, LEARNER)
    assert _source_of(finished) == expected
    checkpoints = Checkpoints(finished, read_only=True)
    assert checkpoints.meta(2)["config"]["model"]["ttt"]["learner_source"] == expected
    checkpoints.close()
    assert trained.load(finished).config.model.ttt.learner_source == expected


def test_a_changed_source_is_refused_by_training_and_evaluation_before_it_runs(copy, changed, tiny_config):
    expected = f"^model.ttt.learner='{NAME}': {changed} has changed since .* ttt train --accept-changed-learner [^\n]*$"
    with pytest.raises(ConfigError, match=expected):
        loop.train(tiny_config({**CHANGES, "training.duration": "3 steps"}), copy)
    with pytest.raises(ConfigError, match=expected):
        trained.load(copy)
    (copy / "config.json").unlink()  # the copy in the checkpoint says the same
    with pytest.raises(ConfigError, match=expected):
        trained.load(copy)


def test_a_changed_source_is_recorded_once_it_is_accepted(copy, lab, tiny_config, capsys):
    before = _source_of(copy)
    try:
        lab.write_text(SOURCE + "# another comment\n")
        assert loop.train(tiny_config(CHANGES), copy, accept_changed_learner=True).step == 2
        assert "has changed since the run began; accepted" in capsys.readouterr().err
        assert _source_of(copy) == import_path.source_hash(NAME, LEARNER) != before
        trained.load(copy)  # although the checkpoint says what it was trained with
        assert loop.train(tiny_config(CHANGES), copy).step == 2
    finally:
        lab.write_text(SOURCE)
    with pytest.raises(ConfigError, match="has changed since the run began"):
        trained.load(copy)


def test_the_flag_of_the_command_accepts_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(config_lib, "from_arguments", lambda rest: None)
    monkeypatch.setattr(
        loop, "train", lambda config, workdir, **options: asked.append(options) or loop.Outcome(0, 0, None, None)
    )
    for flag in ([], ["--accept-changed-learner"]):
        assert cli.main(["train", "--config", "x.py", "--workdir", str(tmp_path), *flag]) == 0
    assert asked == [{"accept_changed_learner": False}, {"accept_changed_learner": True}]


def test_a_learner_that_is_gone_is_refused(copy, lab, tiny_config):
    lab.unlink()
    try:
        for use in (lambda: trained.load(copy), lambda: loop.train(tiny_config(CHANGES), copy)):
            with pytest.raises(ConfigError, match=r"^model\.ttt\.learner=.*: no module ttt_learner_of_a_test here"):
                use()
    finally:
        lab.write_text(SOURCE)


def test_a_config_may_say_which_source_it_takes(lab, tmp_path, tiny_config):
    config = tiny_config({**CHANGES, "model.ttt.learner_source": "0" * 64})
    with pytest.raises(ConfigError, match=r"has changed since the run began \(its SHA-256 was 000000000000\.\.\."):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_learner_is_taken_from_the_workdir(copy, monkeypatch, tiny_config):
    (copy / "ttt_learner_of_a_stranger.py").write_text("raise AssertionError('this has been run')\n")
    monkeypatch.syspath_prepend(copy)
    config = tiny_config({**CHANGES, "model.ttt.learner": "ttt_learner_of_a_stranger:gated"})
    with pytest.raises(ConfigError, match=f"^model.ttt.learner=.* is inside the workdir {re.escape(str(copy))}, from"):
        loop.train(config, copy)
    run_config.write(copy, config)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ConfigError, match="is inside the workdir"):
        run_config.load(copy)


def test_registered_learners_have_no_source(tiny_config):
    config = tiny_config({"model.ttt.learner": "linear"})
    assert resume.with_learner_source(config) == config
