"""Catch figures that have no file to be written to, and write made-up runs quickly."""

import os

import matplotlib.pyplot as plt
import pytest

from ttt_jax.evaluation import statistics
from ttt_jax.figures import style


@pytest.fixture(scope="package", autouse=True)
def quick_files():
    """Take few samples of the bootstrap, and leave it to the system when files are written to the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_REPETITIONS", 20)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of figures that were drawn without a file."""
    figures, save = [], style.save
    monkeypatch.setattr(style, "save", lambda figure, *to: save(figure, *to) if to else figures.append(figure))
    yield figures
    for figure in figures:
        plt.close(figure)
