"""Check heat maps: the place of each number, and texts."""

import re

import numpy as np
import pytest
from matplotlib import image

from ttt_jax.config import ConfigError
from ttt_jax.figures import heat_map


def cells(contexts=(512, 1024, 4096), depths=(0.0, 50.0, 100.0)):
    """Return all cells but one."""
    return [
        {"context": context, "depth": depth, "accuracy": i / 10 + j / 100}
        for i, context in enumerate(contexts)
        for j, depth in enumerate(depths)
        if (i, j) != (2, 1)
    ]


@pytest.fixture
def panel():
    return heat_map.panel(cells()[::-1], "a run: passkey", "depth", "{:g} %".format, "accuracy", 1024)


def test_a_panel_is_a_table(panel):
    assert panel.rows == ["0 %", "50 %", "100 %"]
    assert panel.columns == ["512", "1k", "4k"]
    np.testing.assert_allclose(panel.shares, [[0, 0.1, 0.2], [0.01, 0.11, np.nan], [0.02, 0.12, 0.22]])
    assert panel.trained == 2
    assert panel.title == "a run: passkey\ntrained on 1,024 tokens"


def test_texts_of_a_heat_map(panel, tmp_path):
    path = tmp_path / "new" / "map.svg"
    heat_map.save([[panel, panel], [panel]], path, "share right")
    words = re.findall(r"<!-- (.*?) -->", path.read_text())
    assert words.count("0.11") == 3
    assert words.count("4k") == 3
    assert words.count("context (tokens)") == 3
    assert words.count("share right") == 1
    assert "nan" not in words
    heat_map.save([[panel]], tmp_path / "map.png", "share right")
    pixels = image.imread(tmp_path / "map.png")
    assert pixels.shape[0] > 200
    assert np.ptp(pixels[..., :3]) > 0.9


def test_a_share_that_is_not_known_is_not_finite(tmp_path):
    unknown = [{"context": 512, "depth": 0.0, "accuracy": None}, {"context": 512, "depth": 50.0, "accuracy": 0.5}]
    found = heat_map.panel(unknown, "a run", "depth", "{:g} %".format, "accuracy", 100)
    heat_map.save([[found]], tmp_path / "map.svg", "share right")
    words = re.findall(r"<!-- (.*?) -->", (tmp_path / "map.svg").read_text())
    assert words.count("not finite") == 1


def test_other_kinds_of_files_are_refused(panel, tmp_path):
    with pytest.raises(ConfigError, match=r"--plot .*map.txt: expected a name that ends in .png, .pdf or .svg"):
        heat_map.save([[panel]], tmp_path / "map.txt", "share right")
