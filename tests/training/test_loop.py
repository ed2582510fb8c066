"""The loop in this process: what it writes, what it refuses, and that models learn."""

import dataclasses
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ttt_jax import json_files
from ttt_jax.config import ConfigError
from ttt_jax.data import pipeline, source, sources
from ttt_jax.data.errors import DataError
from ttt_jax.training import loop, metrics, program
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.errors import NonFiniteLossError


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config):
    workdir = tmp_path_factory.mktemp("finished")
    changes = {"checkpoint.milestone_every": "12 steps", "checkpoint.keep_last": 1, "log.tensorboard": True}
    config = tiny_config(changes)
    return workdir, config, loop.train(config, workdir)


def test_outcome_and_records(finished):
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


def test_kept_checkpoints_and_their_meta(finished):
    workdir, config, _ = finished
    checkpoints = Checkpoints(workdir, read_only=True)
    assert checkpoints.all_steps() == [12, 24]  # a milestone, and the last one
    meta = checkpoints.meta(24)
    checkpoints.close()
    assert meta["data"]["next_batch"] == 24
    assert meta["config"] == config.to_dict()
    assert meta["versions"]["jax"] == jax.__version__
    assert meta["data"]["fingerprint"] == sources.load("embedded", "train").fingerprint()


def test_saved_arrays_are_float32(finished, tmp_path, tiny_config):
    config = tiny_config({"model.dtype": "bfloat16", "training.duration": "2 steps"})
    assert math.isfinite(loop.train(config, tmp_path).loss)
    with ocp.StandardCheckpointer() as reader:
        saved = reader.restore(tmp_path.absolute() / "checkpoints" / "2" / "state")
    assert {str(x.dtype) for x in jax.tree.leaves(saved["params"])} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(saved["opt_state"])} == {"float32", "int32"}  # moments and counts


def test_longer_run_goes_on_from_a_finished_one(finished, tmp_path, tiny_config):
    short = tiny_config({"training.duration": "3 steps", "optimizer.warmup": "1 step"})
    loop.train(short, tmp_path)
    outcome = loop.train(tiny_config({"training.duration": "5 steps", "optimizer.warmup": "1 step"}), tmp_path)
    assert outcome.step == 5
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model.mlp_width": 64}, "model.mlp_width 48 there, 64 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"optimizer.peak_lr": 0.5}, "optimizer.peak_lr"),
    ],
)
def test_another_config_is_refused(finished, tiny_config, changes, key):
    workdir, _, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=key):
        loop.train(tiny_config(changes), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_other_data_is_refused(finished, monkeypatch, tiny_config):
    workdir, config, _ = finished
    monkeypatch.setattr(source.TokenSource, "fingerprint", lambda self: "another")
    longer = config.copy_and_resolve_references()
    longer.training.duration = "30 steps"
    with pytest.raises(ConfigError, match="not the data this run began with"):
        loop.train(longer, workdir)


@pytest.mark.parametrize("worker_processes", [0, 1])
def test_data_that_turns_out_bad_stops_with_what_was_learned_saved(
    tmp_path, monkeypatch, tiny_config, worker_processes
):
    """And once it can be read, the run ends with the bits of one that met nothing bad."""
    config = tiny_config({"training.duration": "6 steps", "data.worker_processes": worker_processes})
    tokens = np.random.default_rng(0).integers(0, 256, 64 * 40 + 1).astype(np.uint16)
    good = source.TokenSource("some/train", tokens, vocab_size=257, bos=256)
    batches = pipeline.train_batches(good, sequence_length=64, batch_size=2, seed=config.seed)
    fourth = [next(batches) for _ in range(4)][3]["inputs"][1]
    place = next(i for i in range(0, len(tokens), 64) if np.array_equal(tokens[i : i + 64], fourth)) + 7
    damaged = tokens.copy()
    damaged[place] = 999
    bad = dataclasses.replace(good, tokens=damaged, known_fingerprint=good.fingerprint())

    monkeypatch.setattr(loop.sources, "from_config", lambda config, split: bad)
    with pytest.raises(
        DataError, match=f"some/train: token 999 at offset {place}; .*; the run stands at step 3, saved"
    ):
        loop.train(config, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", read_only=True)
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    monkeypatch.setattr(loop.sources, "from_config", lambda config, split: good)
    assert loop.train(config, tmp_path / "run").step == 6
    loop.train(config, tmp_path / "whole")
    losses = [[record["loss"] for record in metrics.read(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_non_finite_loss_stops_with_the_last_good_checkpoint(tmp_path, tiny_config):
    loop.train(tiny_config({"training.duration": "4 steps", "optimizer.warmup": "1 step"}), tmp_path)
    poisoned = tiny_config({"training.duration": "40 steps", "optimizer.warmup": "1 step"})
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    run = program.make(poisoned, program.sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    state = checkpoints.restore(4, run.abstract_state)
    state.params["final_norm"]["scale"] = state.params["final_norm"]["scale"].at[0].set(np.nan)
    checkpoints.save(5, state, checkpoints.meta(4))
    checkpoints.close()
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 6; the last good checkpoint is .*/5\. Try"):
        loop.train(poisoned, tmp_path)
    assert metrics.read(tmp_path)[-1]["step"] == 6
    assert math.isnan(metrics.read(tmp_path)[-1]["loss"])
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.latest_step() == 5  # nothing was saved after the loss went bad
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["ttt_linear", "ttt_mlp", "attention"])
def test_a_short_run_learns_more_than_byte_frequencies(mixer, tmp_path, tiny_config):
    """The loss falls below the unigram entropy of the corpus: what a model without context could reach at best."""
    tokens = sources.load("embedded", "train").tokens
    frequencies = np.bincount(tokens) / len(tokens)
    frequencies = frequencies[frequencies > 0]
    entropy = -(frequencies * np.log(frequencies)).sum()
    config = tiny_config(
        {
            "model.mixer": mixer,
            "model.width": 64,
            "data.sequence_length": 128,
            "data.batch_size": 8,
            "optimizer.peak_lr": 1e-2,
            "training.duration": "120 steps",
            "checkpoint.every": "100%",
        }
    )
    loop.train(config, tmp_path)
    last = [r["loss"] for r in metrics.read(tmp_path)[-10:]]
    assert np.mean(last) < entropy - 0.15
