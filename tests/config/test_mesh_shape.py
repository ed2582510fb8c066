"""The mesh that a config makes of so many devices."""

import pytest
from parsing import error_of

from ttt_jax import config as config_lib


def mesh_shape(devices, batch_size=8, accumulation=1, **sizes):
    config = config_lib.default()
    config.mesh.update(sizes)
    config.data.batch_size, config.training.accumulation = batch_size, accumulation
    return config_lib.mesh_shape(config, devices)


def test_mesh_shapes():
    assert mesh_shape(1) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert mesh_shape(8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh_shape(8, fsdp=2, tensor=2) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh_shape(8, data=1, fsdp=-1, tensor=2) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert mesh_shape(6, data=3, fsdp=2, tensor=1, batch_size=12) == {"data": 3, "fsdp": 2, "tensor": 1}
    assert mesh_shape(8, batch_size=16, accumulation=2)["data"] == 8
    assert mesh_shape(6, batch_size=1, data=1, tensor=6)["tensor"] == 6  # which does not split the batch


@pytest.mark.parametrize(
    ("devices", "sizes", "essentials"),
    [
        (8, {"data": 3}, ["mesh.data=3", "8 devices"]),
        (8, {"data": 2}, ["mesh.data=2", "mesh.fsdp=1", "mesh.tensor=1", "8 devices", "product is 8"]),
        (1, {"tensor": 2}, ["mesh.tensor=2", "1 devices"]),
        (4, {"data": 8}, ["mesh.data=8", "4 devices"]),
        (8, {"fsdp": -1}, ["mesh.fsdp=-1", "mesh.data is -1 too", "one -1 at most"]),
        (8, {"data": 1, "fsdp": -1, "tensor": -1}, ["mesh.tensor=-1", "mesh.fsdp is -1 too"]),
        (8, {"data": 0}, ["mesh.data=0", "a positive number of devices, or -1"]),
        (8, {"tensor": -2}, ["mesh.tensor=-2", "a positive number of devices, or -1"]),
        (8, {"data": 1, "tensor": 8}, ["mesh.tensor=8", "model.num_heads=12", "a divisor"]),
        (8, {"batch_size": 12}, ["data.batch_size=12", "8 devices", "a multiple of 8"]),
        (8, {"batch_size": 4, "data": 2, "fsdp": 4}, ["data.batch_size=4", "8 devices", "mesh.data x mesh.fsdp"]),
        (
            8,
            {"batch_size": 8, "accumulation": 2},
            ["data.batch_size=8", "training.accumulation=2", "a multiple of 16"],
        ),
    ],
    ids=str,
)
def test_meshes_that_do_not_fit(devices, sizes, essentials):
    message = error_of(mesh_shape, devices, **sizes)
    assert all(text in message for text in essentials), message
