"""Test what is refused when a run is continued: a damaged config, and a changed or strange learner."""

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
from ttt_jax.storage.json_files import DamagedFile
from ttt_jax.training import loop, run_config
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.run_config import LEARNER

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
    """Return the source file of the learner, in a folder on the path of modules."""
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
def test_a_learner_that_fails_is_refused_in_one_line(lab, body, message, tiny_config):
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
    """Return the source file after a change that makes its import fail."""
    lab.write_text(SOURCE + "raise AssertionError('this has been run')\n")
    sys.modules.pop("ttt_learner_of_a_test", None)
    yield lab
    lab.write_text(SOURCE)


@pytest.fixture(scope="module")
def finished(lab, tmp_path_factory, tiny_config):
    """Return the workdir of a run of two steps, trained. Tests must not change it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert loop.train(tiny_config(CHANGES), workdir).step == 2
    return workdir


@pytest.fixture(scope="module")
def saved(lab, tmp_path_factory, tiny_config, save_run):
    """Return the workdir of a run of one step, made without training."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    config = run_config.with_learner_source(tiny_config(CHANGES))
    save_run(workdir, config, (1,), meta={"config": config.to_dict()})
    return workdir


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def _source_of(workdir):
    return json_files.read_object(workdir / "config.json")["model"]["ttt"]["learner_source"]


@pytest.mark.slow
def test_the_hash_of_the_source_is_kept_in_config_and_checkpoints(finished):
    expected = import_path.source_hash(NAME, LEARNER)
    assert _source_of(finished) == expected
    checkpoints = Checkpoints(finished, read_only=True)
    assert checkpoints.meta(2)["config"]["model"]["ttt"]["learner_source"] == expected
    checkpoints.close()
    assert trained.load(finished).config.model.ttt.learner_source == expected


def test_training_and_evaluation_refuse_a_changed_source_without_importing_it(copy, changed, tiny_config):
    expected = f"^model.ttt.learner='{NAME}': {changed} has changed since .* ttt train --accept-changed-learner [^\n]*$"
    with pytest.raises(ConfigError, match=expected):
        loop.train(tiny_config({**CHANGES, "training.duration": "3 steps"}), copy)
    with pytest.raises(ConfigError, match=expected):
        trained.load(copy)
    (copy / "config.json").unlink()  # the copy in the checkpoint says the same
    with pytest.raises(ConfigError, match=expected):
        trained.load(copy)


@pytest.mark.slow
def test_an_accepted_change_of_the_source_is_recorded(finished, tmp_path, lab, tiny_config, capsys):
    copy = shutil.copytree(finished, tmp_path / "run")
    before = _source_of(copy)
    try:
        lab.write_text(SOURCE + "# another comment\n")
        assert loop.train(tiny_config(CHANGES), copy, accept_changed_learner=True).step == 2
        assert "has changed since the run began; accepted" in capsys.readouterr().err
        assert _source_of(copy) == import_path.source_hash(NAME, LEARNER) != before
        trained.load(copy)  # although the checkpoint has the old hash
        assert loop.train(tiny_config(CHANGES), copy).step == 2
    finally:
        lab.write_text(SOURCE)
    with pytest.raises(ConfigError, match="has changed since the run began"):
        trained.load(copy)


def test_accept_changed_learner_reaches_the_loop(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(config_lib, "from_arguments", lambda rest: None)
    monkeypatch.setattr(
        loop, "train", lambda config, workdir, **options: asked.append(options) or loop.Outcome(0, 0, None, None)
    )
    for flag in ([], ["--accept-changed-learner"]):
        assert cli.main(["train", "--config", "x.py", "--workdir", str(tmp_path), *flag]) == 0
    assert asked == [{"accept_changed_learner": False}, {"accept_changed_learner": True}]


def test_a_missing_learner_is_refused(copy, lab, tiny_config):
    lab.unlink()
    try:
        for use in (lambda: trained.load(copy), lambda: loop.train(tiny_config(CHANGES), copy)):
            with pytest.raises(ConfigError, match=r"^model\.ttt\.learner=.*: no module ttt_learner_of_a_test here"):
                use()
    finally:
        lab.write_text(SOURCE)


def test_a_config_with_the_hash_of_another_source_is_refused(lab, tmp_path, tiny_config):
    config = tiny_config({**CHANGES, "model.ttt.learner_source": "0" * 64})
    with pytest.raises(ConfigError, match=r"has changed since the run began \(its SHA-256 was 000000000000\.\.\."):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_learner_in_the_workdir_is_refused(copy, monkeypatch, tiny_config):
    (copy / "ttt_learner_of_a_stranger.py").write_text("raise AssertionError('this has been run')\n")
    monkeypatch.syspath_prepend(copy)
    config = tiny_config({**CHANGES, "model.ttt.learner": "ttt_learner_of_a_stranger:gated"})
    with pytest.raises(ConfigError, match=f"^model.ttt.learner=.* is inside the workdir {re.escape(str(copy))}, from"):
        loop.train(config, copy)
    run_config.write(copy, config)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ConfigError, match="is inside the workdir"):
        run_config.load(copy)


def test_registered_learners_get_no_hash(tiny_config):
    config = tiny_config({"model.ttt.learner": "linear"})
    assert run_config.with_learner_source(config) == config


@pytest.mark.parametrize(
    ("content", "said"), [("", "damaged: it is empty"), ("[]", "damaged: it holds no JSON object")]
)
def test_a_damaged_config_of_a_run_without_checkpoints_is_written_anew(tmp_path, capsys, content, said):
    path = tmp_path / "config.json"
    path.write_text(content)
    run_config.check_same_run(config_lib.default(), tmp_path)
    assert capsys.readouterr().err == f"{path}: {said}; no checkpoint has been saved, so the run begins anew\n"
    run_config.write(tmp_path, config_lib.default())
    assert (tmp_path / "config.json.damaged").read_text() == content
    assert run_config.load(tmp_path).to_dict() == config_lib.default().to_dict()


def test_a_damaged_config_of_a_run_whose_checkpoints_do_not_hold_it_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("")
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert run_config.saved_steps(tmp_path) == [10]
    with pytest.raises(DamagedFile, match=f"^{re.escape(str(tmp_path))}/config.json: damaged: it is empty$"):
        run_config.check_same_run(config_lib.default(), tmp_path)
