"""A file that grows here and is copied as a whole, to a place that fails and takes its time."""

import contextlib
import io
import time

import pytest

from ttt_jax.storage.writing import BucketFile


class Place:
    """An object in a bucket: it has a content once all of it was written."""

    def __init__(self):
        self.contents, self.failures, self.seconds = [], 0, 0.0

    def __str__(self):
        return "gs://bucket/records"

    @contextlib.contextmanager
    def open(self, mode):
        assert mode == "wb"
        time.sleep(self.seconds)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out\nof order")
        written = io.BytesIO()
        yield written
        self.contents.append(written.getvalue().decode())


@pytest.fixture
def place():
    return Place()


def test_flush_and_close_copy_all(place):
    file = BucketFile(place, "1\n")
    file.write("2\n")
    assert place.contents == []  # nothing is due yet
    assert file.flush()
    assert file.flush()
    assert place.contents == ["1\n2\n"]  # and nothing copied twice
    file.write("3 ü\n")
    file.close()
    assert place.contents[1:] == ["1\n2\n3 ü\n"]


def test_more_than_a_block(place):
    text = "0123456789abcde\n" * 150_000  # 2.4 MB
    file = BucketFile(place)
    file.write(text)
    file.close()
    assert place.contents == [text]


def test_copies_are_made_now_and_then_while_the_run_goes_on(place):
    place.seconds = 0.02
    file = BucketFile(place, every=0.1)
    began, slowest = time.monotonic(), 0.0
    for i in range(100):
        before = time.monotonic()
        file.write(f"{i}\n")
        slowest = max(slowest, time.monotonic() - before)
        time.sleep(0.005)
    seconds = time.monotonic() - began
    assert 2 <= len(place.contents) <= seconds / 0.1
    for content in place.contents:
        assert content == "".join(f"{i}\n" for i in range(content.count("\n")))
    file.close()
    assert place.contents[-1].count("\n") == 100


def test_failures_are_told_once_and_tried_again(place, capsys):
    place.failures = 2
    file = BucketFile(place, "1\n", every=0)
    file.write("2\n")  # fails
    file.write("3\n")
    assert file.flush(limit=2)
    assert place.contents == ["1\n2\n3\n"]
    told = "cannot write gs://bucket/records: RuntimeError: out of order; trying again from time to time\n"
    assert capsys.readouterr().err == told
    place.failures = 1
    file.write("4\n")
    file.close(limit=2)
    assert place.contents[-1] == "1\n2\n3\n4\n"
    assert capsys.readouterr().err == told  # it had worked in between


def test_a_run_does_not_wait_for_long(place, capsys):
    place.failures = 1000
    file = BucketFile(place, "12345\n")
    began = time.monotonic()
    assert not file.flush(limit=0.3)
    file.close(limit=0.3)
    assert 0.5 < time.monotonic() - began < 5
    assert capsys.readouterr().err.splitlines()[1:] == ["gs://bucket/records: the last 6 bytes could not be written"]
