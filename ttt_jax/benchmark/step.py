"""Time a training step, and plain matrix products of as many operations in the same run."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.distributed import sharding
from ttt_jax.models import counts, pattern
from ttt_jax.training.step import Program, build_program, with_checked_kernels

_MATMUL_SIZE = 2048


class Measurement(NamedTuple):
    """The result of a benchmark of a training step; times in seconds."""

    model: str
    parameters: int
    compile_time: float
    step_times: list[float]
    matmul_times: list[float]  # of matrix products between the steps, scaled to the operations of a step
    tokens: int  # per step
    operations: float  # model FLOPs per step
    memory: int  # peak bytes of the device where it reports them, else of the process

    @property
    def step_time(self) -> float:
        """Return the median step time."""
        return statistics.median(self.step_times)

    @property
    def matmul_ratio(self) -> float:
        """Return the median step time over the median time of as many operations in plain matrix products."""
        return self.step_time / statistics.median(self.matmul_times)

    def as_dict(self) -> dict[str, Any]:
        """Return the measurement for JSON."""
        return {
            "model": self.model,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
            "parameters": self.parameters,
            "compile_seconds": self.compile_time,
            "step_seconds": self.step_time,
            "step_seconds_all": self.step_times,
            "tokens_per_second": self.tokens / self.step_time,
            "model_flops_per_step": self.operations,
            "model_flops_per_second": self.operations / self.step_time,
            "matmul_ratio": self.matmul_ratio,
            "peak_memory_bytes": self.memory,
        }

    def __str__(self) -> str:
        low, high = min(self.step_times), max(self.step_times)
        return "\n".join(
            [
                f"{self.model}, {self.parameters / 1e6:.1f} M parameters, "
                f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                f"  compile          {self.compile_time:10.2f} s",
                f"  step, median     {self.step_time:10.4f} s   ({low:.4f} to {high:.4f} of {len(self.step_times)})",
                f"  throughput       {self.tokens / self.step_time:10,.0f} tokens/s",
                f"  model FLOP/s     {self.operations / self.step_time / 1e9:10,.1f} G  "
                f"({self.operations / 1e9:,.1f} G per step)",
                f"  against matmul   {self.matmul_ratio:10.2f} x the time of as many FLOPs in plain matrix products",
                f"  peak memory      {self.memory / 1e6:10,.0f} MB",
            ]
        )


def measure(config: ml_collections.ConfigDict, *, repeats: int = 7, warmup: int = 2) -> Measurement:
    """Compile the training step of a config and time it on random tokens.

    Raises:
      ConfigError: where the config does not fit the devices.
    """
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))
    run = with_checked_kernels(build_program(config, mesh))
    start = time.perf_counter()
    step = run.compiled_step()
    compile_time = time.perf_counter() - start
    state, batch = run.initial_state(), _random_batch(config, run)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    data = config.data
    operations = counts.flops_per_step(config.model, data.sequence_length, data.batch_size)
    matmul = _matmul(jnp.dtype(config.model.dtype), operations)

    step_times, matmul_times = [], []
    for i in range(warmup + repeats):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        step_times.append(time.perf_counter() - start)
        if i % 2 == 0:
            matmul_times.append(matmul())
    return Measurement(
        pattern.describe(config.model),
        parameters,
        compile_time,
        step_times[warmup:],
        matmul_times[1:] or matmul_times,
        data.batch_size * data.sequence_length,
        operations,
        _peak_memory(),
    )


def _random_batch(config: ml_collections.ConfigDict, run: Program) -> dict[str, jax.Array]:
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": np.ones(tokens[:, 1:].shape, np.float32),
    }
    return jax.device_put(batch, run.batch_sharding)


def _matmul(dtype: jnp.dtype, operations: float) -> Callable[[], float]:
    """Return a function that times matrix products of a tenth of the operations and returns seconds for all of them."""
    n, devices = _MATMUL_SIZE, jax.devices()
    operands = [jax.device_put(jnp.ones((n, n), dtype), device) for device in devices]
    product = jax.jit(lambda x: x @ x)
    repeats = max(1, round(operations / 10 / (2 * n**3) / len(devices)))
    jax.block_until_ready([product(x) for x in operands])

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready([product(x) for _ in range(repeats) for x in operands])
        return (time.perf_counter() - start) * operations / (2 * n**3 * repeats * len(devices))

    return run


def _peak_memory() -> int:
    statistics_of_device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of_device:
        return statistics_of_device["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
