"""What the statuses of all hosts mean together; and accelerator types."""

import pytest

from ttt_jax.config import ConfigError
from ttt_jax.launch import accelerators
from ttt_jax.launch.workers import Worker, verdict


def host(status, when=0, state="exited"):
    return Worker("node", str(when), "run", state, status, when)


@pytest.mark.parametrize(
    ("statuses", "together"),
    [
        ([0, 0], 0),
        ([0, 75], 75),
        ([75, 134], 75),
        ([137, 0], 75),  # killed
        ([143, 139], 75),
        ([75, 1, 134], 1),  # the failure of one ends the others
        ([2, 2], 2),
        ([75, 130], 130),
        ([127, 75], 127),
    ],
)
def test_verdict(statuses, together):
    assert verdict([host(status, when) for when, status in enumerate(statuses)]).status == together


def test_the_first_failure_counts():
    found = verdict([host(2, 30), host(75, 5), host(1, 10), host(134, 9)])
    assert (found.status, found.worker) == (1, host(1, 10))
    assert verdict([host(75, 9), host(134, 5), host(0, 1)]).worker == host(134, 5)
    assert verdict([host(0), host(None, state="lost")]).restart


@pytest.mark.parametrize(
    ("name", "devices", "several", "image"),
    [
        ("v5litepod-256", 256, True, "v2-alpha-tpuv5-lite"),
        ("v5litepod-8", 8, False, "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", 16, True, "v2-alpha-tpuv5-lite"),
        ("v4-32", 16, True, "tpu-ubuntu2204-base"),
        ("v4-8", 4, False, "tpu-ubuntu2204-base"),
        ("v5p-128", 64, True, "v2-alpha-tpuv5"),
        ("v6e-8", 8, False, "v2-alpha-tpuv6e"),
        ("v3-8", 8, False, "tpu-ubuntu2204-base"),  # a device of JAX is a core there
    ],
)
def test_accelerators(name, devices, several, image):
    assert accelerators.parse(name) == (name, devices, several, image)


@pytest.mark.parametrize("name", ["", "v5e-256", "v4-7", "v5litepod", "v5litepod-0", "v9-8", "V4-8", "v4-8 --spot"])
def test_unknown_accelerators(name):
    with pytest.raises(ConfigError, match="--accelerator"):
        accelerators.parse(name)
