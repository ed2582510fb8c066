"""Test atomic writes, files that are set aside, and growing files in buckets, which may fail or be slow."""

import contextlib
import io
import os
import threading
import time
from pathlib import Path

import pytest

from ttt_jax.storage import writing
from ttt_jax.storage.writing import BucketFile


class SlowObject:
    """An object in a bucket, which has a new content once all of it was written."""

    def __init__(self):
        self.contents, self.failures = [], 0
        self.opens = threading.Event()  # until then, a copy waits
        self.opens.set()

    def __str__(self):
        return "gs://bucket/records"

    @contextlib.contextmanager
    def open(self, mode):
        assert mode == "wb"
        self.opens.wait(10)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out\nof order")
        written = io.BytesIO()
        yield written
        self.contents.append(written.getvalue().decode())


@pytest.fixture
def place():
    return SlowObject()


def test_flush_and_close_copy_all(place):
    file = BucketFile(place, "1\n")
    file.write("2\n")
    assert place.contents == []  # no copy is due yet
    assert file.flush()
    assert file.flush()
    assert place.contents == ["1\n2\n"]  # copied once
    file.write("3 ü\n")
    file.close()
    assert place.contents[1:] == ["1\n2\n3 ü\n"]


def test_a_file_longer_than_a_block_is_copied(place):
    text = "0123456789abcde\n" * 150_000  # 2.4 MB
    file = BucketFile(place)
    file.write(text)
    file.close()
    assert place.contents == [text]


def test_a_write_does_not_wait_for_a_copy(place):
    place.opens.clear()
    file = BucketFile(place, every=0)
    file.write("1\n")  # begins a copy
    file.write("2\n")
    assert place.contents == []
    place.opens.set()
    file.close()
    assert place.contents[-1] == "1\n2\n"


def test_copies_are_made_from_time_to_time(place):
    file = BucketFile(place, every=0.05)
    began = time.monotonic()
    for i in range(40):
        file.write(f"{i}\n")
        time.sleep(0.005)
    seconds = time.monotonic() - began
    assert 2 <= len(place.contents) <= seconds / 0.05
    for content in place.contents:
        assert content == "".join(f"{i}\n" for i in range(content.count("\n")))
    file.close()
    assert place.contents[-1].count("\n") == 40


def test_failed_copies_are_reported_once_and_tried_again(place, capsys):
    place.failures = 2
    file = BucketFile(place, "1\n", every=0)
    file.write("2\n")  # fails
    file.write("3\n")
    assert file.flush(limit=2)
    assert place.contents == ["1\n2\n3\n"]
    message = "cannot write gs://bucket/records: RuntimeError: out of order; trying again from time to time\n"
    assert capsys.readouterr().err == message
    place.failures = 1
    file.write("4\n")
    file.close(limit=2)
    assert place.contents[-1] == "1\n2\n3\n4\n"
    assert capsys.readouterr().err == message  # again, as a copy was made in between


def test_waiting_for_a_bucket_is_limited(place, capsys):
    place.failures = 1000
    file = BucketFile(place, "12345\n")
    began = time.monotonic()
    assert not file.flush(limit=0.1)
    file.close(limit=0.1)
    assert 0.15 < time.monotonic() - began < 5
    assert capsys.readouterr().err.splitlines()[1:] == ["gs://bucket/records: the last 6 bytes could not be written"]


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    writing.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        writing.write_atomically(path, "new \ud800")
    assert path.read_text() == "old"


def test_files_set_aside_keep_their_content(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "x.json").write_text(content)
        writing.set_aside(tmp_path / "x.json")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "x.json.damaged": "first",
        "x.json.damaged-2": "second",
    }


def test_an_output_is_written_with_its_folders_and_through_links(tmp_path):
    writing.write_output(tmp_path / "a/b.csv", "1\r\n")
    assert (tmp_path / "a/b.csv").read_bytes() == b"1\r\n"
    (tmp_path / "link.csv").symlink_to("a/b.csv")
    writing.write_output(tmp_path / "link.csv", b"2")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "a/b.csv").read_bytes() == b"2"


def test_an_output_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("earlier")
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writing.write_output(path, "later")
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]
    assert path.read_text() == "earlier"


def test_a_pipe_is_written_in_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    writing.write_output(tmp_path / "pipe", "text")
    reader.join(10)
    assert read == ["text"]
    assert (tmp_path / "pipe").is_fifo()


def test_an_open_pipe_without_a_name_is_written():
    read, write = os.pipe()
    writing.write_output(Path(f"/dev/fd/{write}"), "text")  # as /dev/stdout
    assert os.read(read, 10) == b"text"
    os.close(read)
    os.close(write)
