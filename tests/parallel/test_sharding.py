"""Where arrays are placed, and that the mesh changes no number: on eight CPU devices, in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ttt_jax.config import ConfigError
from ttt_jax.parallel import sharding

PROGRAM = Path(__file__).with_name("on_meshes.py")
RULES = sharding.ShardingRules()


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.fixture(scope="module")
def runs():
    """What ``on_meshes.py`` prints: for each mixer and mesh, three steps and where the arrays lay."""
    command = [sys.executable, str(PROGRAM), jax.config.jax_compilation_cache_dir]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- Numbers


@pytest.mark.slow
@pytest.mark.parametrize("run", ["attention 2x2x2", "ttt_linear 8x1x1", "ttt_linear 2x2x2"])
def test_training_is_the_same_on_every_mesh(runs, run):
    on_one = runs[f"{run.split()[0]} 1x1x1"]
    assert len(on_one["loss"]) == 3
    assert min(abs(np.diff(on_one["loss"]))) > 0.01  # the steps are felt
    np.testing.assert_allclose(runs[run]["loss"], on_one["loss"], rtol=1e-5)
    np.testing.assert_allclose(runs[run]["grad_norm"], on_one["grad_norm"], rtol=1e-4)


# ---- Places


def test_parameters_and_their_moments_lie_in_parts_where_the_rules_say(runs):
    """Width 8, two heads, feed-forward width 16, vocabulary 16 over fsdp=2 x tensor=2."""
    run = runs["ttt_linear 2x2x2"]
    expected = {  # shape of the part that one device holds, the first axis being that of layers
        "embedding": [16 // 2, 8 // 2],
        "final_norm/scale": [8],
        "layers/conv/kernel": [1, 4, 8],
        "layers/mixer/wq/kernel": [1, 8 // 2, 8 // 2],
        "layers/mixer/wo/kernel": [1, 8 // 2, 8 // 2],
        "layers/mixer/eta_kernel": [1, 8, 2 // 2],
        "layers/mixer/inner_kernel_0": [1, 2 // 2, 4, 4],
        "layers/mixer/tau": [1, 4],
        "layers/mlp/gate/kernel": [1, 8 // 2, 16 // 2],
        "layers/mlp/down/kernel": [1, 16 // 2, 8 // 2],
    }
    for name, shape in expected.items():
        for tree in ("params", "opt_state/1/0/mu", "opt_state/1/0/nu"):
            assert run["parts"][f"{tree}/{name}"] == shape, (tree, name)
    assert run["parts"]["step"] == []
    assert run["specs"]["params/layers/mixer/wq/kernel"] == [None, "fsdp", "tensor"]
    assert run["specs"]["params/layers/mixer/wo/kernel"] == [None, "tensor", "fsdp"]
    assert run["specs"]["params/embedding"] == ["tensor", "fsdp"]
    assert run["batch_part"] == [8 // (2 * 2), 8]  # rows over data x fsdp


def test_on_the_data_axis_alone_everything_is_replicated(runs):
    run = runs["ttt_linear 8x1x1"]
    assert run["parts"]["params/embedding"] == [16, 8]
    assert run["parts"]["params/layers/mlp/gate/kernel"] == [1, 8, 16]
    assert run["batch_part"] == [1, 8]


def test_training_leaves_parameters_where_they_were(runs):
    for run in runs.values():
        assert run["parts_after"] == run["parts"]


def test_rules():
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


def test_a_dimension_that_does_not_divide():
    tree = {"layers": {"wq": boxed((8, 6), ("embed", "heads"))}}
    with pytest.raises(ConfigError) as caught:
        sharding.state_sharding(tree, abstract_mesh(1, 1, 4), RULES)
    message = "mesh.tensor=4: does not divide the heads axis of layers/wq, 6; expected a divisor"
    assert str(caught.value) == message
    sharding.state_sharding(tree, abstract_mesh(1, 8, 3), RULES)


def test_two_dimensions_on_one_mesh_axis():
    tree = {"wo": boxed((8, 8), ("heads", "mlp"))}
    with pytest.raises(ConfigError) as caught:
        sharding.state_sharding(tree, abstract_mesh(1, 2, 2), RULES)
    message = str(caught.value)
    assert message.startswith("wo: ")
    assert "'heads', 'mlp'" in message
    assert message.endswith("mesh axis tensor")


def test_a_mesh_axis_of_one_device_can_be_asked_for_twice():
    """It splits nothing."""
    placed = sharding.state_sharding({"wo": boxed((8, 8), ("heads", "mlp"))}, abstract_mesh(2, 2, 1), RULES)
    assert placed["wo"].shard_shape((8, 8)) == (8, 8)


def test_meshes_have_the_size_of_each_axis():
    mesh = sharding.make_mesh({"tensor": 1, "data": 1, "fsdp": 1})
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
