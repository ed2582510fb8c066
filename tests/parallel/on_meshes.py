"""Training steps of tiny models on meshes of one and of eight CPU devices, in one process; prints JSON.

Needs eight devices, so it is a program that test_sharding.py starts.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ttt_jax import config as config_lib
from ttt_jax.parallel import sharding
from ttt_jax.training import program

ONE, DATA, ALL = (1, 1, 1), (8, 1, 1), (2, 2, 2)  # devices along data, fsdp and tensor
RUNS = [("attention", ONE), ("attention", ALL), ("ttt_linear", ONE), ("ttt_linear", DATA), ("ttt_linear", ALL)]


def make_mesh(shape):
    """A mesh over eight devices; for the reference of one device, over the first of them."""
    if shape == ONE:
        one = np.array(jax.devices()[:1]).reshape(ONE)
        return Mesh(one, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    return sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape, strict=True)))


def train(mixer, mesh):
    """Loss and gradient norm of three steps, and where the arrays lie."""
    config = config_lib.default()
    config.model.update(mixer=mixer, vocab_size=16, width=8, num_heads=2, num_layers=1, mlp_width=16, init_stddev=0.3)
    config.model.ttt.update(mini_batch=4, remat_group=0)
    config.data.update(sequence_length=8, batch_size=8)
    config.optimizer.update(peak_lr=0.05, end_lr=0.05, warmup="1 step", weight_decay=0.01)
    config.training.duration = "4 steps"
    config_lib.validate(config)
    run = program.make(config, make_mesh(mesh))
    state, step = run.initial_state(), run.compiled_step()
    parts, specs, metrics = _parts(state), _specs(state), []
    for i in range(4):  # the first has a rate of 0
        tokens = np.random.default_rng(i // 3).integers(0, 16, (8, 9), dtype=np.int32)
        mask = (tokens[:, 1:] > 2).astype(np.float32)
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}
        batch = jax.device_put(batch, run.batch_sharding)
        state, values = step(state, batch)
        metrics.append({name: float(x) for name, x in values.items()})
    return {
        "loss": [m["loss"] for m in metrics[1:]],
        "grad_norm": [m["grad_norm"] for m in metrics[1:]],
        "parts": parts,
        "parts_after": _parts(state),
        "specs": specs,
        "batch_part": batch["inputs"].addressable_shards[0].data.shape,
    }


def _by_name(function, tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): function(x) for path, x in leaves}


def _parts(state):
    return _by_name(lambda x: x.addressable_shards[0].data.shape, state)


def _specs(state):
    return _by_name(lambda x: list(x.sharding.spec), state)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    print(json.dumps({f"{mixer} {'x'.join(map(str, mesh))}": train(mixer, mesh) for mixer, mesh in RUNS}))
