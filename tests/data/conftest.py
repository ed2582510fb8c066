"""Provide folders in memory."""

import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def new_folder():
    """Return ``new_folder()``, which makes a folder, in memory where possible.

    TensorStore waits for the disk at every write, and a run that saves after every unit writes a lot.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as parent:
        yield lambda: Path(tempfile.mkdtemp(dir=parent))


@pytest.fixture
def tmp_path(new_folder):
    """Return a new folder, as pytest's fixture of this name does, in memory where possible."""
    return new_folder()
