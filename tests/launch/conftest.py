"""Provide the stand-ins of a target."""

import pytest
from stand_ins import StandIns


@pytest.fixture
def stand_ins(tmp_path):
    """``stand_ins(target)``: its programs in a folder; what is left running is ended."""
    made = []

    def make(target: str) -> StandIns:
        made.append(StandIns(target, tmp_path / target))
        return made[-1]

    yield make
    for each in made:
        each.end()
