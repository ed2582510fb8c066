"""Check this package against every number of the TTT authors' code in tests/oracles."""

from pathlib import Path

import pytest

from ttt_jax.interop import oracles

FILES = sorted((Path(__file__).parents[1] / "oracles").glob("*.npz"))


def test_no_file_is_missing():
    kinds = [path.name.partition("_")[0] for path in FILES]
    assert {kind: kinds.count(kind) for kind in kinds} == {"generation": 4, "model": 11, "traj": 4}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.slow
def test_numbers_of_a_file_are_reproduced(path):
    report = oracles.check(path)
    assert report is not None
    assert report.passed, str(report)
