"""Provide a folder in memory."""

import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def memory_path(tmp_path):
    """Return a folder like ``tmp_path``, in memory where possible.

    TensorStore waits for the disk at every write, and a run that saves after every unit writes a lot.
    """
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)
