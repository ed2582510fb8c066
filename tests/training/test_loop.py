"""Test the train loop in one process: what it writes, what it refuses, and that models learn."""

import dataclasses
import math
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.data import named_sources, pipeline, token_source
from ttt_jax.distributed import sharding
from ttt_jax.errors import DataError, NonFiniteLossError
from ttt_jax.storage import json_files
from ttt_jax.training import loop, metrics
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.step import build_program

CHANGES = {"checkpoint.milestone_every": "12 steps", "checkpoint.keep_last": 1, "log.tensorboard": True}
LONGER = {**CHANGES, "training.duration": "40 steps"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config):
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny_config(CHANGES)
    return workdir, config, loop.train(config, workdir)


@pytest.mark.slow
def test_outcome_and_records_of_a_finished_run(finished):
    workdir, config, outcome = finished
    records = metrics.read(workdir)
    assert (outcome.step, outcome.total, outcome.signal) == (24, 24, None)
    assert [r["step"] for r in records] == list(range(1, 25))
    assert outcome.loss == records[-1]["loss"]
    assert records[0]["learning_rate"] == 0.0
    assert records[2]["learning_rate"] == pytest.approx(config.optimizer.peak_lr)  # two steps of warm-up
    assert all(r["tokens"] == r["step"] * 128 for r in records)
    assert all(r["tokens_per_second"] == pytest.approx(128 / r["seconds_per_step"]) for r in records)
    assert json_files.read_object(workdir / "config.json") == config.to_dict()
    assert list((workdir / "tensorboard").iterdir())


@pytest.mark.slow
def test_milestones_are_kept_and_meta_holds_position_config_and_versions(finished):
    workdir, config, _ = finished
    checkpoints = Checkpoints(workdir, read_only=True)
    assert checkpoints.all_steps() == [12, 24]  # a milestone and the last step
    meta = checkpoints.meta(24)
    checkpoints.close()
    assert meta["data"]["next_batch"] == 24
    assert meta["config"] == config.to_dict()
    assert meta["versions"]["jax"] == jax.__version__
    assert meta["data"]["fingerprint"] == named_sources.load("embedded", "train").fingerprint()


@pytest.mark.slow
def test_saved_arrays_are_float32(finished, tmp_path, tiny_config):
    config = tiny_config({"model.dtype": "bfloat16", "training.duration": "2 steps"})
    assert math.isfinite(loop.train(config, tmp_path).loss)
    with ocp.StandardCheckpointer() as reader:
        saved = reader.restore(tmp_path.absolute() / "checkpoints" / "2" / "state")
    assert {str(x.dtype) for x in jax.tree.leaves(saved["params"])} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(saved["opt_state"])} == {"float32", "int32"}  # moments and counts


@pytest.mark.slow
def test_a_longer_run_continues_a_finished_one(finished, tmp_path, tiny_config):
    workdir = shutil.copytree(finished[0], tmp_path / "longer")
    assert loop.train(tiny_config(LONGER), workdir).step == 40
    assert [r["step"] for r in metrics.read(workdir)] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model.mlp_width": 64}, "model.mlp_width 48 there, 64 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"optimizer.peak_lr": 0.5}, "optimizer.peak_lr"),
    ],
)
def test_a_workdir_of_another_config_is_refused(finished, tiny_config, changes, key):
    workdir, _, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=key):
        loop.train(tiny_config(changes), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_is_not_continued_on_other_data(finished, monkeypatch, tiny_config):
    workdir, config, _ = finished
    monkeypatch.setattr(token_source.TokenSource, "fingerprint", lambda self: "another")
    longer = config.copy_and_resolve_references()
    longer.training.duration = "30 steps"
    with pytest.raises(ConfigError, match="not the data this run began with"):
        loop.train(longer, workdir)


SIX = {"training.duration": "6 steps"}


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory, tiny_config):
    """Return a good source, one with a bad token in its fourth batch, its place, and the losses of a good run."""
    config = tiny_config(SIX)
    tokens = np.random.default_rng(0).integers(0, 256, 64 * 40 + 1).astype(np.uint16)
    good = token_source.TokenSource("some/train", tokens, vocab_size=257, bos=256)
    batches = pipeline.train_batches(good, sequence_length=64, batch_size=2, seed=config.seed)
    fourth = [next(batches) for _ in range(4)][3]["inputs"][1]
    place = next(i for i in range(0, len(tokens), 64) if np.array_equal(tokens[i : i + 64], fourth)) + 7
    damaged = tokens.copy()
    damaged[place] = 999
    bad = dataclasses.replace(good, tokens=damaged, known_fingerprint=good.fingerprint())
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named_sources, "from_config", lambda config, split: good)
        loop.train(config, workdir)
    return good, bad, place, [record["loss"] for record in metrics.read(workdir)]


@pytest.mark.slow
@pytest.mark.parametrize("worker_processes", [0, 1])
def test_a_bad_batch_stops_the_run_after_saving(tmp_path, monkeypatch, tiny_config, bad_data, worker_processes):
    """Check also that the run ends with the bits of an undisturbed one once the batch can be read."""
    good, bad, place, losses = bad_data
    config = tiny_config({**SIX, "data.worker_processes": worker_processes})
    monkeypatch.setattr(named_sources, "from_config", lambda config, split: bad)
    with pytest.raises(DataError, match=f"some/train: token 999 at offset {place}; .*; the run is saved at step 3"):
        loop.train(config, tmp_path)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    monkeypatch.setattr(named_sources, "from_config", lambda config, split: good)
    assert loop.train(config, tmp_path).step == 6
    assert [record["loss"] for record in metrics.read(tmp_path)] == losses
    assert len(losses) == 6


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(finished, tmp_path, tiny_config):
    workdir, poisoned = shutil.copytree(finished[0], tmp_path / "poisoned"), tiny_config(LONGER)
    checkpoints = Checkpoints(workdir, keep_last=5)
    run = build_program(poisoned, sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    state = checkpoints.restore(24, run.abstract_state)
    state.params["final_norm"]["scale"] = state.params["final_norm"]["scale"].at[0].set(np.nan)
    checkpoints.save(25, state, checkpoints.meta(24))
    checkpoints.close()
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 26; the last good checkpoint is .*/25\. Try"):
        loop.train(poisoned, workdir)
    assert metrics.read(workdir)[-1]["step"] == 26
    assert math.isnan(metrics.read(workdir)[-1]["loss"])
    checkpoints = Checkpoints(workdir, read_only=True)
    assert checkpoints.latest_step() == 25  # nothing was saved after that
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["ttt_linear", "ttt_mlp", "attention"])
def test_a_short_run_learns_more_than_byte_frequencies(mixer, tmp_path, tiny_config):
    """Check that the loss falls below the unigram entropy of the corpus, the limit of a model without context."""
    tokens = named_sources.load("embedded", "train").tokens
    frequencies = np.bincount(tokens) / len(tokens)
    frequencies = frequencies[frequencies > 0]
    entropy = -(frequencies * np.log(frequencies)).sum()
    config = tiny_config(
        {
            "model.mixer": mixer,
            "data.batch_size": 8,
            "optimizer.peak_lr": 1e-2,
            "training.duration": "90 steps",
            "checkpoint.every": "100%",
        }
    )
    loop.train(config, tmp_path)
    last = [r["loss"] for r in metrics.read(tmp_path)[-10:]]
    assert np.mean(last) < entropy - 0.15


@pytest.mark.slow
def test_a_trace_has_spans_named_after_layers(tmp_path, tiny_config):
    loop.train(tiny_config({"training.duration": "6 steps", "profile.steps": "3:4"}), tmp_path)
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    for name in (b"layers/mixer", b"layers/mlp", b"train"):
        assert name in content
    assert content.count(b"step_num") > 0


@pytest.mark.slow
def test_no_trace_is_written_unless_asked_for(tmp_path, tiny_config):
    loop.train(tiny_config({"training.duration": "2 steps"}), tmp_path)
    assert not (tmp_path / "profile").exists()
