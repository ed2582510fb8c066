"""Provide the stand-ins of a target."""

import pytest
from stand_ins import StandIns


@pytest.fixture
def stand_ins(tmp_path):
    """Give ``stand_ins(target)``, which puts the programs of a target into a folder; end what they leave running."""
    made = []

    def make(target: str) -> StandIns:
        made.append(StandIns(target, tmp_path / target))
        return made[-1]

    yield make
    for each in made:
        each.end()
