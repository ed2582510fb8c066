"""Check that the numbers of the benchmark of a training step are consistent."""

import json
import math
import statistics

import jax
import pytest

from ttt_jax import config as config_lib
from ttt_jax.benchmark import step
from ttt_jax.benchmark.step import Measurement
from ttt_jax.config import ConfigError

VOCAB, WIDTH, MLP_WIDTH, LAYERS, T, BATCH = 24, 8, 12, 2, 16, 2


@pytest.fixture(scope="module")
def config():
    config = config_lib.default()
    sizes = {"vocab_size": VOCAB, "width": WIDTH, "num_heads": 2, "num_layers": LAYERS, "mlp_width": MLP_WIDTH}
    config.model.update(mixer="attention", **sizes)
    config.data.update(sequence_length=T, batch_size=BATCH)
    config_lib.validate(config)
    return config


@pytest.fixture(scope="module")
def measurement(config):
    return step.measure(config, repeats=3, warmup=1)


@pytest.mark.slow
def test_parameters_tokens_and_operations(measurement):
    block = 4 * WIDTH**2 + 3 * WIDTH * MLP_WIDTH  # attention, feed-forward
    assert measurement.parameters == VOCAB * WIDTH + LAYERS * (block + 2 * WIDTH) + WIDTH
    assert measurement.tokens == BATCH * T
    visible = (T + 1) / 2
    forward = LAYERS * (2 * block + 4 * WIDTH * visible) + 2 * WIDTH * VOCAB  # per token
    assert measurement.operations == 3 * forward * BATCH * T
    assert measurement.model == "Transformer"


def test_times_and_memory(measurement):
    assert len(measurement.step_times) == 3  # without the warm-up
    assert len(measurement.matmul_times) == 1  # after every other step, without the first
    assert min(measurement.step_times + measurement.matmul_times + [measurement.compile_time]) > 0
    assert 10**7 < measurement.memory < 10**12


def test_numbers_derived_from_times():
    known = Measurement("Transformer", 10, 2.0, [0.3, 0.1, 0.2], [0.05, 0.01, 0.02, 0.03], 640, 1e9, 123)
    assert known.step_time == 0.2
    assert known.matmul_ratio == pytest.approx(0.2 / 0.025)
    numbers = known.as_dict()
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["step_seconds"] == 0.2
    assert numbers["step_seconds_all"] == [0.3, 0.1, 0.2]
    assert numbers["tokens_per_second"] == pytest.approx(3200)
    assert numbers["model_flops_per_second"] == pytest.approx(5e9)
    assert numbers["matmul_ratio"] == known.matmul_ratio
    assert (numbers["parameters"], numbers["compile_seconds"], numbers["peak_memory_bytes"]) == (10, 2.0, 123)
    assert numbers["device"] == f"1 x {jax.devices()[0].device_kind}"
    lines = {line[:16].strip(): line[16:].split() for line in str(known).splitlines()[1:]}
    assert lines["throughput"] == ["3,200", "tokens/s"]
    assert lines["model FLOP/s"][:2] == ["5.0", "G"]
    assert lines["against matmul"][0] == "8.00"


def test_the_ratio_is_one_of_medians(measurement):
    ratio = statistics.median(measurement.step_times) / statistics.median(measurement.matmul_times)
    assert measurement.matmul_ratio == pytest.approx(ratio)
    assert math.isfinite(ratio)
    assert ratio > 0


def test_times_of_matrix_products_are_scaled_to_the_operations(monkeypatch):
    """Check that a tenth of the operations is timed, and ten times that time returned."""
    monkeypatch.setattr(step, "_MATMUL_SIZE", 8)
    ticks = iter(range(100))
    monkeypatch.setattr(step.time, "perf_counter", lambda: float(next(ticks)))  # every product takes a second
    one = 2 * 8**3
    assert step._matmul(jax.numpy.dtype("float32"), one)() == pytest.approx(1)  # 1 product, 1 second
    assert step._matmul(jax.numpy.dtype("float32"), 100 * one)() == pytest.approx(10)  # 10 products in a second


def test_a_mesh_that_does_not_fit_is_refused(config):
    config = config.copy_and_resolve_references()
    config.mesh.tensor = 2
    with pytest.raises(ConfigError, match=r"mesh\.tensor=2: does not fit 1 devices"):
        step.measure(config)
