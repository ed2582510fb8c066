"""A cloud that is a folder, and ``ttt launch tpu`` in it."""

import functools
import os
from pathlib import Path

import pytest
from clouds import TRAIN, Cloud

from ttt_jax import cli
from ttt_jax.launch import commands, tpu_machines, tpu_run, versions

_constraints = functools.cache(versions.constraints)  # which takes a third of a second


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    cloud = Cloud(tmp_path / "cloud")
    monkeypatch.setenv("CLOUD", str(cloud.folder))
    monkeypatch.setenv("PATH", f"{cloud.folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(commands, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(tpu_machines, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(tpu_run, "FIRST_PAUSE", 0.01)
    few = ("configs/quickstart.py", "launch/worker.sh", "setup.py")  # packing and unpacking the others takes seconds
    monkeypatch.setattr(versions, "files", lambda checkout: tuple(map(Path, few)))
    monkeypatch.setattr(versions, "constraints", lambda extras: _constraints(tuple(extras)))
    yield cloud
    cloud.end()


@pytest.fixture
def launch(cloud):
    """``launch(*options, command=TRAIN)``: the exit status of ``ttt launch tpu``."""

    def run(*options, command=TRAIN, accelerator="v5litepod-8") -> int:
        machines = ["--accelerator", accelerator, "--zone", "us-west4-a", "--poll", "0.1"]
        return cli.main(["launch", "tpu", *machines, *map(str, options), "--", *command])

    return run
