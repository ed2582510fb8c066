"""Parse names of topologies, and make their devices."""

import importlib.util
import os

import jax
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.planning import topology


@pytest.mark.parametrize(
    ("text", "slices", "expected", "chips"),
    [
        ("v5e:16x16", 1, ("v5e", (16, 16), 1), 256),
        ("v6e:2x4", 3, ("v6e", (2, 4), 3), 24),
        ("v5p:4x4x8", 1, ("v5p", (4, 4, 8), 1), 128),
        ("cpu:8", 1, ("cpu", (8,), 1), 8),
    ],
)
def test_names_of_topologies(text, slices, expected, chips):
    found = topology.parse(text, slices)
    assert tuple(found) == expected
    assert found.chips == chips
    assert str(found) == text + (f" x {slices}" if slices > 1 else "")


@pytest.mark.parametrize(
    "text", ["", "v5e", "v5e:3x3", "v5e:32x32", "v5e:4x4x4", "v5p:4x4", "v5p:0x4x4", "cpu:0", "cpu:2x2", "h100:8"]
)
def test_unknown_names_are_refused(text):
    with pytest.raises(ConfigError) as caught:
        topology.parse(text)
    message = str(caught.value)
    assert message.startswith(f"--topology {text}: expected v5e:AxB or v6e:AxB with AxB one of 1x1, 2x2, ")
    assert message.count("\n") == 0


def test_slices_of_cpus_are_refused():
    with pytest.raises(ConfigError, match="--slices is for TPUs"):
        topology.parse("cpu:8", 2)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'libtpu>="):
        topology.prepare(topology.parse("v5e:2x2"))
    topology.prepare(topology.parse("cpu:8"))


def test_cpu_devices_when_jax_has_started():
    there = len(jax.devices("cpu"))
    cache = jax.config.jax_enable_compilation_cache
    try:
        assert topology.devices(topology.parse(f"cpu:{there}")) == jax.devices("cpu")
        with pytest.raises(ConfigError, match=rf"this process has {there} CPU devices; expected cpu:{there}$"):
            topology.devices(topology.parse(f"cpu:{there + 1}"))
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
