"""Test that Python collects cyclic garbage less often."""

import atexit
import gc

import pytest

from ttt_jax import garbage


@pytest.fixture
def threshold():
    """Set the thresholds of a new process, and restore those of the tests afterwards."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_garbage_is_collected_less_often_and_not_at_exit(threshold, monkeypatch):
    at_end = []
    monkeypatch.setattr(atexit, "unregister", lambda function: at_end.clear())
    monkeypatch.setattr(atexit, "register", at_end.append)
    garbage.collect_rarely()
    garbage.collect_rarely()
    assert gc.get_threshold() == (10_000, 10, 10)
    assert at_end == [gc.freeze]


def test_a_higher_threshold_is_kept(threshold):
    gc.set_threshold(50_000, 5, 5)
    garbage.collect_rarely()
    assert gc.get_threshold() == (50_000, 5, 5)
