"""A cloud that is a folder, and ``ttt launch tpu`` in it."""

import contextlib
import ctypes
import functools
import os
import sys
import threading
from pathlib import Path

import pytest
from clouds import TRAIN, Cloud

from ttt_jax import cli
from ttt_jax.launch import commands, tpu_machines, tpu_run, versions

_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
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
    with _init_of(cloud):
        yield cloud
        cloud.end()


@contextlib.contextmanager
def _init_of(cloud):
    """Take what has ended on the machines off the list of processes at once, as their init does.

    The supervisor of a command is left behind by its parent, and is followed until its process is gone. The first
    process of a container may let it stay for seconds, or for ever.
    """
    if sys.platform != "linux":
        yield
        return
    over, prctl = threading.Event(), ctypes.CDLL(None).prctl

    def take():
        while not over.wait(0.02):
            for path in cloud.folder.glob("machines/*/*/*/ttt-launch/*/runs/*/supervisor"):
                with contextlib.suppress(ChildProcessError, ValueError):  # not left behind yet, or half written
                    os.waitpid(int(path.read_text()), os.WNOHANG)

    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def launch(cloud):
    """``launch(*options, command=TRAIN)``: the exit status of ``ttt launch tpu``."""

    def run(*options, command=TRAIN, accelerator="v5litepod-8") -> int:
        machines = ["--accelerator", accelerator, "--zone", "us-west4-a", "--poll", "0.1"]
        return cli.main(["launch", "tpu", *machines, *map(str, options), "--", *command])

    return run
