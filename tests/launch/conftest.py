"""Provide the stand-ins of a target."""

import contextlib

import pytest
from stand_ins import StandIns


@pytest.fixture
def stand_ins(tmp_path):
    """Give ``stand_ins(target)``, which puts the programs of a target into a folder; end what they leave running."""
    with contextlib.ExitStack() as stack:
        yield lambda target: stack.enter_context(contextlib.closing(StandIns(target, tmp_path / target)))
