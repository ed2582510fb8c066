"""Check where arrays are placed, what devices send to each other, and that the mesh does not change results.

The programs run on eight CPU devices, or are compiled for eight TPU chips, in processes of their own.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from ttt_jax.config import ConfigError
from ttt_jax.distributed import sharding
from ttt_jax.mixers import MIXERS

HERE = Path(__file__).parent
RULES = sharding.ShardingRules()
MESHES = ["8x1x1", "1x8x1", "2x2x2", "1x2x4"]


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@functools.cache
def run(program, *arguments):
    """Run a program beside this file and return the JSON that it prints."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    command = [sys.executable, str(HERE / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_meshes():
    """Return a function of a mixer: 20 steps of a tiny model, the places of its arrays and its collectives, by mesh."""
    return lambda mixer: run("on_meshes.py", mixer, ",".join(meshes_of(mixer)))


def meshes_of(mixer):
    """Return all meshes for TTT-Linear and TTT-MLP, and for other mixers the one that splits every axis."""
    return MESHES if mixer in ("ttt_linear", "ttt_mlp") else ["2x2x2"]


# ---- Numbers


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [*MIXERS, "ttt_linear + attention"])
def test_training_is_the_same_on_every_mesh(on_meshes, mixer):
    """Compare 20 steps, whose losses differ only by the order of float32 sums."""
    one = on_meshes(mixer)["1x1x1"]
    assert len(one["loss"]) == 20
    assert one["loss"][0] - one["loss"][-1] > 0.2  # the steps change the loss
    for mesh in meshes_of(mixer):
        np.testing.assert_allclose(on_meshes(mixer)[mesh]["loss"], one["loss"], rtol=2e-6, err_msg=mesh)
        np.testing.assert_allclose(on_meshes(mixer)[mesh]["grad_norm"], one["grad_norm"], rtol=1e-5, err_msg=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_documents_and_states_are_the_same_on_a_mesh(on_meshes, mixer):
    """Compare logits of two pieces after 20 steps; the state between them is split over batch and heads."""
    one, split = (np.array(on_meshes(mixer)[mesh]["pieces"]) for mesh in ("1x1x1", "2x2x2"))
    assert one.shape == (8, 8, 16)
    assert 0.2 < np.mean(one == 0) < 0.4  # padding
    np.testing.assert_allclose(split, one, rtol=0, atol=1e-4 * np.abs(one).max())


@pytest.mark.slow
def test_a_loss_in_chunks_is_the_same_on_meshes_and_sums_gradients_once():
    """Compare with the loss at once on one device; 2x2x2 splits the batch, the width and the vocabulary."""
    found = run("on_meshes.py", "attention", "2x2x2,8x1x1", "chunks")
    for mesh in ("2x2x2", "8x1x1"):
        np.testing.assert_allclose(found[mesh]["loss"], found["1x1x1"]["loss"], rtol=2e-6)
        np.testing.assert_allclose(found[mesh]["grad_norm"], found["1x1x1"]["grad_norm"], rtol=1e-5)
    loops = [loops for *_, loops, _ in found["8x1x1"]["collectives"] if loops]
    assert loops  # those of the layers, and none of the chunks
    assert not [loop for loop in loops if any("shard_map" in name for name in loop)]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["ttt_linear", "sliding + attention"])
def test_fused_kernels_on_a_mesh_match_the_plain_form_without(mixer):
    """Check kernels that compute on each device for its own sequences and heads; four heads share two of keys."""
    found = run("on_meshes.py", mixer, "2x2x2", "kernel")
    one, split = found["1x1x1"], found["2x2x2"]
    assert one["loss"][0] - one["loss"][-1] > 0.2
    np.testing.assert_allclose(split["loss"], one["loss"], rtol=2e-6)
    np.testing.assert_allclose(split["grad_norm"], one["grad_norm"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "quantities"), [("ttt_mlp", 8), ("ttt", 7)])
def test_inner_loop_statistics_are_the_same_on_a_mesh(on_meshes, mixer, quantities):
    """Compare statistics with batch, heads and the hidden width of the learner split.

    The second piece reads the state of the first, for mixer ttt with gates and momentum.
    """
    one, split = (on_meshes(mixer)[mesh]["statistics"] for mesh in ("1x1x1", "2x2x2"))
    assert one.keys() == split.keys()
    assert np.shape(one["0/statistics/layers/mixer/weight_distance"]) == (2, 8, 5, 4)
    assert len(one) == 2 * quantities
    for name, value in one.items():
        near_zero = 1e-5 * np.max(np.abs(value)) if mixer == "ttt" else 0  # dot products may be nearly zero
        np.testing.assert_allclose(split[name], value, rtol=1e-3, atol=near_zero, err_msg=name)
        assert np.ptp(value) > 0, name


# ---- Communication


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "mesh"), [(mixer, mesh) for mixer in ("ttt_linear", "ttt_mlp", "ttt") for mesh in meshes_of(mixer)]
)
def test_nothing_is_sent_inside_the_inner_loop(on_meshes, mixer, mesh):
    found = on_meshes(mixer)[mesh]
    assert found["inner_loops"] == 2  # forwards and backwards
    assert found["collectives"]
    assert [c for c in found["collectives"] if any("_inner_loop" in loop for loop in c[3])] == []


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("mixer", "mesh", "kernel"),
    [
        ("ttt_linear", "2x2x2", "auto"),
        ("ttt_linear", "1x8x1", "scan"),
        ("ttt_mlp", "1x8x1", "auto"),
        ("attention", "1x8x1", "auto"),
        ("attention", "2x2x2", "splash"),
    ],
)
def test_tpus_send_nothing_in_the_inner_loop_and_scatter_gradients(mixer, mesh, kernel):
    """Check that gradients of matrices are scattered as they are summed, and that none is sent whole."""
    found = run("on_tpus.py", mixer, mesh, kernel)
    kinds, sizes, times, loops, _ = zip(*found["collectives"], strict=True)
    # Forwards, again for remat, and backwards.
    fused = kernel == "auto" and mixer != "attention"
    forward, backward = (f"{mixer}_{way}" for way in ("forward", "backward"))
    expected = [backward, forward, forward] if fused else []
    if kernel == "splash":  # whose forward kernel runs once
        expected = ["splash_backward", "splash_mha_fwd_residuals"]
    assert sorted(found["kernels"]) == expected
    assert found["inner_loops"] == (0 if fused or mixer == "attention" else 3)
    assert not any("_inner_loop" in loop for stack in loops for loop in stack)

    _, fsdp, tensor = map(int, mesh.split("x"))
    width, feed_forward, vocabulary, layers = 256, 512, 512, 3
    mixer_matrices = 4 * width * width
    matrices = (layers * (mixer_matrices + 3 * width * feed_forward) + 2 * vocabulary * width) * 4 // tensor
    inner = 0 if mixer == "attention" else layers * 4 * (2 * 64 * 256 if mixer == "ttt_mlp" else 64 * 64) * 4 // tensor
    scattered = sum(s * n for kind, s, n in zip(kinds, sizes, times, strict=True) if kind == "reduce-scatter")
    # The embedding is summed whole over the vocabulary, then split over tensor.
    assert matrices <= scattered <= matrices + inner + vocabulary * width * 4 * (1 - 1 / tensor)

    if fsdp == 8:  # nothing is split over tensor, and there are no copies to keep equal
        summed = sum(s * n for kind, s, n in zip(kinds, sizes, times, strict=True) if kind == "all-reduce")
        assert summed <= inner + layers * 40 * width * 4  # W0, norms and other small vectors


# ---- Places


@pytest.mark.slow
def test_parameters_and_their_moments_are_split_by_the_rules(on_meshes):
    """Check width 32, four heads of 8, feed-forward width 64, vocabulary 16, two layers, over fsdp=2 x tensor=2."""
    run = on_meshes("ttt_linear")["2x2x2"]
    expected = {  # shape of the part that one device holds, the first axis being that of layers
        "embedding": [16 // 2, 32 // 2],
        "final_norm/scale": [32],
        "layers/conv/kernel": [2, 4, 32],
        "layers/mixer/wq/kernel": [2, 32 // 2, 32 // 2],
        "layers/mixer/wo/kernel": [2, 32 // 2, 32 // 2],
        "layers/mixer/eta_kernel": [2, 32, 4 // 2],
        "layers/mixer/inner_kernel_0": [2, 4 // 2, 8, 8],
        "layers/mixer/tau": [2, 4],
        "layers/mlp/gate/kernel": [2, 32 // 2, 64 // 2],
        "layers/mlp/down/kernel": [2, 64 // 2, 32 // 2],
    }
    for name, shape in expected.items():
        for tree in ("params", "opt_state/1/0/mu", "opt_state/1/0/nu"):
            assert run["parts"][f"{tree}/{name}"] == shape, (tree, name)
    assert run["parts"]["step"] == []
    assert run["specs"]["params/layers/mixer/wq/kernel"] == [None, "fsdp", "tensor"]
    assert run["specs"]["params/layers/mixer/wo/kernel"] == [None, "tensor", "fsdp"]
    assert run["specs"]["params/embedding"] == ["tensor", "fsdp"]
    assert run["batch_part"] == [8 // (2 * 2), 8]  # rows over data x fsdp


@pytest.mark.slow
def test_hidden_layers_of_learners_are_split_over_fsdp(on_meshes):
    """Check learners 8 -> 32 -> 8."""
    parts = on_meshes("ttt_mlp")["2x2x2"]["parts"]
    assert parts["params/layers/mixer/inner_kernel_0"] == [2, 4 // 2, 8, 32 // 2]
    assert parts["params/layers/mixer/inner_kernel_1"] == [2, 4 // 2, 32 // 2, 8]


@pytest.mark.slow
def test_the_data_axis_alone_replicates_parameters(on_meshes):
    run = on_meshes("ttt_linear")["8x1x1"]
    assert run["parts"]["params/embedding"] == [16, 32]
    assert run["parts"]["params/layers/mlp/gate/kernel"] == [2, 32, 64]
    assert run["batch_part"] == [1, 8]


@pytest.mark.slow
def test_a_training_step_keeps_the_placement_of_parameters(on_meshes):
    for mixer in ("ttt_linear", "ttt_mlp"):
        for run in on_meshes(mixer).values():
            assert run["parts_after"] == run["parts"]


def test_rules_map_logical_axes_to_mesh_axes():
    mesh = abstract_mesh(2, 2, 2)
    tree = {
        "a": boxed((4, 6), ("embed", "heads")),
        "b": boxed((6, 4, 3), ("num_heads", None, None)),
        "c": boxed((5, 4), ("layers", "embed")),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    placed = sharding.state_sharding(tree, mesh, RULES)
    assert {name: leaf.spec for name, leaf in placed.items()} == {
        "a": PartitionSpec("fsdp", "tensor"),
        "b": PartitionSpec("tensor", None, None),
        "c": PartitionSpec(None, "fsdp"),
        "step": PartitionSpec(),
    }
    assert sharding.batch_sharding(mesh, RULES).spec == PartitionSpec(("data", "fsdp"))


def test_a_dimension_that_does_not_divide_is_refused():
    tree = {"layers": {"wq": boxed((8, 6), ("embed", "heads"))}}
    with pytest.raises(ConfigError) as caught:
        sharding.state_sharding(tree, abstract_mesh(1, 1, 4), RULES)
    message = "mesh.tensor=4: does not divide the heads axis of layers/wq, 6; expected a divisor"
    assert str(caught.value) == message
    sharding.state_sharding(tree, abstract_mesh(1, 8, 3), RULES)


def test_two_dimensions_on_one_mesh_axis_are_refused():
    tree = {"wo": boxed((8, 8), ("heads", "mlp"))}
    with pytest.raises(ConfigError) as caught:
        sharding.state_sharding(tree, abstract_mesh(1, 2, 2), RULES)
    message = str(caught.value)
    assert message.startswith("wo: ")
    assert "'heads', 'mlp'" in message
    assert message.endswith("mesh axis tensor")


def test_two_dimensions_may_share_a_mesh_axis_of_one_device():
    placed = sharding.state_sharding({"wo": boxed((8, 8), ("heads", "mlp"))}, abstract_mesh(2, 2, 1), RULES)
    assert placed["wo"].shard_shape((8, 8)) == (8, 8)


def test_meshes_have_the_size_of_each_axis():
    mesh = sharding.make_mesh({"tensor": 1, "data": 1, "fsdp": 1})
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3


# ---- Batches


def test_a_single_process_holds_all_rows_of_the_batch():
    """Check a mesh that may order devices in another way than JAX."""
    devices = np.array(jax.devices()).reshape(1, 1, 1)
    where = sharding.batch_sharding(Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3), RULES)
    assert sharding.rows_of_this_process(where, 4) == [0, 1, 2, 3]
    x = np.arange(12).reshape(4, 3)
    batch = sharding.global_batch({"inputs": x}, [0, 1, 2, 3], 4, where)
    np.testing.assert_array_equal(batch["inputs"], x)


class PartOfAPod:
    """A sharding as seen by a process that has some devices of a mesh, with given parts of the batch."""

    def __init__(self, *parts):
        self.parts = parts

    def addressable_devices_indices_map(self, shape):
        return {i: (slice(*part),) for i, part in enumerate(self.parts)}


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        ([(0, 2), (2, 4)], [0, 1, 2, 3]),
        ([(6, 8), (0, 2)], [0, 1, 6, 7]),  # not neighbours
        ([(2, 4), (2, 4)], [2, 3]),  # split over tensor: the same rows
        ([(None, None)], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_rows_of_a_process(parts, rows):
    assert sharding.rows_of_this_process(PartOfAPod(*parts), 8) == rows
