"""Runs of random parameters, to probe."""

import json

import jax
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.distributed import sharding
from ttt_jax.evaluation import trained
from ttt_jax.models.language_model import build_model
from ttt_jax.training import compiled_step
from ttt_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="session")
def made_run(tmp_path_factory, random_params):
    """``made_run(mixer, **data)``: the workdir of a tiny run with one checkpoint, step 3, of random parameters."""

    def make(mixer, vocab_size=257, **data):
        config = config_lib.default()
        config.model.update(mixer=mixer, vocab_size=vocab_size, width=8, num_layers=1, num_heads=2, mlp_width=8)
        config.model.ttt.mini_batch = 4
        config.data.update({"sequence_length": 100, "batch_size": 4, **data})
        config_lib.validate(config)
        workdir = tmp_path_factory.mktemp("probed") / f"some-{mixer}"
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
        abstract = compiled_step.make(config, sharding.make_mesh(config_lib.mesh_shape(config, 1))).abstract_state
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        params = random_params(build_model(config.model), np.zeros((1, 1), np.int32))
        checkpoints = Checkpoints(workdir)
        checkpoints.save(3, state._replace(step=np.int32(3), params=params), {})
        checkpoints.close()
        return workdir

    return make


@pytest.fixture(scope="session")
def runs(made_run):
    """``runs(mixer)``: a workdir that tests may write to, but only into ``probe``; on the embedded corpus."""
    found = {}
    return lambda mixer: found.setdefault(mixer, found.get(mixer) or made_run(mixer))


@pytest.fixture(scope="session")
def loaded(runs):
    """``loaded(mixer)``: that run, loaded."""
    found = {}

    def load(mixer):
        if mixer not in found:
            found[mixer] = trained.load(runs(mixer))
        return found[mixer]

    return load


@pytest.fixture(scope="session")
def plain_logits(quick_jit):
    """``plain_logits(trained, tokens [B, T])``: logits [B, T, V] in float64 of whole sequences, without a state."""
    compiled = {}

    def compute(run, tokens):
        if run.model not in compiled:
            compiled[run.model] = quick_jit(lambda params, tokens: run.model.apply({"params": params}, tokens)[0])
        return np.asarray(compiled[run.model](run.params, np.asarray(tokens, np.int32)), np.float64)

    return compute
