"""Benchmark the shape at which other implementations were measured: two layers of the 125M width, one sequence of 2048.

    ttt bench step --config configs/benchmark.py:ttt_linear

ARG is model.mixer: ttt_linear (default), another mixer such as ttt_mlp or attention, or a pattern of mixers.

Hardware: two CPU cores, 1.1 GiB (ttt_mlp 1.7, attention 1.5), float32; a few steps, 2 to 3 s each: docs/benchmarks.md.
"""

from ttt_jax import config


def get_config(mixer: str = "ttt_linear"):
    c = config.default()
    c.model.mixer = mixer
    c.model.vocab_size = 1024
    c.model.num_layers = 2
    c.data.batch_size = 1
    return c
