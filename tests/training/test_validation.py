"""Test the loss of held-out windows during training, and that the checkpoint with the lowest is kept."""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.data.token_source import TokenSource
from ttt_jax.distributed import sharding
from ttt_jax.evaluation import trained
from ttt_jax.evaluation.evaluate import Selection, evaluate
from ttt_jax.training import loop, metrics, validation
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.step import build_program

EVERY = {
    "model.mixer": "attention",
    "evaluation.every": "6 steps",
    "evaluation.windows": 5,
    "checkpoint.keep_last": 9,
    "log.every": "4 steps",
}


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """Return the workdir of a run of 24 steps with four evaluations."""
    workdir = tmp_path_factory.mktemp("validated") / "run"
    loop.train(tiny_config(EVERY), workdir)
    return workdir


@pytest.mark.slow
def test_losses_equal_those_of_ttt_eval(run):
    validated = {record["step"]: record for record in metrics.read(run) if validation.LOSS in record}
    assert list(validated) == [6, 12, 18, 24]
    for step in (6, 24):
        expected = evaluate(trained.load(run, step), Selection(64, most=5)).about
        assert validated[step][validation.LOSS] == pytest.approx(expected["loss"], rel=1e-5)
        assert validated[step]["validation_perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert validated[24][validation.LOSS] < validated[6][validation.LOSS] - 0.05


@pytest.mark.slow
def test_each_loss_is_in_the_record_of_its_step(run):
    """Check also steps that are no multiple of log.every; the other records have no losses."""
    records = metrics.read(run)
    assert [record["step"] for record in records] == [4, 6, 8, 12, 16, 18, 20, 24]
    for record in records:
        evaluated = record["step"] % 6 == 0
        assert (validation.LOSS in record) == ("evaluation_seconds" in record) == evaluated
        assert {"loss", "grad_norm", "tokens", "seconds_per_step"} <= record.keys()


@pytest.mark.slow
def test_validation_does_not_change_training(run, tiny_config, tmp_path):
    loop.train(tiny_config({**EVERY, "evaluation.every": ""}), tmp_path)
    with_validation = {r["step"]: r["loss"] for r in metrics.read(run)}
    without = {r["step"]: r["loss"] for r in metrics.read(tmp_path)}
    assert without.keys() < with_validation.keys()
    assert all(with_validation[step] == loss for step, loss in without.items())


@pytest.fixture
def scripted(monkeypatch):
    """Return ``scripted({step: loss})``, which sets the losses that validations return."""

    def script(losses, seconds=0.0):
        steps = iter(sorted(losses))

        def say(self, params):
            time.sleep(seconds)
            return {validation.LOSS: losses[next(steps)]}

        monkeypatch.setattr(validation.Validation, "__call__", say)

    return script


def kept(workdir):
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.all_steps()
    checkpoints.close()
    return steps


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(scripted, tiny_config, tmp_path, capsys):
    """Validate at steps 4, 8, ... 24 and save also at 10 and 20; besides the best, the newest alone is kept."""
    changes = {"evaluation.every": "4 steps", "checkpoint.every": "10 steps", "checkpoint.keep_last": 1}
    scripted({4: 5.0, 8: 2.0, 12: 3.0, 16: float("nan"), 20: 2.0, 24: 4.0})
    loop.train(tiny_config(changes), tmp_path)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "validation" in line]
    assert warnings == ["validation loss is nan at step 16: the checkpoint of this step is never the best one"]
    assert kept(tmp_path) == [8, 24]
    assert trained.steps(tmp_path, "best") == [8]


@pytest.mark.slow
def test_the_time_of_validation_is_not_counted_as_steps(scripted, tiny_config, tmp_path):
    scripted({12: 1.0, 24: 1.0}, seconds=1.0)
    loop.train(tiny_config({"evaluation.every": "12 steps"}), tmp_path)
    records = metrics.read(tmp_path)
    assert [record["evaluation_seconds"] >= 1 for record in records if "evaluation_seconds" in record] == [True, True]
    assert sum(record["seconds_per_step"] for record in records) < 2  # the validations alone take 2 s


@pytest.mark.slow
def test_a_resumed_run_remembers_the_best_checkpoint(scripted, tiny_config, tmp_path):
    changes = {"evaluation.every": "4 steps", "checkpoint.every": "4 steps", "checkpoint.keep_last": 1}
    scripted({4: 2.0, 8: 3.0, 12: 4.0})
    loop.train(tiny_config({**changes, "training.duration": "12 steps"}), tmp_path)
    assert kept(tmp_path) == [4, 12]
    scripted({16: 3.0, 20: 1.0, 24: 1.5})
    loop.train(tiny_config(changes), tmp_path)
    assert kept(tmp_path) == [20, 24]
    assert trained.steps(tmp_path, "best") == [20]
    assert validation.read_losses(tmp_path) == {4: 2.0, 8: 3.0, 12: 4.0, 16: 3.0, 20: 1.0, 24: 1.5}


def test_a_split_that_does_not_exist_is_refused_before_the_run(tiny_config, tmp_path):
    """Train on a dataset with a train split alone."""
    np.save(tmp_path / "train.npy", np.arange(5000, dtype=np.uint16) % 250)
    config = tiny_config({"evaluation.every": "6 steps", "data.source": str(tmp_path)})
    with pytest.raises(ConfigError, match="no validation tokens there"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"evaluation.split='valid': expected one of train, validation, test"):
        tiny_config({"evaluation.split": "valid"})


def test_the_best_step_has_the_lowest_finite_loss():
    losses = {1: 2.0, 2: float("nan"), 3: 1.0, 4: 1.0}
    assert validation.best_step(losses, [1, 2, 3, 4]) == 3
    assert validation.best_step(losses, [1, 2]) == 1
    assert validation.best_step(losses, [2, 7]) is None


def test_a_change_of_the_validation_windows_is_reported(tiny_config):
    config = tiny_config({"evaluation.windows": 5})
    saved = config.to_dict()
    assert validation.other_tokens(saved, config) == validation.other_tokens(None, config) == ""
    config.evaluation.windows = 7
    assert validation.other_tokens(saved, config) == (
        "evaluation.windows 5 -> 7: validation losses so far are of other tokens, and the best checkpoint is chosen of "
        "all"
    )


def test_losses_are_read_up_to_a_step(tmp_path):
    records = [{"step": 1, "loss": 1.0}, {"step": 2, validation.LOSS: 3.0}, {"step": 4, validation.LOSS: 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert validation.read_losses(tmp_path) == {2: 3.0, 4: 2.0}
    assert validation.read_losses(tmp_path, 3) == {2: 3.0}
    assert validation.read_losses(tmp_path / "elsewhere") == {}
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 2, "{validation.LOSS}": null}}\n')  # JSON has no NaN
    assert str(validation.read_losses(tmp_path)) == "{2: nan}"
    assert validation.best_step(validation.read_losses(tmp_path), [2]) is None


def test_a_loss_that_is_not_finite_shows_and_masked_ones_do_not(tiny_config, monkeypatch):
    tokens = np.arange(200) % 250
    source = TokenSource("some/validation", tokens, 257, 9)
    run = build_program(tiny_config({}), sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    bad = {"of": 9}

    def nll(logits, targets):  # byte 9 begins documents
        return jnp.where(targets == bad["of"], bad.get("value", jnp.nan), bad.get("else", 2.0))

    monkeypatch.setattr(validation, "token_nll", nll)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), run.abstract_state.params)
    monkeypatch.setattr(type(run.model), "apply", lambda *arguments: (0, None))
    values = validation.Validation(run, source, 3)(params)
    assert (values[validation.LOSS], values["validation_perplexity"]) == (2.0, pytest.approx(math.exp(2.0)))
    bad["of"] = 8
    assert math.isnan(validation.Validation(run, source, 3)(params)[validation.LOSS])
    bad["value"] = jnp.inf
    values = validation.Validation(run, source, 3)(params)
    assert (values[validation.LOSS], values["validation_perplexity"]) == (math.inf, math.inf)
    bad.update(value=800.0, **{"else": 800.0})
    values = validation.Validation(run, source, 3)(params)
    assert (values[validation.LOSS], values["validation_perplexity"]) == (800.0, math.inf)


def test_a_split_with_nothing_to_predict_is_refused(tiny_config):
    source = TokenSource("some/validation", np.full(200, 9), 257, 9)
    run = build_program(tiny_config({}), sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    with pytest.raises(ConfigError) as error:
        validation.Validation(run, source, 3)
    assert str(error.value) == (
        "evaluation.every=: some/validation has nothing to predict in 3 windows of 64 tokens; "
        "expected a split with text"
    )
