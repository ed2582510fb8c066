"""Test the files of a dataset in a folder and at a URL."""

import os

import pytest
from refusals import error_of

from ttt_jax.config import ConfigError
from ttt_jax.errors import DataError
from ttt_jax.storage.store import Store, is_url

FILES = {"a.json": b"{}", "train/c/0": bytes(range(256)), "train/c/10": b"", "train-2/c/0": b"x", "zarr.json": b"z"}


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    """Return an empty store in a folder, or at a memory:// URL, whose objects belong to that store alone."""
    return Store(tmp_path / "new" / "folder" if request.param == "folder" else "memory://bucket/folder")


@pytest.fixture
def full(store):
    for name, content in FILES.items():
        store.write(name, content)
    return store


def test_written_files_are_read_back(full):
    assert {name: full.read(name) for name in FILES} == FILES
    full.write("zarr.json", b"other")
    assert full.read("zarr.json") == b"other"


def test_parts_of_a_file_are_read(full):
    content = FILES["train/c/0"]
    assert full.read("train/c/0", 3, 9) == content[3:9]
    assert full.read("train/c/0", 250) == content[250:]
    assert full.read("train/c/0", None, 2) == content[:2]


def test_missing_files_are_none(store):
    assert store.read("gone") is None
    assert store.read("a/gone", 1, 2) is None
    assert store.read_json("gone.json") is None
    assert list(store.names()) == []
    store.delete("gone")
    store.delete_file("gone")


def test_exists_is_true_for_files_alone(full):
    assert all(full.exists(name) for name in FILES)  # an empty one too
    assert not any(full.exists(name) for name in ("gone", "train", "train/c/1", "train/c"))


def test_names_begin_with_a_prefix(full):
    assert sorted(full.names()) == sorted(FILES)
    assert sorted(full.names("train/")) == ["train/c/0", "train/c/10"]
    assert sorted(full.names("train")) == ["train-2/c/0", "train/c/0", "train/c/10"]
    assert sorted(full.names("train/c/1")) == ["train/c/10"]
    assert list(full.names("rain")) == []


def test_deleting_a_folder_leaves_its_neighbours(full):
    full.delete("train")
    assert sorted(full.names()) == ["a.json", "train-2/c/0", "zarr.json"]
    full.delete_file("a.json")
    assert sorted(full.names()) == ["train-2/c/0", "zarr.json"]


def test_json_is_read_back_in_order(store):
    value = {"b": [1, None, 0.5], "a": {"ü": "🦉"}}
    store.write_json("x.json", value)
    assert store.read_json("x.json") == value
    assert list(store.read_json("x.json")) == ["b", "a"]
    store.write("x.json", b"{")
    assert error_of(DataError, store.read_json, "x.json").startswith(
        f"{store.location}/x.json: damaged: it is not JSON: "
    )


def test_files_of_a_local_store_have_the_same_names(tmp_path):
    store = Store(tmp_path / "x")
    store.write("train/c/0", b"abc")
    assert (tmp_path / "x/train/c/0").read_bytes() == b"abc"
    assert os.listdir(tmp_path / "x/train/c") == ["0"]  # no temporary file is left
    (tmp_path / "x/empty").mkdir()
    assert list(store.names()) == ["train/c/0"]


def test_a_relative_path_does_not_follow_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("out//")
    monkeypatch.chdir("/")
    store.write("a", b"1")
    assert (tmp_path / "out/a").read_bytes() == b"1"
    assert store.path("a") == "out/a"


def test_a_store_can_be_sent_to_another_process(tmp_path, sent_to_a_process):
    store = Store(tmp_path)
    store.write("a", b"1")
    assert sent_to_a_process(store).read("a") == b"1"


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "below"):
        message = error_of(DataError, Store(place).write, "a", b"1")
        assert message.startswith(f"cannot write {place}/a: ")
        assert "Not a directory" in message
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nofs://bucket/folder", 'cannot open nofs://bucket/folder: Parsing spec from url: "nofs://bucket/folder/": '),
        ("gs://", "gs://: expected a bucket behind ://"),
        ("", "an empty name of a folder; expected a path or a URL"),
    ],
)
def test_a_location_that_cannot_be_a_store_is_refused(location, message):
    with pytest.raises(ConfigError) as caught:
        Store(location)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("location", "expected"), [("gs://b/x", True), ("s3://b", True), ("/a/b", False), ("a:b", False), ("a//b", False)]
)
def test_urls_are_told_from_paths(location, expected):
    assert is_url(location) == expected
