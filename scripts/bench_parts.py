#!/usr/bin/env python3
"""Time the parts of a model beside the obvious way to write them, and compile time at two depths.

    python scripts/bench_parts.py

Forward and backward, float32, at the shapes of configs/benchmark.py (one sequence of 2048 tokens, width 768, 12 heads).
Prints one line per part: median seconds of each way, in turns, and the ratio to the first.
"""

import statistics
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax import config as config_lib
from ttt_jax.distributed import sharding
from ttt_jax.layers.blocked_attention import causal_attention
from ttt_jax.layers.conv import convolve
from ttt_jax.layers.linear import project
from ttt_jax.mixers import MIXERS
from ttt_jax.training.step import build_program
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import scan
from ttt_jax.ttt.inner_loop import Parameters, Tokens, ttt_mlp

TOKENS, WIDTH, HEADS, HIDDEN, MINI_BATCH = 2048, 768, 12, 2048, 16
HEAD_DIM = WIDTH // HEADS


def compare(what: str, ways: dict[str, Callable], *arguments, repeats: int = 7) -> None:
    """Time the gradient of the sum of squares of each function with respect to all arguments."""

    def gradient(f):
        return jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=tuple(range(len(arguments)))))

    compiled = {name: gradient(f) for name, f in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(repeats + 1):
        for name, f in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            if i:  # the first compiles
                times[name].append(time.perf_counter() - start)
    report(what, times)


def report(what: str, times: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(t) for name, t in times.items()}
    first = next(iter(medians.values()))
    print(f"{what}: " + "; ".join(f"{name} {t:.4f} s ({t / first:.2f})" for name, t in medians.items()), flush=True)


def grouped_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel[:, None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=x.shape[-1]
    )


def shifted_sum(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return sum((kernel[j] * x[:, j : j + TOKENS] for j in range(len(kernel))), jnp.zeros(()))


def swiglu(matmul: Callable) -> Callable:
    return lambda x, gate, up, down: matmul(nn.silu(matmul(x, gate)) * matmul(x, up), down)


def inner_loop(depth: int, remat_group: int) -> Callable:
    loop = ttt_mlp(HEAD_DIM, depth=depth)

    def run(w0, norm, q, k, v, token_eta):
        position_eta = 1 / jnp.arange(1.0, MINI_BATCH + 1)
        return scan.run(loop, Parameters(w0, norm, position_eta), Tokens(q, k, v, token_eta), remat_group=remat_group).z

    return run


def compile_time(mixer: str, layers: int) -> float:
    """Return the seconds to trace, lower and compile the training step."""
    config = config_lib.default()
    config.model.update(mixer=mixer, num_layers=layers, vocab_size=1024)
    config.data.batch_size = 1
    run = build_program(config, sharding.make_mesh({"data": jax.device_count(), "fsdp": 1, "tensor": 1}))
    jax.clear_caches()
    start = time.perf_counter()
    run.compiled_step()
    return time.perf_counter() - start


def main() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    ways: dict[str, Callable] = {
        "library, grouped": grouped_convolution,
        "shifted sum by autodiff": shifted_sum,
        "convolve": convolve,
    }
    compare("causal convolution", ways, normal(1, TOKENS + 3, WIDTH), normal(4, WIDTH))

    kernels = [0.02 * normal(WIDTH, HIDDEN), 0.02 * normal(WIDTH, HIDDEN), 0.02 * normal(HIDDEN, WIDTH)]
    ways = {
        "by autodiff": swiglu(jnp.matmul),
        "project": swiglu(lambda x, w: project(x, w, ("embed", "mlp"), jnp.float32)),
    }
    compare("SwiGLU", ways, normal(1, TOKENS, WIDTH), *kernels)

    def library(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    heads = [normal(1, TOKENS, HEADS, HEAD_DIM) for _ in range(3)]
    compare("attention", {"library": library, "causal_attention": causal_attention}, *heads)

    norm = {"norm_scale": jnp.ones((HEADS, 1, HEAD_DIM)), "norm_bias": jnp.zeros((HEADS, 1, HEAD_DIM))}
    token_eta = jnp.full((1, TOKENS, HEADS), 1 / HEAD_DIM)
    for depth, name in ((1, "inner loop, Linear"), (2, "inner loop, MLP")):
        w0 = learner_lib.init(next(keys), ttt_mlp(HEAD_DIM, depth=depth).learner, HEADS)
        ways = {f"remat_group={group}": inner_loop(depth, group) for group in (1, 0, 4, 16)}
        compare(name, ways, w0, norm, *heads, token_eta)

    for mixer in MIXERS:
        compile_time(mixer, 2)
        times: dict[str, list[float]] = {"2 layers": [], "24 layers": []}
        for _ in range(3):
            for name in times:
                times[name].append(compile_time(mixer, int(name.split()[0])))
        report(f"compile {mixer}", times)


if __name__ == "__main__":
    main()
