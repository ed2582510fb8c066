"""Test training through the fused kernels, interpreted, against trajectories of the authors and of the scan."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.distributed import sharding
from ttt_jax.interop import oracles
from ttt_jax.kernels import run as kernels
from ttt_jax.models import language_model
from ttt_jax.training.step import build_program

ORACLES = Path(__file__).parents[1] / "oracles"


@pytest.fixture
def calls(monkeypatch):
    """Use the kernel for any configuration; provide the list of its traces."""
    found, choose = [], kernels.choose

    def kernel(loop, *arguments, **options):
        found.append(loop)
        return kernels.run(loop, *arguments, interpret=True, **options)

    def chosen(asked, loop, *rest):
        return choose("pallas", loop, *rest)._replace(kernel=kernel)

    monkeypatch.setattr(kernels, "choose", chosen)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["traj_ttt_linear", "traj_ttt_mlp"])
def test_ten_steps_equal_those_of_the_authors(calls, name):
    report = oracles.check(ORACLES / f"{name}.npz")
    assert report.passed, report
    assert calls


@pytest.mark.slow
def test_twenty_steps_equal_those_of_the_scan():
    def losses(kernel):
        config = config_lib.default()
        config.model.update(mixer="ttt_linear", vocab_size=16, width=32, num_layers=1, num_heads=2, mlp_width=32)
        config.model.ttt.kernel = kernel
        config.data.update(sequence_length=40, batch_size=2)
        config.training.duration = "20 steps"
        run = build_program(config, sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
        step, state, found = run.compiled_step(), run.initial_state(), []
        for i in range(20):
            tokens = np.random.default_rng(i % 4).integers(0, 16, (2, 41), dtype=np.int32)
            batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((2, 40), np.float32)}
            state, metrics = step(state, jax.device_put(batch, run.batch_sharding))
            found.append(float(metrics["loss"]))
        return found

    expected = losses("scan")
    assert expected[0] - expected[-1] > 0.01
    np.testing.assert_allclose(losses("pallas"), expected, rtol=1e-5)


def test_config_with_pallas_is_refused_where_no_kernel_exists():
    config = config_lib.default()
    config.model.ttt.update(kernel="pallas", mini_batch=12)
    with pytest.raises(ConfigError, match=r"model.ttt.kernel=pallas: no kernel: .*; expected auto or scan"):
        language_model.build_model(config.model)
