"""Test that runs of an earlier version load, evaluate to the same losses, and continue as they would have.

``tests/old_runs/NAME.tar.gz`` are workdirs of commit 748715c, which had ``model.ttt.norm_residual``. Its commands were,
with ``--config.model.vocab_size=17 --config.model.width=16 --config.model.num_layers=1 --config.model.num_heads=2
--config.model.mlp_width=16 --config.model.init_stddev=0.2 --config.model.ttt.mini_batch=4
--config.data.source=synthetic --config.data.sequence_length=14 --config.data.batch_size=2
--config.optimizer.peak_lr=0.01 --config.training.duration=6 --config.checkpoint.every=3 --config.log.every=1``:

    ttt train --config configs/quickstart.py:ttt_linear --workdir ttt_linear --config.model.ttt.norm_residual=false
    ttt train --config configs/quickstart.py:ttt_mlp --workdir ttt_mlp --config.model.ttt.mlp_width_factor=2

Then the checkpoint of step 6 was removed, the records of steps 4 to 6 were moved to ``continued.json``, and
``ttt eval --workdir NAME --context 30 --max-windows 4`` evaluated step 3.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.evaluation import evaluate, evaluations, trained
from ttt_jax.training import loop, metrics

pytestmark = pytest.mark.slow

OLD_RUNS = Path(__file__).resolve().parents[1] / "old_runs"
CONTINUED = json.loads((OLD_RUNS / "continued.json").read_text())
MEANING = {"ttt_linear": ("none", False), "ttt_mlp": ("residual_norm", True)}


@pytest.fixture(scope="module", params=sorted(CONTINUED))
def workdir(request, tmp_path_factory):
    """Return the workdir of an old run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD_RUNS / f"{request.param}.tar.gz") as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / request.param


def test_evaluation_gives_the_losses_of_the_earlier_version(workdir):
    """Evaluate in pieces of 14 tokens, so that the state is carried on from the middle of a mini-batch."""
    assert "norm_residual" in (workdir / "config.json").read_text()
    run = trained.load(workdir)
    assert (run.config.model.ttt.output, run.config.model.ttt.bias) == MEANING[workdir.name]
    old = evaluations.read(workdir, "validation", 30)
    new = evaluate.evaluate(run, evaluate.Selection(30, most=4))
    assert new.about["checkpoint"] == old.about["checkpoint"]
    assert new.about["parameters"] == old.about["parameters"]
    assert new.about["config"] == old.about["config"] == run.config.to_dict()
    np.testing.assert_array_equal(new.document_counts, old.document_counts)
    np.testing.assert_allclose(new.document_sums, old.document_sums, rtol=3e-6)
    np.testing.assert_allclose(new.loss, old.loss, rtol=3e-6)


def test_training_continues_as_with_the_earlier_version(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    assert loop.train(config_lib.from_json(copy / "config.json"), copy).step == 6
    records = metrics.read(copy)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for key, values in CONTINUED[workdir.name].items():
        np.testing.assert_allclose([record[key] for record in records[3:]], values, rtol=3e-6, err_msg=key)
