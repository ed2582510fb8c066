"""Train a tiny model on meshes of one and of eight CPU devices, in one process, and print JSON.

This needs eight devices, so it is a program that test_sharding.py starts. Its arguments are a mixer, the meshes of
eight devices, and one of: ``kernel`` for fused kernels, interpreted, on the mesh and none of them without; ``chunks``
for a loss in chunks on the mesh and at once without.
"""

import contextlib
import functools
import json
import os
import sys
import unittest.mock

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.distributed import sharding
from ttt_jax.kernels import splash
from ttt_jax.mixers.mixer import Context
from ttt_jax.planning import collectives
from ttt_jax.training import loss
from ttt_jax.training.step import build_program

# Choices of mixer ttt with rates per matrix, two gates, and a state of W and the momentum.
POINT = {
    **{"learner": "swiglu", "objective": "dot_product", "rate": "softplus", "rate_per_matrix": True, "base_lr": 0.05},
    **{"update": "decay + momentum + muon + renormalise", "reading": "previous"},
}
ONE = (1, 1, 1)  # devices along data, fsdp and tensor


def tiny(mixer, kernel=None):
    config = config_lib.default()
    config.model.update(mixer=mixer, vocab_size=16, width=32, num_heads=4, num_layers=2, mlp_width=64, init_stddev=0.1)
    config.model.ttt.update({"mini_batch": 4, **(POINT if mixer == "ttt" else {})})
    config.data.update(sequence_length=8, batch_size=8)
    config.optimizer.update(peak_lr=0.004, end_lr=0.004, warmup="1 step", weight_decay=0.01)
    config.training.duration = "20 steps"
    if kernel:  # interpreted, it is slow: fewer and larger steps
        if "attention" in mixer:
            config.model.attention.update(window=5, num_kv_heads=2)
            config.model.remat = "block"
        else:
            config.model.num_layers = 1
            config.model.ttt.update(kernel=kernel, mini_batch=8)
        config.data.update(sequence_length=16, batch_size=4)
        config.optimizer.update(peak_lr=0.01, end_lr=0.01)
        config.training.duration = "8 steps"
    config_lib.validate(config)
    return config


def train(mixer, shape, kernel=None):
    """Return the loss and gradient norm of every step, the places of the arrays, and the collectives of the step."""
    config = tiny(mixer, kernel)
    devices = jax.devices() if shape != ONE else jax.devices()[:1]
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape, strict=True)), devices)
    run = build_program(config, mesh)
    with _splash() if kernel == "splash" else contextlib.nullcontext():
        state, step = run.initial_state(), run.compiled_step()
    parts, specs, metrics = _parts(state), _specs(state), []
    for i in range(config_lib.steps(config, "training.duration")):
        size = (config.data.batch_size, config.data.sequence_length + 1)
        tokens = np.random.default_rng(i % 5).integers(0, 16, size, dtype=np.int32)
        mask = (tokens[:, 1:] > 2).astype(np.float32)
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}
        batch = jax.device_put(batch, run.batch_sharding)
        state, values = step(state, batch)
        metrics.append({name: float(x) for name, x in values.items()})
    text = step.as_text()
    once = kernel is None and shape in (ONE, (2, 2, 2))
    with_statistics = once and mixer in ("ttt_mlp", "ttt")
    return {
        "pieces": _pieces(run, state.params, batch["inputs"]) if once else None,
        "statistics": _statistics(run, state.params, batch["inputs"]) if with_statistics else None,
        "loss": [m["loss"] for m in metrics],
        "grad_norm": [m["grad_norm"] for m in metrics],
        "parts": parts,
        "parts_after": _parts(state),
        "specs": specs,
        "batch_part": batch["inputs"].addressable_shards[0].data.shape,
        "collectives": [[c.kind, c.bytes, c.times, c.loops, c.op_name] for c in collectives.read(text)],
        "inner_loops": sum("_inner_loop" in line for line in text.splitlines() if " while(" in line),
    }


def _splash():
    """Have attention computed by the splash kernel for any heads, interpreted."""
    interpreted = functools.partial(splash.causal_attention, interpret=True)
    return unittest.mock.patch.multiple(splash, choose=lambda *_: True, causal_attention=interpreted)


def _statistics(run, params, tokens):
    """Return the inner-loop statistics of each layer in a first and a second piece of the sequences, by name."""

    @jax.jit
    def read(params, tokens):
        state = run.model.initial_state(*tokens.shape)
        (_, state), first = run.model.apply({"params": params}, tokens[:, :5], state, mutable=["statistics"])
        _, second = run.model.apply({"params": params}, tokens[:, 5:], state, mutable=["statistics"])
        return first, second

    with sharding.on_mesh(run.mesh, run.rules):
        return _by_name(lambda x: np.asarray(x).tolist(), read(params, tokens))


def _pieces(run, params, tokens):
    """Return logits [B, T, V] of sequences with random padding and documents, read in two pieces; 0 at padding."""
    masks = np.random.default_rng(0).random((2, *tokens.shape)) < np.array([0.7, 0.3])[:, None, None]

    @jax.jit
    def read(params, tokens, valid, reset):
        state, found = run.model.initial_state(*tokens.shape), []
        for piece in np.s_[:, :5], np.s_[:, 5:]:
            context = Context(valid[piece], reset[piece])
            logits, state = run.model.apply({"params": params}, tokens[piece], state, context)
            found.append(logits * valid[piece][..., None])
        return jax.numpy.concatenate(found, 1)

    with sharding.on_mesh(run.mesh, run.rules):
        return np.asarray(read(params, tokens, *jax.device_put(tuple(masks), (run.batch_sharding,) * 2))).tolist()


def _by_name(function, tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): function(x) for path, x in leaves}


def _parts(state):
    return _by_name(lambda x: x.addressable_shards[0].data.shape, state)


def _specs(state):
    return _by_name(lambda x: list(x.sharding.spec), state)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    mixer, meshes, *options = sys.argv[1:]
    shapes = [tuple(map(int, mesh.split("x"))) for mesh in meshes.split(",")]
    if options == ["kernel"]:
        without, fused = ("xla", "splash") if "attention" in mixer else ("scan", "pallas")
        found = {ONE: train(mixer, ONE, without), **{shape: train(mixer, shape, fused) for shape in shapes}}
    elif options == ["chunks"]:
        found = {ONE: train(mixer, ONE)}
        loss.MOST_LOGITS, loss._CHUNK_LOGITS = 0, 3 * 16  # of the 16 tokens of a row or two
        found |= {shape: train(mixer, shape) for shape in shapes}
    else:
        found = {shape: train(mixer, shape) for shape in (ONE, *shapes)}
    print(json.dumps({"x".join(map(str, shape)): x for shape, x in found.items()}))
