"""Provide a run of random parameters to evaluate, its data, and compiled programs that evaluations share."""

import jax
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.data.token_source import TokenSource
from ttt_jax.distributed import sharding
from ttt_jax.evaluation import evaluate as evaluate_lib
from ttt_jax.evaluation import losses, trained
from ttt_jax.evaluation.trained import Trained
from ttt_jax.models.language_model import build_model
from ttt_jax.storage.workdir import at

LENGTHS = (40, 7, 66, 2, 33, 120, 5, 90)  # of documents, BOS included


@pytest.fixture(scope="session")
def run(tmp_path_factory, save_run):
    """Return a workdir with two checkpoints of random parameters, the config, and the parameters by step."""
    config = config_lib.default()
    config.model.update(width=8, num_layers=1, num_heads=2, mlp_width=8)
    config.model.ttt.mini_batch = 4
    config.data.update(sequence_length=16, batch_size=4)
    workdir = tmp_path_factory.mktemp("evaluation") / "some-run"
    return workdir, config, save_run(workdir, config, (3, 5))


@pytest.fixture(scope="session")
def with_random_params(random_params):
    """Return ``with_random_params(config, workdir)``: a model with random parameters, of no checkpoint, step 3."""

    def make(config, workdir):
        config_lib.validate(config)
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
        model, rules = build_model(config.model), sharding.ShardingRules()
        params = random_params(model, np.zeros((1, 1), np.int32))
        place = sharding.batch_sharding(mesh, rules)
        return Trained(at(workdir), config, model, params, 3, "", mesh, rules, place)

    return make


@pytest.fixture(scope="session")
def model(run):
    """Return the newest checkpoint, step 5, loaded."""
    return trained.load(run[0])


@pytest.fixture(scope="session")
def earlier_model(run):
    """Return the checkpoint of step 3, loaded."""
    return trained.load(run[0], 3)


@pytest.fixture(scope="session")
def books():
    """Return a split of eight documents that begin with BOS."""
    rng = np.random.default_rng(0)
    documents = [np.append(256, rng.integers(0, 256, n - 1)) for n in LENGTHS]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    return TokenSource("books/validation", np.concatenate(documents).astype(np.uint16), 257, 256, starts)


@pytest.fixture
def read_from(monkeypatch):
    """Return ``read_from(source)``, which lets evaluations read from a source and returns it."""

    def patch(source):
        monkeypatch.setattr(evaluate_lib.named_sources, "from_config", lambda config, split: source)
        return source

    return patch


@pytest.fixture
def data(read_from, books):
    """Let evaluations read the eight documents."""
    return read_from(books)


@pytest.fixture(scope="module")
def shared_programs():
    """Let evaluations of one model share the programs that they compile."""
    readers, make = {}, losses._Reader

    def reader(trained, batch_size, capacity):
        key = str(trained.config.model), trained.mesh, batch_size, capacity, losses.token_nll
        if key not in readers:
            readers[key] = make(trained, batch_size, capacity)
        readers[key]._trained = trained
        return readers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_Reader", reader)
        yield
