"""``configs/pile.py``: the sizes of the paper, and that their meshes divide them."""

from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from ttt_jax import config as config_lib
from ttt_jax import config_file
from ttt_jax.config import MIXERS, ConfigError
from ttt_jax.parallel import sharding
from ttt_jax.training import program

PILE = Path(__file__).parents[1] / "configs" / "pile.py"
SIZES = {"125m": 125e6, "350m": 350e6, "760m": 760e6, "1.3b": 1.3e9}
CONTEXTS = ("2k", "4k", "8k", "16k", "32k")


def get(argument):
    return config_file.from_arguments(["--config", f"{PILE}:{argument}"])


def chips(size, context):
    """What the docstring says."""
    return {("125m", "16k"): 128, ("125m", "32k"): 64}.get((size, context), 256)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_argument(mixer, size, context):
    config = get(f"{mixer},{size},{context}")
    assert config.model.mixer == mixer
    assert config.data.sequence_length == 1024 * int(context[:-1])
    assert config.data.batch_size * config.data.sequence_length == 2**19
    shape = config_lib.mesh_shape(config, chips(size, context))
    assert config.data.batch_size == shape["data"] * shape["fsdp"]  # a row each, or one for those that share it
    assert config.model.num_heads % shape["tensor"] == 0
    assert shape["fsdp"] * shape["tensor"] == 16 or size == "125m"  # parts of the parameters


@pytest.mark.parametrize("context", ["2k", "32k"])
@pytest.mark.parametrize("size", SIZES)
def test_parameters_divide_and_are_as_many_as_the_name_says(size, context):
    config = get(f"ttt_linear,{size},{context}")
    shape = config_lib.mesh_shape(config, chips(size, context))
    mesh = AbstractMesh(tuple(shape.values()), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    parameters = program.make(config, mesh).abstract_state.params
    assert sum(x.size for x in jax.tree.leaves(parameters)) == pytest.approx(SIZES[size], rel=0.15)


def test_durations_are_those_of_the_paper():
    steps = [config_lib.steps(get(f"ttt_linear,{size}"), "training.duration") for size in SIZES]
    assert steps == [4768, 13351, 28610, 49591]  # of half a million tokens
    assert config_lib.steps(get("ttt_linear,1.3b"), "optimizer.warmup") == 4959


@pytest.mark.parametrize("argument", ["lstm", "ttt_linear,2b", "ttt_linear,1.3b,3k", "ttt_linear,1.3b,2k,x"])
def test_what_there_is_not(argument):
    with pytest.raises(ConfigError, match=r"expected mixer,size,context: one of ttt_linear, .*; of 125m, .*; of 2k, "):
        get(argument)
