"""Catch figures that have no file to be written to."""

import matplotlib.pyplot as plt
import pytest

from ttt_jax.figures import style


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of figures that were drawn without a file."""
    figures, save = [], style.save
    monkeypatch.setattr(style, "save", lambda figure, *to: save(figure, *to) if to else figures.append(figure))
    yield figures
    for figure in figures:
        plt.close(figure)
