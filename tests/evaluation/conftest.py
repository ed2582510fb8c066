"""Provide a run of random parameters to evaluate, its data, and compiled programs that evaluations share."""

import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.data.token_source import TokenSource
from ttt_jax.evaluation import evaluate as evaluate_lib
from ttt_jax.evaluation import losses, trained

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


@pytest.fixture(scope="session")
def shared_programs():
    """Let evaluations of one model share the programs that they compile."""
    readers, make = {}, losses._Reader

    def reader(trained, batch_size, capacity):
        key = id(trained.params), batch_size, capacity, losses.token_nll
        if key not in readers:
            readers[key] = make(trained, batch_size, capacity)
        return readers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_Reader", reader)
        yield
