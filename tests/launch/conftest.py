"""Provide the stand-ins of each target, in which real processes make most tests slow."""

import contextlib

import pytest
from stand_ins import StandIns


@pytest.fixture
def stand_ins(tmp_path):
    """Give ``stand_ins(target)``, which puts the programs of a target into a folder; end what they leave running."""
    with contextlib.ExitStack() as stack:
        yield lambda target: stack.enter_context(contextlib.closing(StandIns(target, tmp_path / target)))


def _of(name, **marks):
    return pytest.fixture(lambda stand_ins, request: stand_ins(request.param), params=[pytest.param(name, **marks)])


slurm, gke, tpu = (_of(name, marks=pytest.mark.slow) for name in ("slurm", "gke", "tpu"))
sky = _of("sky")
