"""Provide runs of random parameters to probe, and their logits."""

import numpy as np
import pytest

from ttt_jax import config as config_lib


@pytest.fixture(scope="session")
def made_run(tmp_path_factory, with_random_params):
    """Return ``made_run(mixer, **data)``: a tiny model with random parameters, of step 3."""

    def make(mixer, vocab_size=257, **data):
        config = config_lib.default()
        config.model.update(mixer=mixer, vocab_size=vocab_size, width=8, num_layers=1, num_heads=2, mlp_width=8)
        config.model.ttt.mini_batch = 4
        config.data.update({"sequence_length": 100, "batch_size": 4, **data})
        return with_random_params(config, tmp_path_factory.mktemp("probed") / f"some-{mixer}")

    return make


@pytest.fixture(scope="session")
def loaded(made_run):
    """Return ``loaded(mixer)``: a run on the embedded corpus; tests may write to its folder ``probe`` only."""
    known = {}

    def get(mixer):
        if mixer not in known:
            known[mixer] = made_run(mixer)
        return known[mixer]

    return get


@pytest.fixture(scope="session")
def plain_logits(quick_jit):
    """Return ``plain_logits(trained, tokens [B, T])``: logits [B, T, V] in float64, computed without a state."""
    compiled = {}

    def compute(run, tokens):
        if run.model not in compiled:
            compiled[run.model] = quick_jit(lambda params, tokens: run.model.apply({"params": params}, tokens)[0])
        return np.asarray(compiled[run.model](run.params, np.asarray(tokens, np.int32)), np.float64)

    return compute
