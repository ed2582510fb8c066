import atexit
import gc

import pytest

from ttt_jax import garbage


@pytest.fixture
def threshold():
    """Set the thresholds that a new process has; set those of the tests again in the end."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_garbage_is_looked_for_less_often(threshold, monkeypatch):
    at_end = []
    monkeypatch.setattr(atexit, "unregister", lambda function: at_end.clear())
    monkeypatch.setattr(atexit, "register", at_end.append)
    garbage.collect_rarely()
    garbage.collect_rarely()
    assert gc.get_threshold() == (10_000, 10, 10)
    assert at_end == [gc.freeze]


def test_who_looks_still_less_often_goes_on_so(threshold):
    gc.set_threshold(50_000, 5, 5)
    garbage.collect_rarely()
    assert gc.get_threshold() == (50_000, 5, 5)
